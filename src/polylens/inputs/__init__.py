"""Models of a layer's inputs: a Gaussian, a mixture of them, the samples themselves."""
