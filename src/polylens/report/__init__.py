"""How good the polynomials of a lens are."""
