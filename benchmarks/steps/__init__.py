"""Training steps and generation of jpeft and others on the same shapes: what `bench.py` and `gpu.py` run."""
