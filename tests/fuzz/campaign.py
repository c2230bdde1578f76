"""Mutations of files, each of which can be repeated alone: number N of a seed is always the same one."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jpeft
from fuzz import mutations, reference, rows, tensor_files, values
from fuzz.folders import World
from fuzz.mutations import Damage, Unchanged
from fuzz.targets import TARGETS, TOKENIZER, Operation, Target, group_of
from fuzz.verdict import Verdict, judge
from fuzz.watch import Seen, watch

# A link or a folder in the place of a log may be refused, since nothing is written through the one, and the other is somebody's; and the
# file that was swapped with the log may be needed in its own place.
_DELIBERATE = ("linked", "dangling", "loop", "device", "folder", "swapped in place")


@dataclasses.dataclass(frozen=True)
class Case:
    """One mutation and what came of it."""

    number: int
    target: str
    group: str
    kind: str
    operation: str
    about: str
    verdict: Verdict


class Campaign:
    """Damages the folders of a world, one file at a time, and reads data and options that are wrong.

    Of five mutations three are of folders, one of data, one of options.

    Args:
      world: The folders.
      seed: Of all mutations.
      seconds: An operation that takes longer hangs.
    """

    def __init__(self, world: World, seed: int = 0, *, seconds: float = 60):
        self.world, self.seed, self.seconds = world, seed, seconds
        self._expected: dict[tuple[str, str], Seen] = {}
        self._dirty: set[str] = set()

    def run(self, number: int) -> Case:
        """Do one mutation, judge what comes of it, and undo it."""
        rng = np.random.default_rng([self.seed, number])
        area = number % 5
        if area == 3:
            return self._data(number, rng)
        if area == 4:
            return self._option(number, rng)
        return self._folder(number, TARGETS[(number // 5 * 3 + area) % len(TARGETS)], rng)

    def repeat(self, target_name: str, operation_name: str, name: str, kind: str, seed: int = 0) -> Case:
        """Damage one file in one way, and judge what comes of one operation."""
        target = next(target for target in TARGETS if target.name == target_name)
        operation = next(operation for operation in target.operations if operation.name == operation_name)
        expected = self.expected(target, operation)
        self._dirty = self._touched(target)
        path = self.world.path / target.folder / name
        about, names = self._damage_one(path, kind, target, np.random.default_rng(seed))
        return self._judged(-1, target, operation, expected, (name, kind, about, names))

    def _folder(self, number: int, target: Target, rng: np.random.Generator) -> Case:
        operation = target.operations[rng.integers(len(target.operations))]
        expected = self.expected(target, operation)
        return self._judged(number, target, operation, expected, self._damage(target, rng))

    def _judged(self, number: int, target: Target, operation: Operation, expected: Seen, damage: tuple[str, str, str, list[str]]) -> Case:
        """Do the operation on what was damaged, judge what comes of it, and undo the damage."""
        path, kind, about, names = damage
        # That tensors are not those of the model is said of the folder: its files belong together.
        if target.folder_suffices or path.endswith((".safetensors", ".safetensors.index.json")):
            names = [*names, ""]
        # Several folders have a config.json: the one that is meant has to be in the message.
        folder = re.escape(str(self.world.path / target.folder))
        patterns = [rf"(?=.*{folder}).*{re.escape(name)}" for name in names]
        if re.fullmatch(TOKENIZER, path):  # whole, but not the model's: its files belong together too
            patterns.append(rf"(?=.*{folder}).*\btokenizer\b")
        if path.endswith(".safetensors") and operation.name == "train":  # a weight of 1e38 is a weight like others until then
            patterns.append("training diverged")
        seen = watch(lambda: operation.run(self.world), self.world.path, seconds=self.seconds)
        verdict = judge(
            seen,
            expected.value,
            patterns,
            usual=expected.output,
            writes=operation.writes,
            # A run that diverges has begun, and its folder stays.
            repairs=operation.writes if "training diverged" in (seen.error or "") else operation.repairs,
            needless=bool(re.fullmatch(operation.ignores, path)) and kind not in _DELIBERATE,
            explain=lambda value: reference.explain(self.world, target, operation, value, expected.value),
        )
        self._restore(seen)
        return Case(number, target.name, group_of(path), kind, operation.name, f"{target.folder}/{path}: {about}", verdict)

    def _data(self, number: int, rng: np.random.Generator) -> Case:
        folder = self.world.path / "rows"
        folder.mkdir(exist_ok=True)
        while True:
            suffix, kind = str(rng.choice(list(rows.WRITERS))), str(rng.choice(rows.KINDS))
            try:
                about, verdict = rows.judge_damage(folder, suffix, kind, rng, self.world.path)
            except Unchanged:
                continue
            self.world.restore(["rows"])
            return Case(number, "data", f"*{suffix}", kind, "read", about, verdict)

    def _option(self, number: int, rng: np.random.Generator) -> Case:
        method = str(rng.choice(list(jpeft.methods())))
        option = str(rng.choice(list(jpeft.methods()[method].factory.__signature__.parameters)))
        kind = str(rng.choice(list(values.VALUES)))
        name = str(rng.choice(list(values.VALUES[kind])))
        given = values.VALUES[kind][name]
        if rng.random() < 0.3:
            how, verdict = "summary", values.judge_on_the_command_line(method, option, given, self.world.path / "encoder", self.world.path)
        else:
            how, verdict = "apply", values.judge_option(method, option, given, self.world.params, self.world.apply, self.world.path)
        return Case(number, "option", method, kind, how, f"{option}: {name} ({given!r:.60})", verdict)

    def _restore(self, seen: Seen | None = None) -> None:
        """Undo the damage of a mutation and what the operation wrote."""
        self._dirty |= {changed.split("/")[0] for changed in (seen.changed if seen else ())}
        self.world.restore(self._dirty)
        self._dirty = set()

    def expected(self, target: Target, operation: Operation) -> Seen:
        """What is seen of the operation on undamaged input."""
        key = (target.name, operation.name)
        if key not in self._expected:
            seen = watch(lambda: operation.run(self.world), self.world.path, seconds=600)
            self._restore(seen)
            if seen.kind:
                raise RuntimeError(f"{operation.name} fails on the whole {target.name}: {seen.trace}")
            self._expected[key] = seen
        return self._expected[key]

    def _damage(self, target: Target, rng: np.random.Generator) -> tuple[str, str, str, list[str]]:
        """Damage a file or folder; its path, the kind of damage, the damage in words, and what an error has to name."""
        folder = self.world.path / target.folder
        self._dirty = self._touched(target)
        groups: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")) if target.folder != "." else sorted(folder.glob("*")):
            name = str(path.relative_to(folder))
            if re.fullmatch(target.files, name):
                groups.setdefault(group_of(name), []).append(path)
        while True:
            group = groups[sorted(groups)[rng.integers(len(groups))]]
            path = group[rng.integers(len(group))]
            kind = str(rng.choice(list(self._kinds(path, target))))
            try:
                about, names = self._damage_one(path, kind, target, rng)
            except Unchanged:
                self._restore()
                self._dirty = self._touched(target)
                continue
            return str(path.relative_to(folder)), kind, about, names

    def _damage_one(self, path: Path, kind: str, target: Target, rng: np.random.Generator) -> tuple[str, list[str]]:
        """Damage a file or folder in one way; the damage in words, and what an error has to name."""
        before = {file.name for file in path.rglob("*")} if path.is_dir() else set()
        about = self._kinds(path, target)[kind](path, rng)
        after = {file.name for file in path.rglob("*")} if path.is_dir() else set()
        # What vanished from a folder or came to it may be named instead of the folder.
        return about, [path.name, *self._other_names(about), *(before ^ after)]

    @staticmethod
    def _touched(target: Target) -> set[str]:
        """The entries of the world in which damage to a target may be."""
        if target.folder == ".":
            return {"data.csv", "pairs.jsonl", "elsewhere"}
        return {target.folder, "elsewhere", *([target.partner] if target.partner else [])}

    def _kinds(self, path: Path, target: Target) -> dict[str, Damage]:
        if path.is_dir():
            return mutations.FOLDERS
        return {**mutations.BYTES, **mutations.PLACES, **mutations.JSON, **self._swaps(path, target)} | (
            tensor_files.TENSORS if path.suffix == ".safetensors" else {}
        )

    def _swaps(self, path: Path, target: Target) -> dict[str, Damage]:
        def swap(path: Path, rng: np.random.Generator, others: Callable[[], list[Path]]) -> str:
            if not (found := others()):
                raise Unchanged
            return mutations.swap(path, found[rng.integers(len(found))])

        beside = lambda: sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
        partner = self.world.path / (target.partner or target.folder)
        like = lambda: sorted(
            other for other in partner.rglob("*") if other.is_file() and other.suffix == path.suffix and other.name == path.name
        )
        return {
            "swapped in place": lambda path, rng: swap(path, rng, beside),
            "swapped with another": lambda path, rng: swap(path, rng, like),
        }

    @staticmethod
    def _other_names(about: str) -> list[str]:
        return [found[1]] if (found := re.fullmatch(r"swapped with .*/(.*)", about)) else []
