"""Where methods meet frameworks: these files alone know what a model is."""
