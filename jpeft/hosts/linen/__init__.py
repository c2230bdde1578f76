"""The host of models of `flax.linen`."""

from jpeft.hosts.linen.host import LinenHost as LinenHost
