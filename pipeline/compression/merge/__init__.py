"""Merging: from labels to smaller tensors and modules."""
