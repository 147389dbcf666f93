"""Plans applied to networks.

- ``surgeon``: ``apply_plan``, by torch-pruning (one of its two doors).
- ``head_surgery``, ``channel_attributes``: parts that torch-pruning does not cut.
- ``depth_surgery``, ``residual_blocks``: blocks that go as a whole, and how they are found.
- ``rebuild``: a pruned network from its weights and plan, without tracing.
- ``verified_trace``: a traced dependency graph whose groups were cut on trial.
- ``reinit``: new weights for named layers.
"""
