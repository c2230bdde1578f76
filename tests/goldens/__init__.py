"""Adapters that HF PEFT wrote, with the logits of its models; and what reads them.

`make.py` writes one JSON and one safetensors file a model: all that the folders of the adapters hold, packed together, because many small
files are slow to check out. `Golden.write` makes the folder of an adapter from them, as `save_pretrained` left it. The base weights are in
none of the files: `base.py` makes them from their names, here and in torch.
"""
