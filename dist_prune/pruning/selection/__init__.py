"""From scores to kept channels: rankings, budgets, costs and round schedules. Pure functions.

- ``cost``, ``sparse_cost``: MACs, parameters, time; sizes of networks with zeros.
- ``tie_breaking``, ``group_scores``: order of channels by score, and scores of groups from those of layers.
- ``ranking``: ``SelectionRequest``, and the choice of kept channels.
- ``schedule``: the request of each round of iterative pruning.
- ``latency_search``: the largest network within a measured time.
- ``plan_summary``: sizes that a plan leaves, as text.
"""
