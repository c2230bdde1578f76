"""Numbers that are not finite are errors that say where they come from: never a label, a metric, a text, or JSON that nobody can read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import gpt2
from tiny_text import make_base, make_decoder

import jpeft
from jpeft import data
from jpeft.checkpoint.files import write_json
from jpeft.cli import main
from jpeft.models import GPT2LMHeadModel, generate, load
from jpeft.tasks.cloze import Cloze
from jpeft.tasks.task import Decoding, find_task
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.finite import check_adapter, check_metrics, report_losses
from jpeft.training.run_folder import RunFolder
from jpeft.training.train import train
from jpeft.tree.finite import not_finite


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), train=12, test=4)


def spoilt(params, value, path="embeddings"):
    """The parameters with one number of the first leaf of that name exchanged."""
    found = next(name for name in jpeft.flatten(params) if path in name)
    leaves = jpeft.flatten(params)
    return jpeft.unflatten(leaves | {found: jnp.asarray(leaves[found]).reshape(-1).at[0].set(value).reshape(leaves[found].shape)})


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_eval_and_predict_name_the_row_and_the_culprit(base, where):
    loaded = load(base["model"], labels=("fruit", "metal", "water"))
    peft = jpeft.apply(loaded.params, method="bitfit")
    if where == "adapter":
        peft = peft.replace(adapter=spoilt(peft.adapter, np.nan, "classifier"))
    else:
        peft = peft.replace(params=spoilt(peft.params, np.inf, "query/kernel"))
    task, table = find_task("sequence-classification"), data.read(f"{base['data']}/test.csv")
    evaluator = Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, 3, loaded.labels)
    arrays = task.encode_for(loaded, table, labels=loaded.labels, max_length=8)
    says = {"adapter": "The adapter holds such numbers, in 'classifier/bias'", "base": "The base model holds such numbers, in 'bert/enc"}
    for call in (lambda: evaluator.metrics(peft, arrays), lambda: evaluator.answers(peft, arrays, Decoding())):
        with pytest.raises(ValueError, match=f"row 1 and 3 others are not finite numbers. {says[where]}"):
            call()


def test_a_whole_number_as_answer_still_tells(base):
    """The most likely tag of NaN is a number."""
    loaded = load(base["model"], task="token-classification", labels=("O", "X"))
    params = spoilt(loaded.params, np.nan, "classifier/bias")
    task, peft = find_task("token-classification"), jpeft.apply(params, method="freeze", top=0)
    arrays = task.encode_for(loaded, data.Table(["apple pear"]), labels=None, max_length=8)
    with pytest.raises(ValueError, match="outputs for row 1 are not finite"):
        Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, 1).answers(peft, arrays, Decoding())


@pytest.mark.parametrize("options", [{}, {"beams": 2, "stop": 3}, {"key": jax.random.key(0)}], ids=["greedy", "beams", "sampled"])
def test_generation_refuses_what_is_not_finite(options):
    model = GPT2LMHeadModel(gpt2().config)
    ids = jnp.array([[3, 5], [4, 6]])
    params = model.init(jax.random.key(0), ids)["params"]
    assert np.isfinite(generate(model.apply, {"params": params}, ids, max_new_tokens=3, **options).scores).all()
    # The token 6 has an embedding of NaN; as the embedding is the head, too, all logits are then NaN.
    params["transformer"]["wpe"]["embedding"] = params["transformer"]["wpe"]["embedding"].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="outputs for prompt 1 are not finite"):  # only the third new token needs position 3
        generate(model.apply, {"params": params}, ids, max_new_tokens=3, **options)
    jitted = jax.jit(lambda ids: generate(model.apply, {"params": params}, ids, max_new_tokens=3, **options).scores)
    assert np.isnan(jitted(ids)).all()


def test_generation_names_a_prompt_with_an_unknown_token():
    model = GPT2LMHeadModel(gpt2().config)
    variables = model.init(jax.random.key(0), jnp.ones((1, 2), int))
    with pytest.raises(ValueError, match="prompt 2 .* a token that the model has no embedding for"):
        generate(model.apply, variables, np.array([[3, 5], [4, 99]]), max_new_tokens=2)


def test_cloze_refuses_what_is_not_finite():
    logits = jnp.zeros((2, 1, 5)).at[1].set(jnp.nan)
    words = Cloze("{text} {mask}", {"a": ["x"], "b": ["y"]})
    object.__setattr__(words, "word_ids", lambda tokenizer: ((1,), (2,)))
    arrays = {"input_ids": np.zeros((2, 1), np.int32), "gap": np.zeros(2, np.int32)}
    with pytest.raises(ValueError, match="scores for text 2 are not finite"):
        words.classify(lambda variables, input_ids: variables, logits, None, arrays, batch_size=2)
    object.__setattr__(words, "word_ids", lambda tokenizer: ((1,), (5,)))
    with pytest.raises(ValueError, match="A word has the token 5, and the model scores 5"):
        words.classify(lambda variables, input_ids: variables, logits, None, arrays, batch_size=2)


def test_the_last_update_is_looked_at(base, tmp_path, capsys):
    """The losses do not show it: each is of the adapter before its update."""
    config = TrainConfig(**base, output=str(tmp_path / "run"), steps=1, batch_size=4, learning_rate=1e38, clip=None, weight_decay=10.0)
    with pytest.raises(ValueError, match="not finite after step 1, .*: training diverged"):
        train(config)
    folder = RunFolder(tmp_path / "run")
    assert not folder.result.exists()
    assert not folder.adapter.exists()
    assert main(["predict", str(tmp_path / "run"), "--text", "apple"]) == 2
    assert "error: The run in" in capsys.readouterr().err


def test_reports():
    peft = jpeft.apply({"dense": {"kernel": jnp.ones((2, 2))}}, method="lora", rank=1)
    check_adapter(peft, 3, 0.1)
    with pytest.raises(ValueError, match="after step 3, in 'dense/kernel/a'"):
        check_adapter(peft.replace(adapter=spoilt(peft.adapter, np.inf, "kernel/a")), 3, 0.1)
    report_losses([1.0, 2.0], 4, 0.1, peft)
    with pytest.raises(ValueError, match="The loss is inf at step 5: training diverged"):
        report_losses([1.0, np.inf], 4, 0.1, peft)
    damaged = peft.replace(params=spoilt(peft.params, np.nan, "kernel"))
    with pytest.raises(ValueError, match="The loss is nan at step 1. The base model holds such numbers, in 'dense/kernel'"):
        report_losses([np.nan], 1, 0.1, damaged)
    with pytest.raises(ValueError, match="The metric loss is inf"):
        check_metrics({"accuracy": 1.0, "loss": np.inf})
    assert not_finite({"a": np.ones(2), "b": jnp.array([1]), "c": np.array([np.nan]), "d": jnp.array(-jnp.inf)}) == ["c", "d"]


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path):
    folder = RunFolder(tmp_path)
    for write in (lambda: folder.append({"loss": np.nan}), lambda: write_json(tmp_path / "x.json", [np.inf])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()
    folder.append({"loss": 1.0})
    assert json.loads(folder.metrics.read_text()) == {"loss": 1.0}


def test_a_decoder_that_is_not_finite_writes_no_text(tmp_path):
    folder = make_decoder(tmp_path / "model")
    loaded = load(folder, task="causal-lm")
    peft = jpeft.apply(spoilt(loaded.params, np.nan, "ln_f/bias"), method="lora", rank=1)
    task = find_task("generation")
    arrays = task.encode_for(loaded, data.Table(["apple pear", "iron"]), labels=None, max_length=8)
    evaluator = Evaluator(jpeft.wrap(loaded.model.apply, peft.method), task, 2)
    with pytest.raises(ValueError, match="row 1 and 1 others .* The base model holds such numbers, in 'transformer/ln_f/bias'"):
        evaluator.answers(peft, arrays, Decoding(max_new_tokens=2))
