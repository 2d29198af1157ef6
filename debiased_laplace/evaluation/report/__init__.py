"""From the records of several seeds to a summary, and from a summary to sentences, tables, figures and a page."""
