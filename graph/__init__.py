"""Channel analysis of a captured model: terms, rules, groups and cost."""

if __name__ != "slimc.graph":
    raise ImportError("import this package as slimc.graph; `import graph` would load every class twice")
