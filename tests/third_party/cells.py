"""A cell of the table: one method on one model."""

import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

import jpeft
from third_party import of_flax, of_others, of_transformers
from third_party.built import Built, Maker

METHODS: dict[str, jpeft.Method] = {
    "lora": jpeft.lora(rank=2),
    "lora, factored": jpeft.lora(rank=2, view="factored"),
    "dora": jpeft.dora(rank=2),
    "ia3": jpeft.ia3(),
    "bitfit": jpeft.bitfit(),
    "freeze": jpeft.freeze(top=1),
    "far": jpeft.far(),
    "fish_mask": jpeft.fish_mask(sparsity=0.1),
    "diff_pruning": jpeft.diff_pruning(sparsity=0.1),
    "adapter": jpeft.adapter(size=4, activation="gelu"),
    "pfeiffer": jpeft.pfeiffer(size=4, activation="gelu"),
    "parallel_adapter": jpeft.parallel_adapter(size=4, activation="gelu"),
    "compacter": jpeft.compacter(size=4),
    "trainable_tokens": jpeft.trainable_tokens(tokens=(3, 7, 11)),
    "prompt_tuning": jpeft.prompt_tuning(length=2),
    "hard_prompt": jpeft.hard_prompt(tokens=(3, 7)),
    "p_tuning": jpeft.p_tuning(template=(("start", 2),), hidden=3),
    "prefix_tuning": jpeft.prefix_tuning(length=2, mlp=None),
}
# These two replace leaves, whatever the layers: a few models are enough for what takes longest to compile.
SLOW, THERE = ("fish_mask", "diff_pruning"), ("linen attention", "nnx attention", "GPT-2", "gemma")
GROUPS: dict[str, dict[str, Maker]] = {"flax": of_flax.MODELS, "transformers": of_transformers.MODELS, "others": of_others.MODELS}
MODELS = {name: make for models in GROUPS.values() for name, make in models.items()}


class Cell(NamedTuple):
    """What became of one.

    Attributes:
      model: Its model.
      method: Its method.
      outcome: "ok", "refused", or "BAD".
      text: The reason, or the problems.
      seconds: What it took.
    """

    model: str
    method: str
    outcome: str
    text: str
    seconds: float


@functools.cache
def built(model: str) -> Built:
    """A model, made once in a process."""
    return MODELS[model]()


def run(model: str, method: str) -> Cell:
    """Apply a method and check it. Only a ValueError is a refusal."""
    begun = time.perf_counter()
    outcome, text = _outcome(model, METHODS[method])
    return Cell(model, method, outcome, text, round(time.perf_counter() - begun, 1))


def _outcome(model: str, method: jpeft.Method) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            of = built(model)
            if of.target and method.family == "reparameterized" and hasattr(method, "target"):
                method = method.replace(target=of.target)
            uses = {"stats": _scores(of.params)} if method.requires_stats else {}
            uses |= {"model": of.model, "inputs": of.inputs} if of.asks else {}
            report = jpeft.check(of.model, jpeft.apply(of.params, method, **uses), *of.inputs, **of.keywords)
        except ValueError as error:
            return "refused", " ".join(str(error).split())
        except Exception as error:
            return "BAD", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    dear = [finding.text for finding in report.findings if finding.what == "warning" and "full fine-tuning" in finding.text]
    return ("ok", " ".join(dear)) if report.ok else ("BAD", " ".join(report.problems))


def _scores(params: Any) -> Any:
    """Made-up Fisher information."""
    params = jpeft.apply(params, "lora", target=".*", head=None).params if not isinstance(params, dict) else params
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [jax.random.uniform(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)])


def main(models: list[str], methods: list[str]) -> Iterator[Cell]:
    """Run the cells of some models, or of all models of a group."""
    for name in models:
        for model in GROUPS.get(name, (name,)):
            for method in methods or METHODS:
                if methods or method not in SLOW or model in THERE:
                    yield run(model, method)


if __name__ == "__main__":
    # Compiles in a third of the time; slower programs do not matter at this size.
    jax.config.update("jax_disable_most_optimizations", True)
    for each in main(sys.argv[1].split("|"), sys.argv[2].split("|") if sys.argv[2:] else []):
        print(json.dumps(each), flush=True)
