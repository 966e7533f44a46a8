"""A trained network that is asked over HTTP: ``sparsenet serve``."""
