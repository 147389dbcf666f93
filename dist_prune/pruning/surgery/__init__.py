"""Plans cut out of networks. The only door to torch-pruning."""
