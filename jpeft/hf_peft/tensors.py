"""adapter_model.safetensors: its tensors under the names that HF PEFT gives them today."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np

from jpeft.extras import explained
from jpeft.hf_peft.config import WEIGHTS
from jpeft.models.checkpoints.foreign import PICKLES

# safetensors' names of the types that are read -> how they are read.
_FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
# Tensors of whole numbers: places of entries.
_PLACES = "_indices"
_WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")

# What stands in front of names: HF PEFT's own wrappers, and those of training on several devices and of compilation.
_PREFIXES = ("base_model.model.", "base_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")

# Before version 0.7 a target's own bias stood beside it. The name of the adapter is left out of files, but not by all who write them.
_BASE_LAYER = re.compile(r"\.base_layer\.(weight|bias)$")
_TO_SAVE = re.compile(r"\.modules_to_save(\.default)?\.(?=\w)")
_ADAPTER_NAME = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
_ORIGINAL = ".original_module."


class Tensors:
    """The tensors of an adapter.

    Attributes:
      file: The file.

    Raises:
      ValueError: if the file is missing, damaged, or no safetensors file.
    """

    def __init__(self, folder: Path, weights: str = WEIGHTS):
        self.file = folder / weights
        if not self.file.is_file():
            raise ValueError(f"{folder} holds no {weights}. {_what_else(folder)}")
        with explained():
            from safetensors import SafetensorError, safe_open
        try:
            self._open = safe_open(self.file, framework="numpy")  # maps the file; a tensor is read when it is asked for
            self.names = list(self._open.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.file} is damaged or not a safetensors file: {error}.") from error
        self._found: dict[str, str] = {}  # the name that was expected -> that in the file

    # --- names --------------------------------------------------------------------------------------------------------------------------

    def way(self, modules: Iterable[str], body: str) -> str:
        """What the names in the file lack or have too much, as `shifted` takes it: whatever fits most of the names.

        Args:
          modules: The modules of the model.
          body: Name of the module that holds the body of a model with a head, with a dot; empty for a body alone.
        """
        known = set(modules)
        heads = {name.split(".")[0] for name in known}
        fit = lambda name, way: any(prefix in known for prefix in _prefixes(shifted(plain(name), way)))
        ways = (
            ["", f"+{body}"] if body else ["", *(f"-{first}." for name in self.names if (first := plain(name).split(".")[0]) not in heads)]
        )
        return max(dict.fromkeys(ways), key=lambda way: sum(fit(name, way) for name in self.names))  # of equal ones the first

    def shapes(self, way: str) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by their names without a prefix."""
        return {shifted(plain(name), way): tuple(self._open.get_slice(name).get_shape()) for name in self.names}

    def match(self, expected: Iterable[str], way: str, aliases: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """Find the tensors that are expected.

        Args:
          expected: Their names, without a prefix.
          way: As `way` gives it.
          aliases: Expected names by other names that the file may have for them.

        Returns:
          The names in the file that are not among them.

        Raises:
          ValueError: if the file holds a tensor under two names, with different numbers.
        """
        wanted = set(expected)
        spare = []
        for name in self.names:
            if _ORIGINAL in name:  # of the base, as it was
                continue
            maybe = (aliases.get(each, each) for one in candidates(name) for each in (shifted(one, way), one))
            known = next((found for found in maybe if found in wanted), None)
            if known is None:
                spare.append(name)
            elif (other := self._found.setdefault(known, name)) != name and not np.array_equal(self.read_raw(other), self.read_raw(name)):
                raise ValueError(f"{self.file} holds '{known}' twice, as '{other}' and as '{name}', and they differ: remove the wrong one.")
        return spare

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def in_file(self, name: str) -> str:
        """The name in the file of a tensor that is `in` these."""
        return self._found[name]

    # --- tensors ------------------------------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is `in` these."""
        return tuple(self._open.get_slice(self._found[name]).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor that is `in` these: floats as float32, whole numbers as they are.

        Raises:
          ValueError: if it holds numbers that are not finite, or of a type that is not read.
        """
        return self.read_raw(self._found[name])

    def read_raw(self, name: str) -> np.ndarray:
        """A tensor by its name in the file; otherwise as `read`."""
        kind = self._open.get_slice(name).get_dtype()
        if kind in _WHOLE:
            if not name.endswith(_PLACES):
                raise ValueError(f"{self.file}: '{name:.200}' holds whole numbers of the type {kind}, and weights are no whole numbers.")
            return self._open.get_tensor(name)
        if kind not in _FLOATS:
            raise ValueError(f"{self.file}: '{name}' holds numbers of the type {kind}, which are no plain weights but quantised ones.")
        tensor = self._open.get_tensor(name)
        wide = tensor.astype(np.float32)
        if not np.isfinite(wide).all():
            raise ValueError(f"{self.file}: '{name}' holds numbers that are not finite (NaN or infinity): the training of it had failed.")
        return wide

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor by its name in the file."""
        return _FLOATS.get(self._open.get_slice(name).get_dtype(), np.dtype(np.float32))


def canonical(name: str) -> str:
    """A tensor's name without the wrappers of HF PEFT inside it.

    >>> canonical("a.query.base_layer.bias"), canonical("classifier.modules_to_save.default.weight"), canonical("q.lora_A.default.weight")
    ('a.query.bias', 'classifier.weight', 'q.lora_A.weight')
    """
    name = _WRAPPERS.sub(r"\1", name).replace("..", ".").lstrip(".")
    name = _TO_SAVE.sub(".", name)
    return _ADAPTER_NAME.sub("", _BASE_LAYER.sub(r".\1", name))


def candidates(name: str) -> Iterator[str]:
    """What a name in a file may mean: itself, and itself without any number of prefixes.

    >>> list(candidates("base_model.model.classifier.weight"))
    ['base_model.model.classifier.weight', 'classifier.weight', 'model.classifier.weight']
    """
    waiting, seen = [canonical(name)], set()
    while waiting:
        name = waiting.pop(0)
        if name not in seen:
            seen.add(name)
            yield name
            waiting += [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]


def plain(name: str) -> str:
    """A name in a file without all that stands in front of a module's name.

    >>> plain("base_model.model.base_model.model.model.layers.0.x"), plain("module.encoder.x")
    ('model.layers.0.x', 'encoder.x')
    """
    name = canonical(name)
    while (prefix := next((prefix for prefix in _PREFIXES if prefix != "base_model." and name.startswith(prefix)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


def shifted(name: str, way: str) -> str:
    """A name in a file that was written for the body alone ("+body."), or for a model with a head ("-body."), as the model has it.

    >>> shifted("encoder.x", "+bert."), shifted("bert.encoder.x", "-bert."), shifted("classifier.x", "-bert.")
    ('bert.encoder.x', 'encoder.x', 'classifier.x')
    """
    return way[1:] + name if way.startswith("+") else name.removeprefix(way[1:]) if way else name


def unshifted(name: str, way: str) -> str:
    """The inverse of `shifted`, for names in the body."""
    return name.removeprefix(way[1:]) if way.startswith("+") else way[1:] + name


def _prefixes(name: str) -> Iterator[str]:
    """The modules that a tensor of this name may belong to."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def check_tensors(tensors: Tensors, expected: Mapping[str, tuple[int, ...]], spare: Iterable[str], hint: str = "") -> None:
    """Compare the tensors with those that are expected.

    Args:
      tensors: After `Tensors.match`.
      expected: Their shapes.
      spare: Names in the file that are not expected.
      hint: What else to say.

    Raises:
      ValueError: listing what is missing, left over or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    wrong = [
        f"'{tensors.in_file(name)}' has shape {tensors.shape(name)}, {shape} is needed"
        for name, shape in expected.items()
        if name in tensors and tensors.shape(name) != tuple(shape)
    ]
    said = [f"{len(missing)} tensors are missing ({_few(missing)})"] if missing else []
    spare = list(spare)
    said += [f"{len(spare)} have no place in the model ({_few(spare)})"] if spare else []
    said += [f"{len(wrong)} have another shape ({'; '.join(wrong[:4])}{'; ...' if len(wrong) > 4 else ''})"] if wrong else []
    if said:
        raise ValueError(f"{tensors.file} does not fit its configuration and the model: {'; '.join(said)}.{hint}")


def _few(names: list[str]) -> str:
    return ", ".join(name if len(name) < 200 else f"{name[:200]}..." for name in names[:6]) + (", ..." if len(names) > 6 else "")


def _what_else(folder: Path) -> str:
    """What the folder has instead, and the way out."""
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is opened, so jpeft does not read it: open it where you trust it, "
            "in Python with peft, and write it anew by model.save_pretrained(OUT)."
        )
    if (folder / f"{WEIGHTS}.index.json").is_file() or list(folder.glob("adapter_model-*.safetensors")):
        return "Its weights are split over several files: write them as one, in Python with peft: model.save_pretrained(OUT)."
    return "It may have been copied without its weights."
