"""Products: the operations in which a function's parameters meet its activations.

What a layer computes with its kernel is written in the jaxpr of its call, whatever the layer's class: a `dot_general`, a convolution, or
the lookup of rows. `find` reads the geometry of every parameter off it, and `run` computes a function with other products in their place.
"""

from jpeft.hosts.products.find import Product as Product
from jpeft.hosts.products.find import Read as Read
from jpeft.hosts.products.find import find_products as find_products
from jpeft.hosts.products.find import reads as reads
from jpeft.hosts.products.run import run_changed as run_changed
