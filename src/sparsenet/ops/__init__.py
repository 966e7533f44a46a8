"""One arithmetic of a stage and its implementations; :mod:`sparsenet.ops.dispatch` picks one by name."""
