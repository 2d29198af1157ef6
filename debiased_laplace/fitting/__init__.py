"""From a stream of data to a fitted posterior."""
