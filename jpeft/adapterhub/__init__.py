"""Bottleneck adapters in the format of the library adapters (AdapterHub), in both directions; neither it nor torch is needed.

`config` says which of its bottlenecks are which method here, `places` where they stand in the torch model, `heads` has the two forms of its
heads with labels, and `load` and `save` put these together.
"""
