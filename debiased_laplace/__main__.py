"""``python -m debiased_laplace`` is the command line."""

from debiased_laplace.cli import app

app()
