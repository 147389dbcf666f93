"""Layers and channel groups of a network, as data, and the tracer that finds them.

- ``groups``: ``DependencyGraph``, ``ChannelGroup``, ``Coupling``, ``Layer`` and ``HookPoint``.
- ``layer_trace``: layer sizes from one forward pass.
- ``tracer``: channel groups by torch-pruning (one of its two doors).
- ``head_groups``: attention heads and groups of grouped convolutions as channels.
- ``channel_tensors``: values per layer position as values per channel.
"""
