"""Scores of predictions, and intervals for them; arrays in, nothing known of networks or tasks."""
