"""What methods expect of a model, in one place: the promises that every family keeps, and `check_model`, which checks them.

A method finds most layers by the names of their parameters. Some methods also wrap modules that have no parameters, or change what a module
is called with. They rely on these promises.

1. **The attention core.** Softmax attention proper is a module without parameters that is named ``core`` and is a sibling of the key
   projection. It is called as ``core(query, key, value, mask, ...)``, by position. Query, key and value are [batch, length, heads, width of
   a head], so heads are on axis -2; key and value may have fewer heads. The mask is a description with the methods `with_prefix` and
   `dense`, as `jpeft.models.common.visible.Visible`, or boolean, [batch or 1, 1, queries or 1, keys]. The core accepts keys, values and a
   mask that are longer than the text. *Prefix-tuning and P-tuning v2 put their keys in front here.*
   `AttentionCore` is such a module.
2. **The positions.** A body, the module that is given the token ids, has a module without parameters that is named ``positions``. It
   returns a tuple with the fields `position_ids` and `offset` and the method `_replace`. Everything that depends on positions (tables,
   rotations, the check of the table's length) uses this result. *A prefix of l keys adds l to both.* `TokenPositions` is such a tuple.
3. **The word embedding.** It is one `nn.Embed`, with the path that the role `embedding` says, called with the token ids through `look_up`:
   an id without a row gives NaN (`jpeft.models.common.lookup`). *Prompts answer ids beyond the vocabulary here, so no other module may
   check the range of ids.*
4. **The body.** One module stands between all heads and everything else. It is called with the token ids first, and with `attention_mask`,
   `token_type_ids` or `position_ids`, all [batch, length], under these names. Its outputs are [batch, length, width]. *Prompts lengthen the
   inputs and cut the outputs.*
5. **The loss.** A model that generates and is called with `labels=`, [batch, length], returns a `TokenLoss` of that shape in place of
   logits, and never holds the logits of the whole batch (`jpeft.models.common.token_loss`). *The task `generation` trains and scores so.*
6. **The cache.** A model that generates makes a cache when it is called with `cache_length=` and ``mutable=["cache"]``. The cache is in the
   collection ``cache`` of all later calls and in no other call. `logits_at` gives the index of the one token of each row to score.
7. **The blocks.** Block i of a stack is the module ``<stack>/<i>``; with ``config.scan`` its parameters are stacked on axis 0 under
   ``<stack>``. Every block of a stack has the same parameters.
8. **The roles.** Every role that all transformers have matches a module, and every parameter in a block has a role.

>>> from jpeft.models import BertConfig, BertModel
>>> from jpeft.models.families import family_of
>>> check_model(BertModel(BertConfig(num_hidden_layers=1)), family_of("bert"))
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.models.common.family import Family, Roles
from jpeft.models.common.token_loss import TokenLoss
from jpeft.tree.paths import flatten

CORE = "core"
POSITIONS = "positions"

# The roles of the layers inside a block, and those that every family must fill.
_BLOCK_ROLES = ("attention_in", "attention_out", "ffn_in", "ffn_out", "norms")
_REQUIRED_ROLES = ("embedding", *_BLOCK_ROLES)


def check_model(model: nn.Module, family: Family) -> None:
    """Check that a model keeps the promises of this module. Nothing is computed: the model is only traced.

    Args:
      model: one of the family's models, with a body of at least one block.
      family: its description.

    Raises:
      ValueError: with a list of all broken promises.
    """
    (_, ids), *others = family.example_inputs(model.config).items()
    watch = _Watch()
    with nn.intercept_methods(watch):
        variables = jax.eval_shape(model.init, jax.random.key(0), ids, **dict(others))
    leaves = flatten(variables["params"])
    broken = [
        *watch.broken,
        *(f"No module named '{name}' ran." for name in (CORE, POSITIONS) if name not in watch.seen),
        *_check_embedding(model, family.roles, leaves),
        *_check_blocks(model, family, leaves),
    ]
    if family.task_model(model).generates:
        broken += _check_loss(model, variables, ids) + _check_cache(model, variables, ids)
    if broken:
        listed = "\n".join(f"- {line}" for line in broken)
        raise ValueError(f"{type(model).__name__} breaks promises of jpeft.models.common.contract:\n{listed}")


class _Watch:
    """An interceptor that checks every call of a module named ``core`` or ``positions``."""

    def __init__(self):
        self.seen: set[str] = set()
        self.broken: list[str] = []

    def __call__(self, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], context: nn.module.InterceptorContext) -> Any:
        module, name = context.module, context.module.name
        if context.method_name != "__call__" or name not in (CORE, POSITIONS):
            return call(*args, **kwargs)
        self.seen.add(name)
        output = call(*args, **kwargs)
        if name == CORE:
            self.broken += _check_core(args, kwargs, call)
        elif missing := [field for field in ("position_ids", "offset", "_replace") if not hasattr(output, field)]:
            self.broken.append(f"The result of '{POSITIONS}' lacks {', '.join(missing)}.")
        if module.variables.get("params"):
            self.broken.append(f"The module '{name}' has parameters.")
        return output


def _check_core(args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Any) -> list[str]:
    """Return what is wrong with a call of an attention core; run the core once more, with one more key in front."""
    if len(args) < 4:
        return [f"'{CORE}' was given {len(args)} arguments by position; query, key, value and mask must be."]
    query, key, value, given, *rest = args
    described = hasattr(given, "with_prefix")
    mask = given.dense(query.shape[1], key.shape[1]) if described else given
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}, mask {mask.shape}"
    if not query.ndim == key.ndim == value.ndim == mask.ndim == 4 or query.shape[-2] % key.shape[-2] or key.shape[:3] != value.shape[:3]:
        return [f"'{CORE}' must be given [batch, length, heads, width of a head] and a mask of four axes, and was given {shapes}."]
    if mask.shape[-1] != key.shape[1] or mask.dtype != jnp.bool_:
        return [f"The mask of '{CORE}' must be boolean and as long as the keys: {shapes}, {mask.dtype}."]
    # Put one key in front of the others, visible to all queries, as a prefix of length 1 does.
    front = lambda x, axis: jnp.concatenate([jnp.ones_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis)), x], axis)
    try:
        longer = call(query, front(key, 1), front(value, 1), given.with_prefix(1) if described else front(mask, 3), *rest, **kwargs)
    except (TypeError, ValueError) as error:
        return [f"'{CORE}' does not accept one more key: {error}"]
    if longer.shape[:3] != query.shape[:3]:
        return [f"'{CORE}' with one more key returns {longer.shape} for {shapes}."]
    return []


def _check_embedding(model: nn.Module, roles: Roles, leaves: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the word embedding."""
    tables = [path for path in leaves if path.endswith("/embedding") and roles.matches("embedding", path)]
    if len(tables) != 1:
        return [f"The role embedding={roles.embedding!r} must match one table, and matches {tables or 'none'}."]
    rows = leaves[tables[0]].shape[0]
    return [] if rows == model.config.vocab_size else [f"'{tables[0]}' has {rows} rows for {model.config.vocab_size} words."]


def _check_blocks(model: nn.Module, family: Family, leaves: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the stacks of blocks and the roles of their parameters."""
    roles = family.roles
    broken = [f"No module plays the role {role}." for role in _REQUIRED_ROLES if not any(roles.matches(role, path) for path in leaves)]
    for stack in family.stacks:
        depths = {path: depth for path in leaves if (depth := stack.find(path.split("/")[:-1])) is not None}
        count = getattr(model.config, stack.num_layers)
        if not depths:
            broken.append(f"No parameter is in the stack '{stack.path}'.")
        elif model.config.scan:
            broken += [f"'{path}' is not stacked {count} times on axis 0." for path in depths if leaves[path].shape[:1] != (count,)]
        elif (found := {path.split("/")[depth] for path, depth in depths.items()}) != {str(i) for i in range(count)}:
            broken.append(f"The stack '{stack.path}' has the blocks {sorted(found)}; {stack.num_layers} is {count}.")
        # A parameter without a role is invisible to methods, and is split over a mesh by the default rule.
        roleless = [path for path in depths if not any(roles.matches(role, path) for role in _BLOCK_ROLES)]
        kinds = sorted({re.sub(r"/\d+/", "/*/", path) for path in roleless})
        broken += [f"'{path}' is in a block and plays none of the roles {', '.join(_BLOCK_ROLES)}." for path in kinds]
    return broken


def _check_loss(model: nn.Module, variables: Mapping[str, Any], ids: Any) -> list[str]:
    """Return what is wrong with the loss of a model that is given labels."""
    shape = tuple(ids.shape)
    try:
        out = jax.eval_shape(lambda variables, ids: model.apply(variables, ids, labels=ids), variables, ids)
    except TypeError as error:
        return [f"The model does not take labels=: {error}"]
    found = out if isinstance(out, TokenLoss) else None
    return [] if found is not None and found.loss.shape == found.correct.shape == shape else [f"With labels= the model returns {out}."]


def _check_cache(model: nn.Module, variables: Mapping[str, Any], ids: Any) -> list[str]:
    """Return what is wrong with the cache: run a prompt and one more token."""
    if "cache" in variables:
        return ["The model makes a cache without being asked for one with cache_length=."]

    def run(params: Any, ids: jax.Array) -> Any:
        index = jnp.zeros(ids.shape[0], jnp.int32)
        options: dict[str, Any] = {"cache_length": ids.shape[1] + 1, "logits_at": index, "mutable": ["cache"]}
        logits, cache = model.apply({"params": params}, ids, **options)
        more, _ = model.apply({"params": params, **cache}, ids[:, :1], mutable=["cache"])
        return logits, more

    want = (ids.shape[0], 1, model.config.vocab_size)
    got = [logits.shape for logits in jax.eval_shape(run, variables["params"], ids)]
    return [f"Logits of one token have the shape {shape}, not {want}." for shape in got if shape != want]
