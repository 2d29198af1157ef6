"""The quadratic of a batch: what mini-batches overstate, instruments for it, and optimisers that survive it.

``derivatives`` has products with Jacobians and curvatures, ``quadratic`` the object made of them, ``spectrum`` what
follows from the Gram matrix of a batch, ``instruments`` the measurements of the bias, ``optim`` the steps. The glossary
of docs/theory.md has the terms (slope, curvature, direction, jvp, vjp).
"""
