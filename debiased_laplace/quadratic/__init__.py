"""The quadratic of a batch: what mini-batches overstate, instruments for it, and optimisers that survive it."""
