"""Llama, Mistral, Qwen2 and Qwen3. Parameters have Hugging Face's names.

The four share one decoder. They differ in which projections have biases, in whether queries and keys are normalised, in how far back a
layer attends, and in their defaults.

References: Touvron et al., `LLaMA <https://arxiv.org/abs/2302.13971>`_, 2023; Jiang et al., `Mistral 7B
<https://arxiv.org/abs/2310.06825>`_, 2023; Yang et al., `Qwen2 <https://arxiv.org/abs/2407.10671>`_, 2024, and `Qwen3
<https://arxiv.org/abs/2505.09388>`_, 2025.
"""
