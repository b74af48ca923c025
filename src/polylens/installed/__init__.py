"""What a lens does to a model."""
