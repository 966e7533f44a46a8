"""One arithmetic of a stage and its implementations; ``.dispatch`` picks one by name."""
