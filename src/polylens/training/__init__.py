"""R2 by degree while a network learns."""
