"""Writing a model to files, running those files, and measuring them."""

if __name__ != "slimc.exporters":
    raise ImportError("import this package as slimc.exporters; `import exporters` would load every class twice")
