"""Anything callable that gives probabilities, or a mean and a variance: networks, ensembles, posteriors."""
