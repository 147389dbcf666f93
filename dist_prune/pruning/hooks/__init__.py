"""Forward hooks: statistics of layer outputs and inputs, and gates on channels.

- ``statistics``: ``Statistic``, ``State`` and ``Accumulator``, which merge exactly over ranks.
- ``capture``: calls a function with the output or input of layers.
- ``consumers``: the hook points of a group, at the layers that read or make its channels.
- ``activations``, ``curvature``: statistics of feature maps and of weights.
- ``gating``: channels multiplied by masks or factors.
- ``split_forward``, ``masked_accuracy``: metrics of a network without some channels; its first layers run once.
"""
