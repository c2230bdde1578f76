"""Methods that add a few new parameters."""
