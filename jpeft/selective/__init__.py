"""Methods that change a part of the existing weights."""
