"""`make fuzz`: many mutations, counted in benchmarks/results/fuzz.md."""
