"""What merges: labels to smaller tensors and modules."""
