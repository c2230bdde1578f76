"""One training run: its configuration, its folder, the loop and what it leaves."""
