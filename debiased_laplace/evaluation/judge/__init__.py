"""From named predictors to their scores on test, shifted and out-of-distribution data, in one pass per loader."""
