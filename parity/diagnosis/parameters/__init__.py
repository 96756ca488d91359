"""Parameters that were carried over by hand."""
