"""The base of methods that add bottlenecks to modules."""

import abc
from collections.abc import Callable
from typing import Any

import jax

from jpeft import layouts, tree
from jpeft.additive.bottlenecks.bottleneck import Activation, project_down_and_up
from jpeft.additive.bottlenecks.hidden_state import change_hidden, is_hidden
from jpeft.additive.bottlenecks.sites import BottleneckSite, check_both_parts, find_sites
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Axes, Names, PathPattern, Pattern
from jpeft.tree.adapters import ADDED
from jpeft.tree.head import not_head


class BottleneckMethod(Method):
    """A method that adds one bottleneck to each module that `target` names.

    A method says which leaves a bottleneck begins with (`init_at`). By default the bottleneck reads the module's output and adds to it;
    a method whose bottleneck reads something else defines `call`.

    Attributes:
      activation: Name of the bottleneck's nonlinearity.
      target: The leaves that name the modules, a regex or a list of names. None if the method chooses by family; see `target_in`.
      hidden_state: Which output of the module is the hidden state, by its path among them (a regex), where several may be.
      axes: Geometry of kernels with more than two axes, as in `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.
      train_norms: Whether scale and bias of all normalisations are trained too. An option where the method's paper does so.
    """

    activation: Activation
    target: Names | None
    hidden_state: PathPattern | None = None
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

    @property
    def in_both_parts(self) -> bool:
        """Whether a bottleneck is wanted after attention and after the feed-forward layer of each block, wherever these are."""
        return False

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
        sites = find_sites(params, self.target_in(params), axes=self.axes, head=self.head)
        if self.in_both_parts:
            check_both_parts(params, sites, self.head, self.name)
        for site in sites:
            out |= site.added(self.init_at(tree.key_for(key, site.leaf), site))
        return with_head(out, params, self.head)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """``h + W_up act(W_down h + b_down) + b_up`` in place of the module's output h."""
        del rng
        return self.change(layer, inputs, leaves[ADDED], lambda h: h + project_down_and_up(leaves[ADDED], h, self.activation))

    def change(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], change: Callable[[jax.Array], jax.Array]) -> Any:
        """Run a module, with ``change(h)`` in place of its hidden state h, which is as wide as the bottleneck."""
        where = f"{self.name}: '{layer.path}'" if layer.path else f"{self.name}: the model"
        given, width = (*inputs, *layer.keywords.values()), width_of(leaves)
        return change_hidden(layer(*inputs), change, width=width, inputs=given, chosen=self.hidden_state, where=where)

    def goes_around(self, inputs: tuple[Any, ...], outputs: Any, leaves: dict[str, Any]) -> bool:
        """Whether a module's method of another name than `__call__` gives a hidden state as wide as the bottleneck."""
        del inputs
        return any(is_hidden(y, width_of(leaves)) for y in jax.tree.leaves(outputs))


def width_of(leaves: dict[str, Any]) -> int:
    """The width of the hidden state that a bottleneck reads and changes."""
    return leaves["up"]["bias"].shape[-1]
