"""What mini-batches do to the quadratic of a network: measured, drawn, and said in one sentence.

``debiased-laplace bias`` on the command line, or :func:`study` and :func:`write_outputs` here.
"""

from debiased_laplace.evaluation.bias.measure import BiasOptions, study
from debiased_laplace.evaluation.bias.report import deciding_table, findings, statement, tables, write_outputs

__all__ = ["BiasOptions", "deciding_table", "findings", "statement", "study", "tables", "write_outputs"]
