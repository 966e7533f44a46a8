"""Images in classes: reading them, splitting them, and the order in which they are trained on."""
