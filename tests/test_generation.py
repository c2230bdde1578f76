"""Generation as a task: rows of tokens, a loss on targets alone, perplexity as torch has it, runs and the command line."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import optax
import pytest
from test_train import bits, one_step, records
from tiny_text import make_decoder, make_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import jpeft
import jpeft.models
from jpeft.cli import main
from jpeft.data import Table
from jpeft.tasks import generation
from jpeft.tasks.cross_entropy import IGNORE, token_counts, token_losses
from jpeft.tasks.task import Decoding
from jpeft.training.config import TrainConfig
from jpeft.training.evaluate import Evaluator
from jpeft.training.progress import SilentReporter
from jpeft.training.run import load_run
from jpeft.training.train import prepare, train

ENDS = {"max_new_tokens": 4, "stop": (0,)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny decoder, pairs (some words -> their kind) and plain text, and a run on each that has learned something."""
    folder = tmp_path_factory.mktemp("world")
    make_decoder(folder / "model")
    rows = make_rows(120)
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"text": text, "target": f"some {kind}"}) + "\n" for text, kind in rows))
    (folder / "plain.txt").write_text("\n\n".join(f"{text} {kind}" for text, kind in rows) + "\n")
    assert main([*flags(folder, "pairs.jsonl", folder / "pairs"), "--target", "target", "--steps", "150", "--max-length", "12"]) == 0
    assert main([*flags(folder, "plain.txt", folder / "plain"), "--steps", "20", "--max-length", "16"]) == 0
    return folder


def flags(world, file, output):
    """Of a training run, but for its length."""
    learning = ["--learning-rate", "0.02", "--batch-size", "16", "--method", "lora", "rank=4", "--eval-every", "50"]
    where = ["--model", str(world / "model"), "--data", str(world / file), "--output", str(output), "--progress", "none"]
    return ["train", *where, "--task", "generation", *learning]


def config(world, **changes):
    """Of a short run on pairs."""
    same = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "target": "target", "task": "generation", "progress": "none"}
    return TrainConfig(**{**same, "output": "unused", "max_length": 12, "batch_size": 16, **changes})


def tokenizer(template="$A", **special):
    """Words a ... e as 2 ... 6; <s> 0 and </s> 1 where the template says."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<s>", "</s>", *"abcde"))}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>", "bos_token": "<s>", **special})


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["$A", "$A </s>"])  # an end that the template adds is no beginning
def test_pairs_predict_the_target_and_its_end_alone(template):
    table = Table(text=["a b", "c", "a b c d"], target=["d", "d e", "e e e e"])
    with pytest.warns(UserWarning, match=r"1 of 3 texts with .*max_length=5 .*: 1 lost the beginning of the text, 1 the end of the target"):
        arrays = generation.encode(table, tokenizer(template), labels=(), max_length=5, overlong="cut")
    assert arrays["input_ids"].tolist() == [[2, 3, 5, 1, 1], [4, 5, 6, 1, 1], [4, 5, 6, 6, 6]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    i = IGNORE
    assert arrays["label"].tolist() == [[i, 5, 1, i, i], [5, 6, 1, i, i], [i, 6, 6, 6, 6]]
    assert arrays["complete"].tolist() == [1, 1, 0]  # the last one lost "a b" and its end
    assert all(column.dtype == np.int32 for column in arrays.values())


def test_a_beginning_stands_before_every_text_and_is_not_predicted():
    begins = tokenizer("<s> $A")
    pairs = generation.encode(Table(text=["a"], target=["b"]), begins, labels=(), max_length=4)
    assert pairs["input_ids"].tolist() == [[0, 2, 3, 1]]
    assert pairs["label"].tolist() == [[IGNORE, 3, 1, IGNORE]]
    plain = generation.encode(Table(text=["a b", "c"]), begins, labels=(), max_length=4)
    assert plain["input_ids"].tolist() == [[0, 2, 3, 1], [0, 4, 1, 1]]
    assert plain["label"].tolist() == [[2, 3, 1, IGNORE], [4, 1, IGNORE, IGNORE]]


def test_plain_text_fills_rows_and_every_token_is_predicted_once():
    arrays = generation.encode(Table(text=["a b c", "d", "e e"]), tokenizer(), labels=(), max_length=4)
    assert arrays["input_ids"].tolist() == [[1, 2, 3, 4], [1, 5, 1, 6], [6, 1, 1, 1]]
    assert arrays["label"].tolist() == [[2, 3, 4, 1], [5, 1, 6, 6], [1, IGNORE, IGNORE, IGNORE]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert arrays.keys() == {"input_ids", "label", "attention_mask"}


def test_prompts_are_as_wide_as_the_longest():
    arrays = generation.encode(Table(text=["a b", "c"]), tokenizer("<s> $A </s>"), labels=None, max_length=9)
    assert arrays["input_ids"].tolist() == [[0, 2, 3], [0, 4, 1]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def encoded(text, target, max_length, overlong, template="<s> $A"):
    """`input_ids` and `complete` of one pair beside another that fits any row."""
    table = Table(text=["a", text], target=["b", target])
    arrays = generation.encode(table, tokenizer(template), labels=(), max_length=max_length, overlong=overlong)
    return arrays["input_ids"].tolist()[1:], arrays["complete"].tolist()[1:]


def test_rows_that_are_too_long():
    """A row fits if all but its last token do; BOS is never cut, and neither text nor target is lost."""
    table = Table(text=["a", "b c d e", "a b c d e"], target=["b", "b", "b"])
    long = r"2 of 3 texts with their targets are longer than max_length=4 tokens: rows 2, 3\. The longest, 'a b c d e'\.\.\., has 6"
    with pytest.raises(ValueError, match=long):
        generation.encode(table, tokenizer(), labels=(), max_length=4)
    assert generation.encode(table, tokenizer(), labels=(), max_length=6)["complete"].tolist() == [1, 1, 1]
    assert encoded("a b c", "d", 5, "error") == ([[0, 2, 3, 4, 5]], [1])
    assert encoded("a b c", "d", 4, "cut") == ([[0, 3, 4, 5]], [1])
    assert encoded("a b c", "d e", 4, "cut") == ([[0, 4, 5, 6]], [1])
    assert encoded("a b c", "d e d e", 4, "cut") == ([[0, 4, 5, 6]], [0])
    assert encoded("a b c", "d e d e", 4, "drop") == ([], [])
    assert encoded("a b c", "d e d e", 1, "cut", template="$A") == ([[4]], [0])
    with pytest.warns(UserWarning, match=r"train: 2 of 3 texts with their targets are .* and were dropped"):
        kept = generation.encode(table.named("train"), tokenizer(), labels=(), max_length=4, overlong="drop")
    assert kept["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="2 of 2 texts"):
        generation.encode(table.take([1, 2]), tokenizer(), labels=(), max_length=4, overlong="drop")
    with pytest.raises(ValueError, match=r"no end-of-text token: set one"):
        generation.encode(table, tokenizer(eos_token=None), labels=(), max_length=9)


def test_prompts_that_are_too_long():
    table = Table(text=["a", "b c d e", "a b c d e"])
    with pytest.raises(ValueError, match=r"1 of 3 texts are longer than max_length=4 tokens: row 3\."):
        generation.encode(table, tokenizer(), labels=None, max_length=4)
    with pytest.warns(UserWarning, match="2 of 3 texts are .* lost their beginning"):
        cut = generation.encode(table, tokenizer("<s> $A"), labels=None, max_length=4, overlong="cut")
    assert cut["input_ids"].tolist() == [[0, 2, 1, 1], [0, 4, 5, 6], [0, 4, 5, 6]]
    dropped = generation.encode(table, tokenizer(), labels=None, max_length=4, overlong="drop")
    assert dropped["complete"].tolist() == [1, 1, 0]
    answers = {"tokens": np.array([[2], [3], [4]]), "lengths": np.array([1, 1, 1]), "complete": dropped["complete"]}
    made = generation.Generation("drop").predictions(answers, (), tokenizer())
    assert made == [{"generated": "a"}, {"generated": "b"}, {"generated": None}]


# --- loss and metrics -------------------------------------------------------------------------------------------------


def test_losses_and_metrics_are_those_of_a_few_lines_of_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5)).astype(np.float32)
    label = np.array([[IGNORE, 1, 2, IGNORE], [4, 0, 3, 1], [IGNORE, IGNORE, IGNORE, 2]], np.int32)
    logits[2, 3, 2] = 4.0  # the last row is right at its only token, ...
    logits[0, 1, 1] = 4.0  # ... the first at one of its two
    logits[0, 2, 3] = 4.0
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = [sum(-log_p[i, t, label[i, t]] for t in range(4) if label[i, t] != IGNORE) for i in range(3)]

    batch = {"label": label}
    np.testing.assert_allclose(token_losses(jax.numpy.asarray(logits), batch), expected, rtol=1e-5)
    assert token_counts(batch).tolist() == [2, 4, 1]
    scores = jax.device_get(generation.scores(jax.numpy.asarray(logits), batch))
    found = generation.metrics(scores, {"complete": np.array([1, 1, 1])})
    assert found["loss"] == pytest.approx(sum(expected) / 7, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(expected) / 7), rel=1e-5)
    right = sum(int(logits[i, t].argmax() == label[i, t]) for i in range(3) for t in range(4) if label[i, t] != IGNORE)
    assert found["token_accuracy"] == pytest.approx(right / 7)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert generation.metrics(scores, {"complete": np.array([1, 1, 0])})["exact_match"] == 0
    assert "exact_match" not in generation.metrics(scores, {})


def torch_losses(folder, arrays):
    """Mean loss over all predicted tokens, and of the first 16 rows, by transformers' own model and shift."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    # The token after the last one, which is only predicted, is an input there.
    label = np.concatenate([np.full((len(arrays["label"]), 1), IGNORE), arrays["label"]], 1)
    ids = np.concatenate([arrays["input_ids"], np.zeros((len(label), 1), np.int64)], 1)
    mask = np.concatenate([arrays["attention_mask"], np.zeros((len(label), 1), np.int64)], 1)
    with torch.no_grad():
        return [
            float(model(torch.tensor(ids[:n]).long(), attention_mask=torch.tensor(mask[:n]), labels=torch.tensor(label[:n]).long()).loss)
            for n in (len(ids), 16)
        ]


@pytest.mark.parametrize("plain", [False, True])
def test_perplexity_and_step_loss_are_torchs(world, plain):
    """Token-weighted over the split and over the batch, whatever the rows of an evaluation batch and the micro-batches of a step."""
    changes = {"data": str(world / "plain.txt"), "target": None} if plain else {}
    setup = prepare(config(world, **changes))
    arrays = setup.splits["train"]
    whole, first = torch_losses(world / "model", arrays)
    forward = jpeft.wrap(setup.loaded.model.apply, setup.peft.method)
    metrics = Evaluator(forward, generation.Generation(), 7).metrics(setup.peft, arrays)
    assert metrics["loss"] == pytest.approx(whole, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)
    steps = [one_step(setup, accumulate, optax.sgd(1.0)) for accumulate in (1, 8)]
    for _, loss in steps:
        assert float(loss) == pytest.approx(first, rel=1e-5)
    for one, other in zip(*(jax.tree.leaves(adapter) for adapter, _ in steps), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_exact_match_is_what_greedy_generation_gives(world):
    """No token is generated for the metric; here every one is."""
    run = load_run(world / "pairs")
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    table = Table(text=[row["text"] for row in rows], target=[row["target"] for row in rows])
    evaluator = Evaluator(jpeft.wrap(run.loaded.model.apply, run.peft.method), generation.Generation(), 40)
    arrays = generation.encode(table, run.loaded.tokenizer, labels=(), max_length=12)
    prompts = generation.encode(table, run.loaded.tokenizer, labels=None, max_length=12)
    answers = evaluator.answers(run.peft, prompts, Decoding(**ENDS))
    wanted = [[*run.loaded.tokenizer(text)["input_ids"], 0] for text in table.target]
    made = [row[:length].tolist() for row, length in zip(answers["tokens"], answers["lengths"])]
    share = np.mean([one == other for one, other in zip(made, wanted, strict=True)])
    assert evaluator.metrics(run.peft, arrays)["exact_match"] == pytest.approx(share)
    assert 0.2 < share < 1  # it has learned something, but not all


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_keeps_the_lowest_perplexity(world):
    lines = records(world / "pairs")
    validation = [line["perplexity"] for line in lines if line["split"] == "validation"]
    result = json.loads((world / "pairs" / "result.json").read_text())
    assert result["best"] == min(validation) < validation[0]
    assert result["test"].keys() == {"loss", "perplexity", "token_accuracy", "exact_match"}
    plain = json.loads((world / "plain" / "result.json").read_text())
    assert plain["test"].keys() == {"loss", "perplexity", "token_accuracy"}


class Stop(SilentReporter):
    """Ends a run, as a crash would, at a step."""

    def update(self, step, loss, metric, rate):
        if step == 4:
            raise RuntimeError("crash")


def test_a_resumed_run_is_the_unbroken_one(world, tmp_path):
    make_decoder(tmp_path / "model", dropout=0.1)
    same = {"model": str(tmp_path / "model"), "steps": 6, "checkpoint_every": 3, "log_every": 1, "grad_accum": 2}
    broken = config(world, **same, output=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="crash"):
        train(broken, report=Stop())
    resumed = train(dataclasses.replace(broken, resume=True))
    unbroken = train(dataclasses.replace(broken, output=str(tmp_path / "unbroken")))
    assert bits(resumed.peft.adapter) == bits(unbroken.peft.adapter)
    assert records(tmp_path / "broken") == records(tmp_path / "unbroken")


# --- the command line -------------------------------------------------------------------------------------------------


def test_eval(world, capfd):
    for name in ("pairs", "plain"):
        capfd.readouterr()
        assert main(["eval", str(world / name)]) == 0
        head, row = capfd.readouterr().out.splitlines()
        expected = json.loads((world / name / "result.json").read_text())["test"]
        assert head.split() == ["split", *expected]
        # Batches of another size: the same to rounding.
        assert [float(value) for value in row.split()[1:]] == pytest.approx([*expected.values()], abs=2e-3)


def test_predict_continues_texts(world, tmp_path, capfd):
    texts = ["the old apple plum", "zinc here a iron seen now"]
    capfd.readouterr()
    assert main(["predict", str(world / "pairs"), "--text", *texts, "--max-new-tokens", "4"]) == 0
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["text"] for line in shown] == texts
    run = load_run(world / "pairs")
    for line in shown:  # each by itself, without padding
        ids = np.array([run.loaded.tokenizer(line["text"])["input_ids"]])
        made = jpeft.models.generate(run.loaded.model.apply, {"params": jpeft.merge(run.peft)}, ids, **ENDS)
        assert line["generated"] == run.loaded.tokenizer.decode(made.tokens[0, : int(made.lengths[0])], skip_special_tokens=True)
        assert line["generated"]

    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    again = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4"]
    assert main(["predict", str(world / "pairs"), *again]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == shown

    def drawn(*more):
        capfd.readouterr()
        assert main(["predict", str(world / "plain"), "--text", *["the"] * 5, "--batch-size", "2", *more]) == 0
        return [json.loads(line)["generated"] for line in capfd.readouterr().out.splitlines()]

    random = ["--seed", "1", "--temperature", "2.0", "--max-new-tokens", "6"]
    lines = drawn(*random)
    assert len(set(lines[::2])) > 1  # the same prompt at the same place of different batches
    assert drawn(*random) == lines


@pytest.mark.filterwarnings("always:.* of [0-9]+ texts:UserWarning")
def test_overlong_in_eval_and_predict(world, tmp_path, capfd):
    rows = [{"text": "the " * count, "target": "some fruit"} for count in (2, 20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capfd.readouterr()
    assert main(["eval", str(world / "pairs"), "--data", str(tmp_path / "in.jsonl")]) == 2
    assert "longer than max_length=12 tokens" in capfd.readouterr().err
    for overlong, said in (("cut", "were cut: 1 lost the beginning of the text, 0 the end of the target"), ("drop", "were dropped")):
        assert main(["eval", str(world / "pairs"), "--data", str(tmp_path / "in.jsonl"), "--overlong", overlong]) == 0
        assert said in capfd.readouterr().err
    again = ["predict", str(world / "pairs"), "--input", str(tmp_path / "in.jsonl"), "--max-new-tokens", "4", "--overlong"]
    capfd.readouterr()
    assert main([*again, "drop"]) == 0
    assert main([*again, "cut"]) == 0
    made = [json.loads(line)["generated"] for line in capfd.readouterr().out.splitlines()]
    assert made[1] is None
    assert None not in (made[0], made[2], made[3])


def test_merged_model_gives_the_same_logits(world, tmp_path):
    assert main(["merge", str(world / "pairs"), str(tmp_path / "merged")]) == 0
    merged, run = jpeft.models.load(tmp_path / "merged", task="causal-lm"), load_run(world / "pairs")
    ids = np.arange(12, dtype=np.int32)[None]
    expected = jpeft.wrap(run.loaded.model.apply, run.peft.method)(run.peft.variables, ids)
    np.testing.assert_allclose(merged.model.apply({"params": merged.params}, ids), expected, atol=1e-4)
    assert np.abs(run.loaded.model.apply({"params": run.loaded.params}, ids) - expected).max() > 1e-2


def test_summary(world, capfd):
    capfd.readouterr()
    assert main(["summary", str(world / "pairs")]) == 0
    of_run = capfd.readouterr().out
    arguments = ["--model", str(world / "model"), "--task", "generation", "--method", "lora", "rank=4"]
    assert main(["summary", *arguments]) == 0
    assert capfd.readouterr().out == of_run


def test_bad_input_leaves_nothing(world, tmp_path, fails):
    pairs = [*flags(world, "pairs.jsonl", tmp_path / "run"), "--steps", "1"]
    assert "no column 'answer'" in fails(*pairs, "--target", "answer")
    assert "120 of 120 texts" not in (said := fails(*pairs, "--target", "target", "--max-length", "3"))
    assert re.search(r"texts with their targets are longer than --max-length=3 tokens: .*pairs\.jsonl, rows 1, .* \(lines 1, ", said)
    assert "no use for --overlong='cut'" in fails(*pairs, "--overlong", "cut", "--task", "sequence-classification")
    assert "The task generation has no use for --pair='x'; it reads text, target" in fails(*pairs, "--pair", "x")
    assert "no use for --target='x'" in fails(*pairs, "--target", "x", "--task", "sequence-classification")
    assert "--max-length=33 is more than the model's 32" in fails(*pairs, "--target", "target", "--max-length", "33")
    for content, message in (("", "no rows"), ('{"text": "a", "target": " "}\n', "no text in column 'target' of row 1")):
        (tmp_path / "data.jsonl").write_text(content)
        assert message in fails(*pairs, "--data", tmp_path / "data.jsonl", "--target", "target")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_bad_predictions(world, fails):
    run = world / "pairs"
    assert "1 of 1 texts are longer than max_length=12 tokens: --text, row 1." in fails("predict", run, "--text", "a " * 13)
    assert "position" in fails("predict", run, "--text", "a " * 12, "--max-new-tokens", "40")
    assert "--temperature: only for tokens drawn at random, with --seed" in fails("predict", run, "--text", "a", "--temperature", "2")
