"""The base of methods that add bottlenecks to modules."""

import abc
from collections.abc import Callable
from typing import Any

import jax

from jpeft import layouts, tree
from jpeft.additive.bottlenecks.bottleneck import Activation, project_down_and_up
from jpeft.additive.bottlenecks.sites import BottleneckSite, find_sites
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Axes, Names, Pattern
from jpeft.tree.adapters import ADDED
from jpeft.tree.head import not_head


class BottleneckMethod(Method):
    """A method that adds one bottleneck to each module that `target` names.

    A method says which leaves a bottleneck begins with (`init_at`). By default the bottleneck reads the module's output and adds to it;
    a method whose bottleneck reads something else defines `call`.

    Attributes:
      activation: Name of the bottleneck's nonlinearity.
      target: The leaves that name the modules, a regex or a list of names. None if the method chooses by family; see `target_in`.
      axes: Geometry of kernels with more than two axes, as in `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.
      train_norms: Whether scale and bias of all normalisations are trained too. An option where the method's paper does so.
    """

    activation: Activation
    target: Names | None
    axes: Axes | None = None
    head: Pattern | None = "auto"

    train_norms = False
    family = "additive"
    learning_rate = 2e-3
    why_no_merge = "an adapter is a nonlinear layer of its own, which no weight of the base can take up; keep using it through jpeft.wrap"
    begins_within = 0.2

    @abc.abstractmethod
    def init_at(self, key: jax.Array, site: BottleneckSite) -> dict[str, Any]:
        """The leaves that are added to the module at one site.

        Args:
          key: The site's own random key.
          site: The module, its width and its stack axes.
        """

    def target_in(self, params: tree.Params) -> Names:
        """The option `target`, or what None stands for in this base."""
        del params
        assert self.target is not None, "A method whose target may be None defines target_in."
        return self.target

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """A bottleneck for each site, the normalisations if they are trained, and the task head.

        Raises:
          ValueError: if the target matches nothing, or a width cannot be told.
        """
        del stats
        norms = layouts.find(not_head(params, self.head), "@norms", required=False) if self.train_norms else []
        base = tree.flatten(params)
        out = {path: tree.trained_copy(base[path]) for path in norms}
        for site in find_sites(params, self.target_in(params), axes=self.axes, head=self.head):
            out |= site.added(self.init_at(tree.key_for(key, site.leaf), site))
        return with_head(out, params, self.head)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """``h + W_up act(W_down h + b_down) + b_up`` in place of the module's output h."""
        del rng
        return map_hidden(layer(*inputs), lambda h: h + project_down_and_up(leaves[ADDED], h, self.activation))


def map_hidden(outputs: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """A module's outputs with ``change(h)`` in place of the hidden state h, which is the first entry of a tuple or the only output.

    >>> map_hidden((1, "cache"), lambda h: h + 1)
    (2, 'cache')
    """
    return (change(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else change(outputs)
