"""nnsight models."""
