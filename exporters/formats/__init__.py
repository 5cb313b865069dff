"""One file for each format that a model can be written to."""
