"""A toy encoder-decoder, as T5 is one: two stacks of different depth, and two texts as inputs."""
