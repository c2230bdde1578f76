"""LLaMA-Adapter: trained prompts that the top blocks attend to beside their text, through a gate that begins closed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prefixes.attention_sites import KEY, AttentionSite, find_attention_sites
from jpeft.additive.prefixes.prompt_projections import VALUE, Projections, find_projections
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import Axes, Count, Length, Names, NotNegative, Pattern
from jpeft.tree.adapters import ADDED

PROMPT, GATE = "prompt", "gate"  # leaves of the adapter at the module around each attention core


class AdaptionPrompt(Method):
    r"""LLaMA-Adapter: ``softmax(Q Kᵀ / √d) V + g softmax(Q K_Pᵀ / √d) V_P`` in the top blocks, before the output projection.

    Each of these blocks has a prompt P of `length` trained rows and a gate g, one number. Keys and values of P are made by the block's own
    projections, ``K_P = P W_K + b_K`` and ``V_P = P W_V + b_V``, without rotation and without normalisation. The gate begins at zero, so
    the model begins as the base and the prompts learn once the gates have opened.

    Args:
      length: Rows l of each prompt.
      layers: How many blocks, counted from the output, get a prompt; None for all. The paper takes 30 of 32.
      std: Standard deviation of P at the start.
      project: Whether the output of the prompts passes the output projection, as in the paper. HF PEFT does so for Llama and Mistral, and
        adds it behind the projection for GPT-2: ``project=False``, for attention whose queries, keys and values come from one kernel.
      heads: Number of attention heads, which the parameters do not tell; needed with ``project=False`` alone.
      target: The key kernels, a regex. The attention core is the module ``core`` beside each, as in `jpeft.prefix_tuning`.
      value: The value kernels, a regex; one beside each key kernel that is not that of all three.
      width: kv_heads * head_dim, as in `jpeft.prefix_tuning`.
      axes: Geometry of kernels with more than two axes; see `jpeft.lora`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge.

    Raises:
      ValueError: for ``project=False`` without `heads`; from `init`, for more `layers` than there are, if no kernel matches, or if there is
        none for values; from the first call, if the model has no attention core at that place or its keys have another width.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> attention = {"k_proj": {"kernel": jnp.ones((8, 4))}, "v_proj": {"kernel": jnp.ones((8, 4))}}
    >>> params = {"layers": {str(i): {"self_attn": attention} for i in range(3)}}
    >>> jax.tree.map(jnp.shape, jpeft.apply(params, method="adaption_prompt", length=5, layers=1).adapter)
    {'layers': {'2': {'self_attn': {'+': {'gate': (1,), 'prompt': (5, 8)}}}}}

    Reference: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, 2023,
    https://arxiv.org/abs/2303.16199.

    HF PEFT has the same method for Llama, Mistral and GPT-2, calls the leaves `adaption_prompt` and `adaption_gate`, and has one gate for
    all heads, as here; the authors' code has a gate for each head. In a chain the projections of the base are meant, not those that another
    method has changed. Where the output projection has a bias, HF PEFT adds it twice, so that its model does not begin as the base.
    """

    length: Length = 10
    layers: Count | None = None
    std: NotNegative = 1.0
    project: bool = True
    heads: Count | None = None
    target: Names = KEY
    value: Names = VALUE
    width: Count | None = None
    axes: Axes | None = None
    head: Pattern | None = "auto"

    name = "adaption_prompt"
    family = "additive"
    summary = "prompts that the top blocks attend to through gates, which begin closed (LLaMA-Adapter)"
    learning_rate = 1e-2
    begins_within = 0.0
    reduce_grads_locally = True  # a prompt's gradient comes from those of its keys and its values
    why_no_merge = (
        "the prompts are keys and values of an attention of their own, which no weight of the base can take up; "
        "keep using it through jpeft.wrap"
    )

    def check(self) -> None:
        """Refuse heads without a use, and their absence where they are needed."""
        if self.project and self.heads is not None:
            raise ValueError(f"adaption_prompt: heads={self.heads} is for project=False; the attention core tells how many there are.")
        if not self.project and self.heads is None:
            raise ValueError("adaption_prompt: project=False needs heads=, the number of attention heads, which no parameter tells.")

    def sites(self, params: tree.Params) -> list[tuple[AttentionSite, int]]:
        """The attentions that get prompts, in the order of the blocks, each with the number of its layers, the top ones, that do.

        Raises:
          ValueError: for more layers than the model has.
        """
        found = find_attention_sites(params, target=self.target, width=self.width, axes=self.axes, head=self.head)
        count = sum(site.layers for site in found)
        left = count if self.layers is None else self.layers
        if left > count:
            raise ValueError(f"adaption_prompt: layers={left}, but the model has {count}.")
        top: list[tuple[AttentionSite, int]] = []
        for site in reversed(found):
            if taken := min(left, site.layers):
                if taken < site.layers and len(site.stack) > 1:
                    raise ValueError(
                        f"adaption_prompt: layers={self.layers} takes a part of '{site.kernel}', whose layers have the axes {site.stack}."
                    )
                top.append((site, taken))
                left -= taken
        return top[::-1]

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Prompts from N(0, std²), closed gates, and the task head."""
        del stats
        sites = self.sites(params)
        jax.eval_shape(lambda params: [each.key for each in self._projections(params, sites)], params)  # refuses attention without values
        leaves: dict[str, Any] = {}
        for site, count in sites:
            stack, path = (count,) if len(site.stack) == 1 else site.stack, _path(site, PROMPT)
            leaves[path] = self.std * jax.random.normal(tree.key_for(key, path), (*stack, self.length, site.inputs))
            leaves[_path(site, GATE)] = jnp.zeros((*stack, 1))
        return with_head(leaves, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Put each prompt's keys and values, and its gate, at the attention core; or at the module around it."""
        del rng
        replaced, _, added = tree.split(params, adapter)
        params = tree.replace(params, replaced) if replaced else params
        sites, grafts = self.sites(params), {}
        for (site, _), projections in zip(sites, self._projections(params, sites), strict=True):
            own = added[_around(site)]
            leaves = projections.of_prompt(own[PROMPT]) | {GATE: own[GATE]}
            # Blocks below the top ones get zeros: a gate of zero adds nothing.
            place = site.core if self.project else _around(site)
            grafts[place] = {ADDED: {name: _from_below(leaf, site.stack) for name, leaf in leaves.items()}}
        return tree.put_grafts(params, grafts)

    def _projections(self, params: tree.Params, sites: list[tuple[AttentionSite, int]]) -> list[Projections]:
        return find_projections(params, [site for site, _ in sites], value=self.value, axes=self.axes, heads=self.heads)

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Add what the queries find in the prompt."""
        del rng
        own, outputs = leaves[ADDED], layer(*inputs)
        if not self.project:
            return outputs + _attend_from_hidden(inputs[0], own).astype(outputs.dtype)
        query, key, *_ = inputs
        heads, head_dim = key.shape[-2:]
        if own["key"].shape[-1] != heads * head_dim:
            raise ValueError(
                f"The keys of '{layer.path}' have {heads} heads of {head_dim}, {heads * head_dim} in all, but its prompt has "
                f"{own['key'].shape[-1]}, which was read off the key kernel. Give the true width: width={heads * head_dim}."
            )
        return outputs + _attend(query, own, heads).astype(outputs.dtype)


def _around(site: AttentionSite) -> str:
    """The path of the module around the attention core."""
    return site.core.rpartition("/")[0]


def _path(site: AttentionSite, name: str) -> str:
    return "/".join(filter(None, (_around(site), ADDED, name)))


def _from_below(leaf: Float[Array, "..."], stack: tuple[int, ...]) -> Float[Array, "..."]:
    """The leaf of the top layers, with zeros for the others of a stack."""
    below = stack[0] - leaf.shape[0] if stack else 0
    return jnp.pad(leaf, [(below, 0)] + [(0, 0)] * (leaf.ndim - 1)) if below else leaf


def _attend(
    query: Float[Array, "*batch queries heads head"], own: dict[str, Any], groups: int
) -> Float[Array, "*batch queries heads head"]:
    """``g softmax(Q K_Pᵀ / √d) V_P``; each head of keys serves a group of neighbouring heads of queries."""
    length, head_dim = own["key"].shape[0], query.shape[-1]
    grouped = query.reshape(*query.shape[:-2], groups, -1, head_dim)  # [*batch, queries, groups, heads of a group, head]
    key, value = (own[name].reshape(length, groups, head_dim).astype(query.dtype) for name in ("key", "value"))
    scores = jnp.einsum("...qgrd,lgd->...qgrl", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = (own[GATE][0] * jax.nn.softmax(scores, axis=-1)).astype(query.dtype)
    return jnp.einsum("...qgrl,lgd->...qgrd", weights, value).reshape(query.shape)


def _attend_from_hidden(hidden: Float[Array, "*batch width"], own: dict[str, Any]) -> Float[Array, "*batch width"]:
    """The same, with scores taken from the input of the query projection: ``Q K_Pᵀ = X (W_Q K_Pᵀ) + b_Q K_Pᵀ``."""
    scores = jnp.einsum("...d,hdl->...hl", hidden, own["scores"].astype(hidden.dtype), preferred_element_type=jnp.float32)
    shift = jnp.expand_dims(own["shift"], tuple(range(scores.ndim - 2)))
    weights = (own[GATE][0] * jax.nn.softmax(scores + shift, axis=-1)).astype(hidden.dtype)
    out = jnp.einsum("...hl,hlc->...hc", weights, own["value"].astype(hidden.dtype))
    return out.reshape(*hidden.shape[:-1], -1)


adaption_prompt = AdaptionPrompt
