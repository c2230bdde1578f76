"""Adapters in HF PEFT's format, in both directions: a folder with adapter_config.json and adapter_model.safetensors.

Neither torch nor peft is needed. `sites` says which torch module is which parameter, `targets` has HF PEFT's rules for choosing modules,
`formats` has one file for each of its types of adapter, and `load` and `save` put these together.
"""
