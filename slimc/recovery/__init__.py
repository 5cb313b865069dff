"""One file for each way of fitting what is left after the cut."""
