"""Channel groups and how a network is traced for them."""
