"""What a model is run on, and how its layers are seen."""
