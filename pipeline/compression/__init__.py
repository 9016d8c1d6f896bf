"""Compression as projection of coupled channel groups: tensors in, tensors out."""
