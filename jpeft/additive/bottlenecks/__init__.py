"""Adapters: bottleneck layers inside the blocks of a model."""
