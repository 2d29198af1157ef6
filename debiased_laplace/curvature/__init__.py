"""Directions from some data, curvatures along them from other data."""
