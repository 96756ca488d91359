"""The optimisers' update rules."""
