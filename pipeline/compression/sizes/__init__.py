"""Sizes: how many channels each group keeps under a budget, and the MACs and parameters that a budget limits."""
