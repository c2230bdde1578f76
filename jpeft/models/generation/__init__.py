"""Text from a decoder: greedy, sampled or by beam search."""
