"""Images: where they come from, how they are dealt to ranks, what happens to them on the way to the network."""
