"""TrainableTokens: train the embeddings of some tokens."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpeft import layouts, tree
from jpeft.core.layer import Layer
from jpeft.core.method import Method, with_head
from jpeft.core.options import CountOrZero, Names, NotEmpty, Pattern
from jpeft.tree.head import not_head
from jpeft.tree.select import select

# Leaves beside a table [tokens, width], and beside a kernel or a bias whose last axis is the tokens. Both are [count, ...].
ROWS, COLUMNS = "rows", "columns"


class TrainableTokens(Method):
    r"""TrainableTokens: ``E[t] = E_0[t] + d_t`` for the chosen tokens t, with d_t trained; all other rows of E stay bit for bit.

    It is the way to teach a model new tokens: `jpeft.models.load(..., add_tokens=[...])` gives them rows, this method trains these rows.
    In a chain it goes with any other method.

    Nothing of the size of the table is held or computed: a lookup adds d_t where the text holds t, and a tied head adds its product with
    d_t to the scores of t. Where the head of a language model is not tied, its columns of the same tokens are trained too.

    Args:
      tokens: The token ids, each once.
      embedding: The table of word embeddings: a role (`jpeft.layouts`), a regex, or names. Several tables of one vocabulary may be meant.
      output: Kernels and biases whose last axis is the vocabulary: "auto" for those of the model's head that scores words, if it is not
        tied; a regex, names, or None.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` that merges by adding the differences.

    Raises:
      ValueError: for a token that is given twice; from `init`, without tokens, or for a token that the table has no row for.

    >>> import jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> jpeft.apply(params, method="trainable_tokens", tokens=[48, 49]).adapter["wte"]["embedding"]["rows"].shape
    (2, 8)

    HF PEFT has the same method, TrainableTokens, and as ``trainable_token_indices`` of LoRA. It stores the new rows, not the differences,
    so that weight decay pulls them to zero. It copies the whole table at every step, and trains an untied head only if it is named too.
    """

    tokens: Annotated[Sequence[CountOrZero], NotEmpty()] | None = None
    embedding: Names = "@embedding"
    output: Names | None = "auto"
    head: Pattern | None = "auto"

    name = "trainable_tokens"
    family = "selective"
    summary = "train the embeddings of some tokens, such as added ones"
    learning_rate = 5e-3
    why_no_merge = None
    begins_within = 0.0

    def check(self) -> None:
        """Refuse a token that is given twice."""
        tokens = self.tokens or ()
        if twice := [token for token in dict.fromkeys(tokens) if list(tokens).count(token) > 1]:
            raise ValueError(f"trainable_tokens: tokens= has {twice[0]} more than once.")

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """Zero differences for each token in each table, and the head."""
        del key, stats
        base = tree.flatten(params)
        count = len(self._tokens)
        leaves: dict[str, Any] = {}
        for path in self._tables(params):
            self._check_rows(path, base[path].shape[0])
            leaves[f"{path}/{ROWS}"] = _zeros((count, *base[path].shape[1:]), base[path])
        for path in self._outputs(params, {base[path].shape[0] for path in self._tables(params)}):
            self._check_rows(path, base[path].shape[-1])
            leaves[f"{path}/{COLUMNS}"] = _zeros((count, *base[path].shape[:-1]), base[path])
        return with_head(leaves, params, self.head)

    def bind(self, params: tree.Params, adapter: tree.Adapter, *, rng: jax.Array | None = None) -> tree.Params:
        """Put the differences beside their tables; write those of biases, which are small, into the biases."""
        del rng
        base = tree.flatten(params)
        _, beside, _ = tree.split(params, adapter)
        biases = {path: self._changed(base[path], leaves) for path, leaves in beside.items() if base[path].ndim == 1}
        others = {path: leaf for path, leaf in tree.flatten(adapter).items() if path.rpartition("/")[0] not in biases}
        return tree.graft(tree.replace(params, biases) if biases else params, tree.unflatten(others))

    def call(self, layer: Layer, inputs: tuple[Any, ...], leaves: dict[str, Any], rng: jax.Array | None) -> Any:
        """Add the differences to what the layer gives; a layer of an unknown class runs on its new table."""
        del rng
        ((name, own),) = leaves.items()
        linear = layer.linear if layer.linear is not None and layer.linear.name == name else None
        if ROWS in own and linear is not None:
            return self._score(layer, inputs, own[ROWS]) if layer.method == "attend" else self._look_up(layer, inputs, own[ROWS])
        if COLUMNS in own and linear is not None and linear.apply_columns is not None:
            y = layer(*inputs)
            return self._add_scores(y, linear.apply_columns(inputs[0], own[COLUMNS].T))
        return layer.run(self._new_params(layer.params, leaves), *inputs)

    def merge(self, params: tree.Params, adapter: tree.Adapter) -> tree.Params:
        """The tables with the differences added."""
        return tree.merge_leaves(params, adapter, lambda path, leaf, leaves: self._changed(leaf, leaves))

    def merge_layer(self, layer: Layer, leaves: dict[str, Any]) -> Mapping[str, Any] | None:
        """The layer's parameters with the differences added."""
        params = layer.merged(layer.params)
        return None if params is None else self._new_params(params, leaves)

    def count_changed(self, params: tree.Params, adapter: tree.Adapter) -> int:
        """The size of the adapter: one difference for each number that changes, and the head."""
        del params
        return tree.size(adapter)

    # --- what is chosen -----------------------------------------------------------------------------------------------------------------

    @property
    def _tokens(self) -> Int[np.ndarray, " count"]:
        if self.tokens is None:
            raise ValueError("trainable_tokens needs the ids of the tokens to train: tokens=[30522, 30523].")
        return np.asarray(self.tokens, np.int32)

    def _tables(self, params: tree.Params) -> list[str]:
        tables = {path: leaf for path, leaf in not_head(params, self.head).items() if len(leaf.shape) == 2}
        return select(tables, self.embedding, option="embedding", params=params)

    def _outputs(self, params: tree.Params, vocabularies: set[int]) -> list[str]:
        """The leaves of the head that scores words whose last axis is the vocabulary."""
        if self.output is None:
            return []
        flat = not_head(params, self.head)
        if self.output != "auto":
            return select(flat, self.output, option="output", params=params)
        of_head = layouts.find(params, "@lm_head", required=False)
        return [path for path in of_head if path in flat and flat[path].shape[-1:] in {(size,) for size in vocabularies}]

    def _check_rows(self, path: str, count: int) -> None:
        if (last := int(self._tokens.max())) >= count:
            raise ValueError(
                f"trainable_tokens: there is no token {last}: '{path}' has {count}. Give it a row first: jpeft.models.load(..., "
                "add_tokens=[...]), on the command line --add-tokens."
            )

    # --- what is computed ---------------------------------------------------------------------------------------------------------------

    def _look_up(self, layer: Layer, inputs: tuple[Any, ...], rows: Float[Array, "count width"]) -> Float[Array, "... width"]:
        ids, words, count = inputs[0], layer(*inputs), len(rows)
        order = np.argsort(self._tokens)
        ascending = jnp.asarray(self._tokens[order])
        at = jnp.minimum(jnp.searchsorted(ascending, ids.astype(jnp.int32)), count - 1)
        is_token = ascending[at] == ids
        # The index `count` is out of range and gives zeros, so that the other words send no gradient to any row.
        place = jnp.where(is_token, jnp.asarray(order, jnp.int32)[at], count)
        changes = jnp.take(rows, place, axis=0, mode="fill", fill_value=0)  # [..., width]
        return jnp.where(is_token[..., None], (words.astype(rows.dtype) + changes).astype(words.dtype), words)

    def _score(self, layer: Layer, inputs: tuple[Any, ...], rows: Float[Array, "count width"]) -> Float[Array, "... vocabulary"]:
        y = layer(*inputs)
        return self._add_scores(y, inputs[0].astype(y.dtype) @ rows.T.astype(y.dtype))

    def _add_scores(self, y: Float[Array, "... vocabulary"], more: Float[Array, "... count"]) -> Float[Array, "... vocabulary"]:
        return y.at[..., jnp.asarray(self._tokens)].add(more.astype(y.dtype), unique_indices=True)

    def _new_params(self, params: Mapping[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
        return {**params, **{name: self._changed(params[name], own) for name, own in leaves.items()}}

    def _changed(self, leaf: Float[Array, "..."], leaves: Mapping[str, Any]) -> Float[Array, "..."]:
        """A table, kernel or bias with its differences added, in its own dtype; the sum is taken in the wider one and rounded once."""
        at, last = jnp.asarray(self._tokens), COLUMNS in leaves
        differences = jnp.moveaxis(leaves[COLUMNS], 0, -1) if last else leaves[ROWS]
        where = (..., at) if last else at
        return leaf.at[where].set((leaf[where].astype(differences.dtype) + differences).astype(leaf.dtype), unique_indices=True)


def _zeros(shape: tuple[int, ...], like: Any) -> Float[Array, "..."]:
    return jnp.zeros(shape, jnp.promote_types(like.dtype, jnp.float32))


trainable_tokens = TrainableTokens
