"""The nouns of the field: statistics, channel groups, plans, costs, surgery. Knows no rank, no loader, no paper."""
