"""Circuits of a prompt without training: attribution graphs of the polynomials of a lens."""
