"""What the families of models share: configurations, attention, caches, layers, blocks, and the description of a family."""
