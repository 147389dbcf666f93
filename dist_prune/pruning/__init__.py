"""Channel groups, statistics, plans, costs and surgery. Knows no rank, no loader and no paper.

Folders and files, in the order in which they may import one another (a later one imports earlier ones only):

- ``rng``: seeded random generators. ``eval_mode``: evaluation mode for a while. ``module_calls``: first inputs of
  module calls. ``figure_data``: data of a report's figures.
- ``graph``: the layers and channel groups of a network, and the tracer that finds them.
- ``hooks``: forward hooks, statistics of layer outputs, and gates on channels.
- ``plan``: which channels and weight blocks are removed, by name; plan files.
- ``selection``: from scores and a request to kept channels; costs and round schedules.
- ``surgery``: plans applied to networks, and networks rebuilt from pruned weights.
- ``information``: entropy and mutual information of channel groups; imports no surgery.
- ``sparse_learning``: sparsity terms that are added to gradients in training.
"""
