"""Tracing: the coupled channel groups of a network, from its graph."""
