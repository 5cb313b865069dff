"""One file for each family of operators: how channels flow through it and how it is resized."""
