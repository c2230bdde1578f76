"""Pretrained models in and out of Hugging Face folders: config.json, safetensors, tokenizer.

Torch is not needed. `transformers` is imported where it is used, for configurations and tokenizers.
"""
