"""The optimum over all polynomials in x under a mixture."""
