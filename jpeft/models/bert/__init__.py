"""BERT, RoBERTa, DistilBERT, XLM-RoBERTa, CamemBERT, ELECTRA and all models with their layout, such as MiniLM.

They differ in the names of their parameters (Hugging Face's names, so that a checkpoint is read by name), in how they count
positions, and in their heads. The embeddings of ELECTRA may be narrower than its blocks.

References: Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Liu et al., `RoBERTa
<https://arxiv.org/abs/1907.11692>`_, 2019; Sanh et al., `DistilBERT
<https://arxiv.org/abs/1910.01108>`_, 2019; Conneau et al., `XLM-RoBERTa
<https://arxiv.org/abs/1911.02116>`_, 2020; Martin et al., `CamemBERT <https://arxiv.org/abs/1911.03894>`_, 2020; Clark et al., `ELECTRA
<https://arxiv.org/abs/2003.10555>`_, 2020.
"""
