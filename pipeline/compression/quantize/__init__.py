"""Weights on grids of few bits: where the grids lie, how weights are rounded to them, and how they are packed."""
