"""What a model is run on, how its layers are seen, and the methods of `attach`."""
