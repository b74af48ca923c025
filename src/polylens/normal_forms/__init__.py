"""What is ever fitted, MLPs and GLUs, and their preactivations."""
