"""Which data of a stream are kept, and in which roles.

``reservoir`` keeps the data of a stream with the smallest keys, ``sample`` is what was kept, with weights and folds,
``samplers`` choose the keys and the weights, ``splits`` the roles of the folds. docs/theory.md, "Sampling" and
"Folds", has the equations; its glossary has the terms.
"""
