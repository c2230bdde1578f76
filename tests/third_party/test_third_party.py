"""The part of `make third-party` that runs with the other tests: flax's own layers, and a model of transformers."""

import pytest

from third_party import environment
from third_party.__main__ import cells_of
from third_party.cells import METHODS, MODELS, run

ROLES, BIASES, NO_CORE = "no parameter of the model has this role", "no bias parameters", "needs a model with parameterless modules there"
FAST = {
    ("linen attention", "lora"): "",
    ("linen attention", "adapter"): "",
    ("linen attention", "prompt_tuning"): "",
    ("linen SelfAttention", "dora"): "",
    ("linen SelfAttention", "adapter"): ROLES,
    ("linen LSTM", "bitfit"): "",
    ("linen GRU", "lora"): "",
    ("nnx attention", "lora"): "",
    ("nnx attention", "pfeiffer"): "",
    ("nnx attention", "ia3"): "",
    ("nnx attention", "prefix_tuning"): NO_CORE,
    ("nnx GRU", "bitfit"): "",
}


@pytest.mark.parametrize(("model", "method"), FAST, ids=lambda name: name.replace(" ", "-"))
def test_layers_of_flax(model, method):
    cell = run(model, method)
    reason = FAST[model, method]
    assert (cell.outcome, reason in cell.text) == ("refused" if reason else "ok", True), cell.text


@pytest.mark.slow
def test_a_model_of_transformers():
    folder = environment.make("transformers")  # the last version with Flax models: from PyPI, once, beside jpeft's own
    cells = cells_of("GPT-2", folder, ("lora", "bitfit", "prompt_tuning", "adapter"))
    outcomes = {cell.method: cell.outcome for cell in cells}
    # Its last kernel is transposed, which names and shapes cannot tell.
    assert outcomes == {"lora": "ok", "bitfit": "ok", "prompt_tuning": "ok", "adapter": "refused"}, cells


def test_the_table_knows_its_cells():
    assert {model for model, _ in FAST} <= MODELS.keys()
    assert {method for _, method in FAST} <= METHODS.keys()
