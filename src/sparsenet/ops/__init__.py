"""One arithmetic of a stage and its implementations; :mod:`.dispatch` picks one by name."""
