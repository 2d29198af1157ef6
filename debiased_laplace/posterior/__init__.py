"""The Gaussian over the parameters, its predictions, and the choice of its prior."""
