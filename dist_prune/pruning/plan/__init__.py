"""Plans: which channels and weight blocks are removed, by name, in coordinates of the dense network.

- ``plan``: ``Plan``, its JSON and its fingerprint.
- ``weight_blocks``, ``block_masks``: blocks of weights that stay zero, and their masks.
- ``after_pruning``: the dependency graph of the network that a plan leaves.
- ``files``, ``saved_idxs``: plans read from files, and the ``saved_idxs`` exchange format.
"""
