"""Multitask prompt tuning: one prompt that tasks share, and a factor of low rank for each task."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft import tree
from jpeft.additive.prompts.prompt_site import PromptSite
from jpeft.additive.prompts.prompt_tuning import PromptTuning
from jpeft.core.index import as_leaf
from jpeft.core.method import FREEZE, TRAIN, with_head
from jpeft.core.options import Count, NotNegative
from jpeft.core.statistics import Prompt, SourcePrompt, find
from jpeft.tree.adapters import ADDED

# Leaves that are added to the word embedding. TASK is not trained: the task of each example, whole numbers in float32.
SHARED, COLS, ROWS, TASK = "shared", "cols", "rows", "task"


class MultitaskPromptTuning(PromptTuning):
    r"""Multitask prompt tuning: example i of task t reads ``[P_t; E(x_i)]`` with ``P_t = S ∘ (C_t R_t)``.

    S has l trained rows that all tasks share; C_t [l, r] and R_t [r, d] are trained for each task. ∘ multiplies entry by entry. Which task
    an example belongs to is given by `jpeft.assign`, an index for each example of a batch; a single task needs none.

    In the paper the tasks of a first training share S. A new task then begins from S and the mean of the factors, with
    ``tasks=1, stats=jpeft.stats.source_prompt(peft)``.

    Args:
      tasks: How many tasks T share the prompt.
      rank: r.
      std: Standard deviation of the noise with which C and R begin. Of C and R the first factor begins at 1 and the others at 0, each plus
        noise, so every P_t begins near S.
      length: As in `jpeft.prompt_tuning`.
      init: Where S starts, as P in `jpeft.prompt_tuning`: "vocab", "uniform", "tokens" or "labels".
      sample: As in `jpeft.prompt_tuning`.
      tokens: As in `jpeft.prompt_tuning`.
      labels: As in `jpeft.prompt_tuning`.
      template: As in `jpeft.prompt_tuning`.
      edges: As in `jpeft.prompt_tuning`.
      causal: As in `jpeft.prompt_tuning`.
      embedding: As in `jpeft.prompt_tuning`.
      body: As in `jpeft.prompt_tuning`.
      head: Task head to train along: "auto", a regex, or None.

    Returns:
      A `Method` without a merge. ``jpeft.apply(..., stats=given)`` starts from a source: `jpeft.stats.source_prompt`, which gives the mean
      of its tasks or one of them, or another prompt, from which S starts.

    Raises:
      ValueError: as `jpeft.prompt_tuning`; from `init`, if a given source has other shapes; from the first call, if there are several tasks
        and no example has been assigned to one.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = {"wte": {"embedding": jnp.ones((50, 8))}}
    >>> peft = jpeft.apply(params, method="multitask_prompt_tuning", length=3, tasks=2)
    >>> jax.tree.map(jnp.shape, peft.adapter["wte"]["+"])
    {'cols': (2, 3, 1), 'rows': (2, 1, 8), 'shared': (3, 8)}

    Reference: Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, 2023, https://arxiv.org/abs/2303.02861.

    HF PEFT has the same method and calls the leaves `prompt_embeddings`, `prefix_task_cols` and `prefix_task_rows`. It begins both factors
    at N(0, 0.02²), so that every prompt begins as nearly nothing. Neither has the distillation that the paper adds to the first training:
    give the teachers' outputs to your own loss.
    """

    tasks: Count = 1
    rank: Count = 1
    std: NotNegative = 0.02

    name = "multitask_prompt_tuning"
    summary = "a prompt that tasks share, times a factor of low rank for each task"

    def init(self, key: jax.Array, params: tree.Params, *, stats: Any = None) -> tree.Adapter:
        """S and the factors at their start, and the task head."""
        site = self.site(params)
        given = find(stats, SourcePrompt) or find(stats, Prompt)
        shared = self._start(tree.key_for(key, _path(site, SHARED)), params, site, stats) if given is None else given.rows
        leaves = {SHARED: _checked("rows", shared, (site.rows, site.width))}
        for name, shape, first in ((COLS, (site.rows, self.rank), (..., 0)), (ROWS, (self.rank, site.width), (slice(None), 0))):
            factor = getattr(given, f"task_{name}", None)
            if factor is None:
                noise = self.std * jax.random.normal(tree.key_for(key, _path(site, name)), (self.tasks, *shape))
                leaves[name] = noise.at[first].add(1.0)
            else:
                leaves[name] = jnp.repeat(_checked(f"task_{name}", factor, shape)[None], self.tasks, axis=0)
        return with_head({_path(site, name): leaf for name, leaf in leaves.items()}, params, self.head)

    def prompt(self, adapter: tree.Adapter, site: PromptSite) -> Float[Array, "*examples rows width"]:
        """P of the only task; or of the task of each example.

        Raises:
          ValueError: for several tasks, if no examples are assigned to them.
        """
        leaves = tree.flatten(adapter)
        shared, cols, rows = (leaves[_path(site, name)] for name in (SHARED, COLS, ROWS))
        task = leaves.get(_path(site, TASK))
        if task is None:
            if len(cols) > 1:
                raise ValueError(
                    f"multitask_prompt_tuning: there are {len(cols)} tasks, and it is not said which of them each example belongs to: "
                    "peft = jpeft.assign(peft, task_ids), with an index for each example of the batch."
                )
            return shared * (cols[0] @ rows[0])
        # An index that no task has gives NaN, where it is not known before the call.
        task = jax.lax.stop_gradient(task).astype(jnp.int32)
        at = lambda leaf: jnp.take(leaf, task, axis=0, mode="fill", fill_value=jnp.nan)
        return shared[None] * (at(cols) @ at(rows))  # [examples, rows, width]

    # --- the task of each example -----------------------------------------------------------------------------------------------------

    @property
    def takes_index(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there are several tasks."""
        return self.tasks > 1

    def assign(self, adapter: tree.Adapter, index: Any) -> tree.Adapter:
        """The adapter with the task of each example."""
        if not self.takes_index:
            return super().assign(adapter, index)
        leaf = as_leaf(index, low=0, high=self.tasks - 1, what=f"tasks 0 to {self.tasks - 1}")
        leaves = tree.flatten(adapter)
        (shared,) = [path for path in leaves if path.endswith(f"/{ADDED}/{SHARED}")]
        return tree.unflatten(leaves | {f"{shared.removesuffix(SHARED)}{TASK}": leaf})

    def assigned(self, adapter: tree.Adapter) -> jax.Array | None:
        """The task of each example; None before `assign`."""
        return next((leaf for path, leaf in tree.flatten(adapter).items() if _is_task(path)), None)

    def labels(self, adapter: tree.Adapter) -> Any:
        """All is trained but the tasks of the examples."""
        return tree.unflatten({path: FREEZE if _is_task(path) else TRAIN for path in tree.flatten(adapter)})

    def expected(self, params: tree.Params, adapter: tree.Adapter) -> tree.Adapter:
        """As for every prompt; and the tasks of examples, if the adapter was saved with some."""
        given = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.flatten(adapter).items() if _is_task(path)}
        return tree.unflatten(tree.flatten(super().expected(params, adapter)) | given)


def _is_task(path: str) -> bool:
    return path.endswith(f"/{ADDED}/{TASK}")


def _checked(name: str, leaf: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    if leaf.shape != shape:
        raise ValueError(f"multitask_prompt_tuning: the given source has {name} of shape {leaf.shape} where {shape} is needed.")
    return jnp.array(leaf, jnp.float32)


def _path(site: PromptSite, name: str) -> str:
    return f"{site.module}/{ADDED}/{name}"


multitask_prompt_tuning = MultitaskPromptTuning
