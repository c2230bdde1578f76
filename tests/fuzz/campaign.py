"""Mutations of files, each of which can be repeated alone: number N of a seed is always the same one."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutations, reference, tensor_files
from fuzz.folders import World
from fuzz.mutations import Damage, Unchanged
from fuzz.targets import TARGETS, Operation, Target, group_of
from fuzz.verdict import Verdict, judge
from fuzz.watch import watch


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
    """Damages the folders of a world, one file at a time.

    Args:
      world: The folders.
      seed: Of all mutations.
      seconds: An operation that takes longer hangs.
      kinds: Regex of the kinds of mutation that are tried.
    """

    def __init__(self, world: World, seed: int = 0, *, seconds: float = 60, kinds: str = ".*"):
        self.world, self.seed, self.seconds, self.kinds = world, seed, seconds, kinds
        self._expected: dict[tuple[str, str], Any] = {}

    def run(self, number: int) -> Case:
        """Do one mutation, judge what comes of it, and undo it."""
        target = TARGETS[number % len(TARGETS)]
        rng = np.random.default_rng([self.seed, number])
        operation = target.operations[rng.integers(len(target.operations))]
        expected = self.expected(target, operation)
        self.world.restore()
        path, kind, about, names = self._damage(target, rng)
        seen = watch(lambda: operation.run(self.world), self.world.path, seconds=self.seconds)
        verdict = judge(
            seen,
            expected,
            [*names, str(self.world.path / target.folder)] if target.folder_suffices else names,
            writes=operation.writes,
            repairs=operation.repairs,
            needless=bool(re.fullmatch(operation.ignores, path)),
            explain=lambda value: reference.explain(self.world, target, operation, value, expected),
        )
        group = group_of(path)
        return Case(number, target.name, group, kind, operation.name, f"{target.folder}/{path}: {about}", verdict)

    def expected(self, target: Target, operation: Operation) -> Any:
        """What the operation gives on undamaged input."""
        key = (target.name, operation.name)
        if key not in self._expected:
            self.world.restore()
            seen = watch(lambda: operation.run(self.world), self.world.path, seconds=600)
            if seen.kind:
                raise RuntimeError(f"{operation.name} fails on the whole {target.name}: {seen.trace}")
            self._expected[key] = seen.value
        return self._expected[key]

    def _damage(self, target: Target, rng: np.random.Generator) -> tuple[str, str, str, list[str]]:
        """Damage a file or folder; its path, the kind of damage, the damage in words, and what an error has to name."""
        folder = self.world.path / target.folder
        groups: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")) if target.folder != "." else sorted(folder.glob("*")):
            name = str(path.relative_to(folder))
            if re.fullmatch(target.files, name):
                groups.setdefault(group_of(name), []).append(path)
        while True:
            group = groups[sorted(groups)[rng.integers(len(groups))]]
            path = group[rng.integers(len(group))]
            kinds = self._kinds(path, target)
            allowed = [kind for kind in kinds if re.fullmatch(self.kinds, kind)]
            if not allowed:
                continue
            kind = allowed[rng.integers(len(allowed))]
            before = {file.name for file in path.rglob("*")} if path.is_dir() else set()
            try:
                about = kinds[kind](path, rng)
            except Unchanged:
                self.world.restore()
                continue
            after = {file.name for file in path.rglob("*")} if path.is_dir() else set()
            # What vanished from a folder or came to it may be named instead of the folder.
            return str(path.relative_to(folder)), kind, about, [path.name, *self._other_names(about), *(before ^ after)]

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
        like = lambda: sorted(other for other in partner.rglob("*") if other.is_file() and other.suffix == path.suffix and other.name == path.name)
        return {
            "swapped in place": lambda path, rng: swap(path, rng, beside),
            "swapped with another": lambda path, rng: swap(path, rng, like),
        }

    @staticmethod
    def _other_names(about: str) -> list[str]:
        return [found[1]] if (found := re.fullmatch(r"swapped with .*/(.*)", about)) else []
