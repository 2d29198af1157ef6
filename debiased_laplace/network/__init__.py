"""A model and its gradient factors: the only room that knows layers."""
