"""The host of models of `flax.nnx`. Nothing here imports NNX before a model of it is met."""

from jpeft.hosts.nnx.host import NNXHost as NNXHost
