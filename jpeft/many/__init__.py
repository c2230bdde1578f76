"""Many adapters over one base: mixed in one batch, combined into one, turned into LoRA."""
