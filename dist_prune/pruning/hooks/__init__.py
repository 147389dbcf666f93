"""What is read at a layer while a network runs, and channels gated there."""
