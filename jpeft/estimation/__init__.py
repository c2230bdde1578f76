"""What a training step needs, from shapes alone."""
