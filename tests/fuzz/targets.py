"""Which files are read by which operation, and what may follow from damage to them."""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from fuzz.folders import STEPS, World
from fuzz.watch import command
from jpeft.tasks.token_ids import check_token_ids

TEXTS = ("the old apple seen here", "lead and a new unknown pond")
# What no command needs in order to use a trained adapter: damage there must neither block nor change anything.
BESIDE = r"(metrics\.jsonl|curve\.png|result\.json|checkpoints(/.*)?)"

_OFTEN = ("--steps", str(STEPS), "--checkpoint-every", "1", "--log-every", "1")


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something that a user does.

    Attributes:
      name: What it is called in the table.
      run: Does it; its value is compared with that of undamaged input.
      writes: Regex of the paths that it may create or change.
      repairs: Regex of the paths that it may change even if it fails.
      ignores: Regex of the paths, below the damaged folder, that it must not need.
    """

    name: str
    run: Callable[[World], Any]
    writes: str = r"(?!)"
    repairs: str = r"(?!)"
    ignores: str = r"(?!)"


@dataclasses.dataclass(frozen=True)
class Target:
    """A folder, or some of its files, and what is done with it.

    Attributes:
      name: What it is called in the table.
      folder: The folder below the world; "." for files of the world itself.
      operations: What reads it.
      files: Regex of the paths below the folder that are damaged.
      partner: A like folder, to exchange files with.
      folder_suffices: Whether an error may name the folder instead of the file: a fingerprint of all weights cannot tell which file.
      plain: Whether the files themselves say what is right, as those of a pretrained model do.
    """

    name: str
    folder: str
    operations: tuple[Operation, ...]
    files: str = ".*"
    partner: str | None = None
    folder_suffices: bool = False
    plain: bool = False


# --- operations -------------------------------------------------------------------------------------------------------


def _command_on(name: str, run: str, *more: str, **about: Any) -> Operation:
    return Operation(name, lambda world: command(name, world.path / run, *more)(), ignores=BESIDE, **about)


def _merge(run: str) -> Operation:
    def operation(world: World) -> Any:
        out = world.path / "merged"
        command("merge", world.path / run, out)()
        return {str(file.relative_to(out)): digest(file.read_bytes()) for file in sorted(out.rglob("*")) if file.is_file()}

    return Operation("merge", operation, writes="merged(/.*)?", ignores=BESIDE)


def _flags(world: World, model: str, output: str, *more: str) -> list[str]:
    places = ["--model", str(world.path / model), "--data", str(world.path / "data.csv"), "--output", str(world.path / output)]
    return ["train", *places, "--max-length", "8", "--batch-size", "8", "--progress", "none", *more, "rank=2", "target=['query','value']"]


def _resume(world: World) -> Any:
    """The adapter of an interrupted run that is continued, and what its log speaks of. The losses in it nobody can check."""
    command(*_flags(world, "encoder", "unfinished", *_OFTEN, "--resume"))()
    lines = (world.path / "unfinished" / "metrics.jsonl").read_text().splitlines()
    log = [(record["step"], record["split"], "loss" in record) for record in map(json.loads, lines)]
    return adapter(world, "unfinished/adapter"), log


def _read_back(world: World) -> Any:
    """The result of a finished run, as `--resume` says it again."""
    return re.sub(r"in [\d.]+ s", "in SECONDS s", command(*_flags(world, "encoder", "run", *_OFTEN, "--resume"))())


def _train(world: World) -> Any:
    command(*_flags(world, "encoder", "new", "--steps", "1"))()
    # A changed weight of the base makes another adapter, which is loaded onto the whole base here only to read it.
    return adapter(world, "new/adapter", check_base=False)


def _load_adapter(name: str) -> Operation:
    return Operation("load", lambda world: adapter(world, name))


def adapter(world: World, name: str, **options: Any) -> Any:
    """The bits and the method of an adapter on disk."""
    peft = jpeft.load(world.path / name, world.params, **options)
    leaves = {path: digest(np.asarray(leaf).tobytes()) for path, leaf in jpeft.flatten(peft.adapter).items()}
    return leaves, json.dumps(peft.method.config(), sort_keys=True)


def _load_model(name: str, task: str) -> Operation:
    return Operation("load", lambda world: outputs(world.path / name, task))


def outputs(folder: Path, task: str) -> dict[str, Any]:
    """Tokens and logits of a model, and what it says of itself."""
    loaded = jpeft.models.load(folder, task=task)
    ids = tokens(loaded.tokenizer)
    check_token_ids({"input_ids": np.array(ids)}, loaded)  # as the trainer and every command do
    logits = _forward(loaded.model, loaded.params, np.asarray(ids, np.int32))
    reported = {name: tuple(sorted(getattr(loaded, name, ()))) for name in ("initialised", "unused")}
    return {"ids": ids, "logits": np.asarray(logits).tobytes(), "reported": reported}


def tokens(tokenizer: Any) -> list[list[int]]:
    """Ids of the texts, all of one length, as the trainer makes them."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    table = jpeft.data.Table(list(TEXTS))
    return jpeft.data.encode(table, tokenizer, labels=None, max_length=8)["input_ids"].tolist()


def _forward(model: Any, params: Any, ids: np.ndarray) -> Any:
    return _compiled(model, params, ids)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(model: Any, params: Any, ids: Any) -> Any:
    out = model.apply({"params": params}, ids)
    return getattr(out, "last_hidden_state", out)


def _load_tokenizer(name: str) -> Operation:
    def operation(world: World) -> Any:
        task = "encoder" if name in ("encoder", "words") else "causal-lm"
        return tokens(jpeft.models.load(world.path / name, task=task).tokenizer)

    return Operation("encode", operation)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


_PREDICT = _command_on("predict", "run", "--text", *TEXTS)
_WRITE = _command_on("predict", "writer", "--text", "the old apple", "--max-new-tokens", "3")
_RUN = (_PREDICT, _command_on("eval", "run"), _command_on("summary", "run"), _merge("run"))
_WRITTEN = "(checkpoints|metrics|adapter|curve|result).*"
# A result that cannot be read may be made again.
_READ_BACK = Operation(
    "read back", _read_back, writes=f"run/{_WRITTEN}", repairs=f"run/{_WRITTEN}", ignores=r"(metrics\.jsonl|curve\.png|checkpoints(/.*)?)"
)
_RESUME = Operation("resume", _resume, writes="unfinished/.*", repairs=f"unfinished/{_WRITTEN}", ignores=r"(metrics\.jsonl|curve\.png)")
_NEW = Operation("train", _train, writes="new(/.*)?")
TOKENIZER = r"(tokenizer.*|special_tokens_map\.json|vocab\.txt)"

TARGETS: tuple[Target, ...] = (
    Target("run", "run", (*_RUN, _READ_BACK), partner="other"),
    Target("unfinished run", "unfinished", (_RESUME,), partner="other"),
    Target("run of generation", "writer", (_WRITE,), partner="run"),
    Target("adapter", "adapter", (_load_adapter("adapter"),), partner="prompt"),
    Target("adapter of a prompt", "prompt", (_load_adapter("prompt"),), partner="adapter"),
    Target("base of a run", "encoder", (*_RUN, _RESUME), partner="words", folder_suffices=True),
    Target("base of generation", "decoder", (_WRITE,), partner="shards", folder_suffices=True),
    Target("data of a run", ".", (_command_on("eval", "run"),), files=r"data\.csv", partner="."),
    Target("model", "encoder", (_load_model("encoder", "encoder"), _NEW), partner="decoder", plain=True),
    Target("model, Llama", "decoder", (_load_model("decoder", "causal-lm"),), partner="encoder", plain=True),
    Target("model, shards", "shards", (_load_model("shards", "causal-lm"),), partner="decoder", plain=True),
    Target("tokenizer", "encoder", (_load_tokenizer("encoder"),), files=TOKENIZER, partner="decoder", plain=True),
    Target("tokenizer, BPE", "decoder", (_load_tokenizer("decoder"),), files=TOKENIZER, partner="encoder", plain=True),
    Target("tokenizer, vocab.txt", "words", (_load_tokenizer("words"),), files=TOKENIZER, partner="encoder", plain=True),
)


def group_of(path: str) -> str:
    """The kind of a file, for the table: the path without what is chance in it."""
    path = re.sub(r"checkpoints/\d+", "checkpoints/STEP", path)
    path = re.sub(r"/(ocdbt\.process_\d+|d|array_metadatas|arrays|progress|adapter/adapter)(/.*)?$", r"/\1/...", path)
    return re.sub(r"model-\d+-of-\d+", "model-N", re.sub(r"^adapter/(?!jpeft).+", "adapter/...", path))


def copy_out(world: World, to: Path) -> None:
    """Keep what a failed mutation left, to look at."""
    shutil.copytree(world.path, to, symlinks=True)
