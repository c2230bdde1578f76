"""GPT-2 and all models with its layout, such as DistilGPT-2 and DialoGPT. Parameters have Hugging Face's names.

Reference: Radford et al., `Language Models are Unsupervised Multitask Learners
<https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_, 2019.
"""
