"""Many runs side by side: rows, the table and the picture."""
