"""Images in classes: where they are found, how they are decoded, and the order in which they are trained on."""
