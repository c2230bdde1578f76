"""Methods that train a low-rank or otherwise structured change of the weights and merge it for inference."""
