"""Activations: one row for each, and the Hermite coefficients of them all."""
