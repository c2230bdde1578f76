"""BERT, RoBERTa, DistilBERT and all models with their layout, such as MiniLM.

The three differ in the names of their parameters (Hugging Face's names, so that a checkpoint is read by name), in how they count
positions, and in their heads.

References: Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Liu et al., `RoBERTa
<https://arxiv.org/abs/1907.11692>`_, 2019; Sanh et al., `DistilBERT <https://arxiv.org/abs/1910.01108>`_, 2019.
"""
