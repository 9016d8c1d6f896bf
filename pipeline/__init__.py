"""Foldability: train networks, make them smaller without retraining, measure what is left."""
