"""The base of methods that train keys and values in front of every layer's own."""

import abc
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft import tree
from jpeft.additive.prefixes.attention_sites import KEY, AttentionSite, find_attention_sites, find_position_modules
from jpeft.additive.prefixes.key_values import NAMES, Prefix, from_statistics, prepend, to_adapter, widen_mask
from jpeft.additive.prefixes.reparameterization import init_network, run_network
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Axes, Count, CountOrZero, Length, Names, NotNegative, Pattern, Probability, option
from jpeft.core.statistics import KeyValues, Statistic, find
from jpeft.tree.adapters import ADDED

SHIFT = "shift"  # the leaf that `bind` adds to modules that count positions


class PrefixMethod(Method):
    """A method that trains a prefix P of l rows: keys and values for every layer, flat, or a network that makes all of them.

    `jpeft.prefix_tuning` explains the options.

    Attributes:
      length: l. None for one row for each of `tokens`, or `default_length`.
      initializer: The option ``init``: where P starts.
      tokens: Token ids of the text that P starts from.
      mlp: Inner width of the network; None trains P itself.
      std: Standard deviation of P where it is trained itself.
      dropout: Probability with which a scalar of P is dropped.
      shift: Whether positions are counted from l on.
      target: The key kernels.
      width: kv_heads * head_dim, where the key kernel does not tell it.
      axes: Geometry of kernels with more than two axes, as in `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.
    """

    length: Length | None = None
    initializer: Literal["random", "tokens"] = option(default="random", alias="init")
    tokens: Sequence[CountOrZero] | None = None
    mlp: Count | None = None
    std: NotNegative = 0.02
    dropout: Probability = 0.0
    shift: bool = True
    target: Names = KEY
    width: Count | None = None
    axes: Axes | None = None
    head: Pattern | None = "auto"

    family = "additive"
    why_no_merge = (
        "a prefix lengthens the keys and values of every attention, which no weight of the base can take up; "
        "keep using it through jpeft.wrap"
    )

    @property
    def network_std(self) -> float | None:
        """Standard deviation of the network's kernels and of P'; None where they begin as torch's layers do."""
        return None

    @property
    @abc.abstractmethod
    def default_length(self) -> int:
        """L of a prefix that is given neither a length nor tokens."""

    def check(self) -> None:
        """Refuse tokens that do not go with `init` or `length`."""
        if self.tokens is not None and self.initializer != "tokens":
            raise ValueError(f"tokens are what init='tokens' starts from, but init is {self.initializer!r}.")
        if self.initializer == "tokens":
            if not self.tokens:
                raise ValueError("init='tokens' needs tokens=, the token ids of the text to start from.")
            if self.length not in (None, len(self.tokens)):
                raise ValueError(
                    f"length={self.length}, but there are {len(self.tokens)} tokens to start from, a row for each: leave length out."
                )

    @property
    def rows(self) -> int:
        """L."""
        return self.length or (len(self.tokens) if self.tokens else self.default_length)

    def sites(self, params: tree.Params) -> list[AttentionSite]:
        """The attentions that get a prefix."""
        return find_attention_sites(params, target=self.target, width=self.width, axes=self.axes, head=self.head)

    # --- making and binding -----------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """The prefix or the network, and the task head.

        Raises:
          ValueError: if no kernel matches, if the given keys and values do not fit, or if none are given and ``init="tokens"``.
        """
        sites = self.sites(params)
        start = from_statistics(find(stats, KeyValues), sites, self.rows)
        if self.initializer == "tokens" and start is None:
            raise ValueError(
                "init='tokens' starts from the keys and values that the model has for these tokens, and they were not given: "
                "stats=jpeft.stats.key_values(model, params, [tokens])."
            )
        if self.mlp is not None:
            adapter = {ADDED: init_network(key, sites, length=self.rows, inner=self.mlp, start=start, std=self.network_std)}
        else:
            adapter = to_adapter(sites, start or self._random(key, sites))
        return with_head(adapter, params, self.head)

    def _random(self, key: jax.Array, sites: list[AttentionSite]) -> Prefix:
        """P from N(0, std²)."""

        def draw(site: AttentionSite, name: str) -> jax.Array:
            return self.std * jax.random.normal(tree.key_for(key, f"{site.core}/{name}"), (*site.stack, self.rows, site.width))

        return {site.core: {name: draw(site, name) for name in NAMES} for site in sites}

    def without_network(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The adapter with the prefix in place of the network that makes it."""
        if self.mlp is None:
            return adapter
        sites, rest = self.sites(params), {name: leaf for name, leaf in adapter.items() if name != ADDED}
        prefix = to_adapter(sites, run_network(adapter[ADDED], sites))
        return tree.unflatten(tree.flatten(rest) | tree.flatten(prefix))

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Add the prefix to the attention cores, and with `shift` the length to the modules that count positions.

        A model whose word embedding is not found has no module that counts positions as far as its parameters tell, so nothing is added.
        """
        leaves = tree.flatten(self.without_network(params, adapter))
        if self.shift:
            leaves |= {f"{module}/{ADDED}/{SHIFT}": jnp.array(self.rows) for module in find_position_modules(params)}
        return super().bind(params, tree.unflatten(leaves), rng=rng)

    # --- one layer --------------------------------------------------------------------------------------------------------------------

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Run an attention core on longer keys and values, or count positions from l on."""
        if SHIFT in leaves[ADDED]:
            positions = layer(*inputs)
            return positions._replace(position_ids=positions.position_ids + self.rows, offset=positions.offset + self.rows)
        query, key, value, *rest = inputs  # key and value: [*batch, length, heads, head_dim]
        mask, *rest = rest or [None]
        heads, head_dim = key.shape[-2:]
        width = leaves[ADDED]["key"].shape[-1]
        if width != heads * head_dim:
            raise ValueError(
                f"The keys of '{layer.path}' have {heads} heads of {head_dim}, {heads * head_dim} in all, but its prefix is {width} wide, "
                f"which was read off the key kernel. Give the true width: width={heads * head_dim}."
            )
        key_rng, value_rng = (None, None) if rng is None or not self.dropout else jax.random.split(rng)
        key = prepend(leaves[ADDED]["key"], key, dropout=self.dropout, rng=key_rng)
        value = prepend(leaves[ADDED]["value"], value, dropout=self.dropout, rng=value_rng)
        return layer(query, key, value, None if mask is None else widen_mask(mask, self.rows), *rest)

    # --- after training ---------------------------------------------------------------------------------------------------------------

    @property
    def folds(self) -> bool:
        """Whether there is a network."""
        return self.mlp is not None

    def fold(self, params: tree.Params, adapter: tree.Adapter) -> tuple[Method, tree.Adapter]:
        """The method without a network, and the prefix that the network makes."""
        if self.mlp is None:
            return self, adapter
        return self._from_random(mlp=None), self.without_network(params, adapter)

    @property
    def requires_stats(self) -> tuple[type[Statistic], ...]:
        """Keys and values, if the prefix starts from those of tokens."""
        return (KeyValues,) if self.initializer == "tokens" else ()

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """The shapes do not depend on where the prefix starts, so no keys and values are needed to load one."""
        del adapter
        return jax.eval_shape(self._from_random().init, jax.random.key(0), params)

    def _from_random(self, **options: Any) -> Method:
        """The same method, of the same length, with a random start."""
        return self.replace(init="random", tokens=None, length=self.rows, **options)
