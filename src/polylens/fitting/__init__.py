"""From a layer and a model of its inputs to a polynomial: one file an estimator."""
