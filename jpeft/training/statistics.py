"""Statistics of model and data that some methods start from, one maker for each kind, all in one table."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jpeft import data, models, stats
from jpeft.core.method import Method
from jpeft.core.statistics import Fisher, InputMoments, KeyValues, LabelTokens, Movement, Statistic
from jpeft.distributed import gather_to_host
from jpeft.tasks.task import Arrays, Batch, Task
from jpeft.tasks.token_ids import check_token_ids
from jpeft.training.build import method_options
from jpeft.training.config import TrainConfig
from jpeft.training.keys import keys
from jpeft.tree.paths import Params, trained_copy

# As in `Method.requires_stats`.
Kinds = tuple[type[Statistic], ...]

# Learning rate of full fine-tuning, which is smaller than that of any method: all weights move.
FULL_LEARNING_RATE = 2e-4
# Share of the run's steps that measure movement, unless the configuration gives a number of steps.
MOVEMENT_SHARE = 0.1
# Examples that Fisher information is averaged over.
FISHER_EXAMPLES = 1024
# Examples whose activations the moments of inputs are summed over.
INPUT_EXAMPLES = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """What statistics are made of.

    Attributes:
      config: Seed and order of the examples, number of steps.
      task: The loss.
      labels: Names of the classes.
      arrays: The training split.
      loaded: The pretrained model.
      forward: `(params, inputs) -> outputs` of the model as it stands, with its adapter if it has one, without dropout.
      params: The base.
      method: What the statistics are for.
    """

    config: TrainConfig
    task: Task
    labels: tuple[str, ...]
    arrays: Arrays
    loaded: models.Loaded
    forward: Callable[[Params, dict[str, Any]], Any]
    params: Params
    method: Method | None = None

    def losses(self, params: Params, batch: Batch) -> Array:
        """Return the negative log-likelihood of each row."""
        return self.task.losses(self.forward(params, self.task.loss_inputs(batch)), batch)


def make_fisher(source: Source) -> Fisher:
    """Return the empirical Fisher information over the first examples of the training order."""
    examples = len(next(iter(source.arrays.values())))
    ds = data.batches(source.arrays, source.config.batch_size, seed=keys(source.config.seed).data)
    return stats.fisher(source.losses, source.params, iter(ds), num_samples=min(FISHER_EXAMPLES, examples))


def make_movement(source: Source) -> Movement:
    """Return how far each parameter moves in a short full fine-tuning of the base on the training data.

    The fine-tuning uses Adam at a constant learning rate, without dropout. It is a function of seed and data, as all of a run is.
    """
    config, task = source.config, source.task
    ds = data.batches(source.arrays, config.batch_size, seed=keys(config.seed).data)
    tx = optax.adam(FULL_LEARNING_RATE)

    def loss(params: Params, batch: Batch) -> Array:
        return source.losses(params, batch).sum() / task.counts(batch).sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: PyTree, batch: Batch) -> tuple[Params, PyTree]:
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    # A copy, because the step overwrites its arguments; in float32, like whatever is trained.
    params = jax.tree.map(trained_copy, source.params)
    opt_state = jax.jit(tx.init)(params)
    for index in range(movement_steps(config, source.arrays)):
        params, opt_state = step(params, opt_state, ds[index])
    return stats.movement(source.params, params)


def movement_steps(config: TrainConfig, arrays: Arrays) -> int:
    """Return the number of steps of full fine-tuning that measure movement."""
    return config.movement_steps or max(1, round(MOVEMENT_SHARE * count_steps(config, arrays)))


def make_key_values(source: Source) -> KeyValues:
    """Return the keys and values of the text in the method's option `tokens`."""
    tokens = method_options(source.config, source.loaded.tokenizer)["tokens"]
    check_token_ids({"input_ids": np.array([tokens])}, source.loaded)
    return jax.jit(functools.partial(stats.key_values, source.loaded.model))(source.params, jnp.array([tokens]))


def make_input_moments(source: Source) -> InputMoments:
    """Return the moments of the kernels' inputs over the first examples of the training order, padding left out."""
    config, arrays = source.config, source.arrays
    parts = [part for _, part in source.method.parts] or [source.method] if source.method else []
    count = min(INPUT_EXAMPLES, len(next(iter(arrays.values()))))
    ds = data.batches(arrays, config.batch_size, seed=keys(config.seed).data)
    batches = [source.task.loss_inputs(batch) for batch in itertools.islice(iter(ds), -(-count // config.batch_size))]
    run = functools.partial(source.loaded.model.apply, deterministic=True)
    found = [stats.input_moments(run, source.params, batches, method=part) for part in parts if InputMoments in part.requires_stats]
    return InputMoments({path: moments for each in found for path, moments in each.values.items()})


def make_label_tokens(source: Source) -> LabelTokens:
    """Return the token ids of each label's name."""
    tokenizer = source.loaded.tokenizer
    return LabelTokens(tuple(tuple(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in source.labels))


MAKERS: dict[type[Statistic], Callable[[Source], Statistic]] = {
    Fisher: make_fisher,
    Movement: make_movement,
    InputMoments: make_input_moments,
    KeyValues: make_key_values,
    LabelTokens: make_label_tokens,
}


def check_statistics(kinds: Kinds, what: str) -> None:
    """Raise an error for kinds of statistics that the trainer cannot make.

    Args:
      kinds: `Method.requires_stats` or `Stage.requires_stats`.
      what: The method or stage, for the message.

    Raises:
      ValueError: naming the kind.
    """
    unknown = [kind.__name__ for kind in kinds if kind not in MAKERS]
    if unknown:
        made = ", ".join(kind.__name__ for kind in MAKERS)
        raise ValueError(f"{what} requires the statistics {unknown[0]}, which the trainer cannot make; it makes {made}.")


def make_statistics(kinds: Kinds, source: Source) -> list[Statistic] | None:
    """Make statistics of each kind, as `jpeft.apply` and `jpeft.advance` take them; None if there are none to make.

    On several processes the arrays are whole in each of them, because methods may choose on the host what they train.
    """
    return [gather_to_host(MAKERS[kind](source)) for kind in kinds] or None


def count_steps(config: TrainConfig, arrays: Arrays) -> int:
    """Return the number of optimizer steps that the configuration asks for."""
    return config.steps or config.epochs * data.steps_per_epoch(arrays, config.batch_size)
