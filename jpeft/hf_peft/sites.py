"""Which torch module is which parameter: names, the place in a stack of layers, transposition.

HF PEFT names its tensors by the modules of the torch model. For the models of jpeft these follow from the names of a checkpoint's tensors
(`jpeft.models.checkpoints.layout`); for any other model the caller gives them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jpeft import layouts, tree
from jpeft.layouts import layer_axes
from jpeft.models import families
from jpeft.models.checkpoints.layout import checkpoint_layout
from jpeft.reparameterized.matrix_form import MatrixForm
from jpeft.tree.kernels import KernelAxes, axes_of, axes_rules
from jpeft.tree.paths import Path

Names = Callable[[str], str | None] | Mapping[str, str] | Sequence[tuple[str, str]]

LINEAR, CONV1D, CONV, EMBEDDING, EXPERTS, OTHER = "linear", "conv1d", "conv", "embedding", "experts", "other"
ANY_LAYER = "*"  # in a torch name: the number of a stacked layer


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter of one torch module.

    Attributes:
      name: Of the tensor in torch: "bert.encoder.layer.0.attention.self.query.weight".
      path: Of the parameter here.
      index: Its place in the stack of layers; None where layers are not stacked.
      form: The parameter, with the stack, as a matrix; None for a vector.
      kind: "linear", whose weight is (outputs, inputs) in torch; "conv1d", GPT-2's, whose weight is (inputs, outputs); "conv"; "embedding";
        "experts", stacked kernels that are one parameter in torch; "other".
      shape: Of the torch tensor.
    """

    name: str
    path: Path
    index: int | None
    form: MatrixForm | None
    kind: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The torch module. Of experts, which are one parameter among others of their module, it is the parameter."""
        return self.name if self.kind == EXPERTS else self.name.rpartition(".")[0]

    @property
    def inputs(self) -> int:
        """Inputs of the kernel; rows of an embedding."""
        assert self.form is not None
        return self.form.sizes[0]

    @property
    def outputs(self) -> int:
        """Outputs of the kernel; columns of an embedding."""
        assert self.form is not None
        return self.form.sizes[1]

    def to_torch(self, leaf: Any) -> np.ndarray:
        """The torch tensor in a leaf that is this parameter or replaces it."""
        array = np.asarray(leaf)
        if self.form is None or self.index is None:
            array = array if self.index is None else array[self.index]
        else:
            array = np.take(array, self.index, self.form.axes.stack[0])
        if self.form is None:
            return np.ascontiguousarray(array.reshape(self.shape))
        matrix = np.asarray(self._one.to_matrix(array))
        if self.kind == CONV:  # [*window, channels, width] -> [width, channels, *window]
            return np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))
        return np.ascontiguousarray(matrix.swapaxes(-1, -2) if self.kind in (LINEAR, EXPERTS) else matrix)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """A torch tensor as the parameter, without the stack; the inverse of `to_torch`."""
        if self.form is None:
            shape = self._vector_shape
            return tensor.reshape(shape)
        if self.kind == CONV:
            return np.moveaxis(tensor, (0, 1), (-1, -2))
        matrix = tensor.swapaxes(-1, -2) if self.kind in (LINEAR, EXPERTS) else tensor
        return np.asarray(self._one.from_matrix(matrix))

    @property
    def _one(self) -> MatrixForm:
        """The form of the kernel without the stack."""
        assert self.form is not None
        if self.index is None:
            return self.form
        axes = self.form.axes.without_stack(1)
        assert axes is not None
        at = self.form.axes.stack[0]
        return MatrixForm(self.form.shape[:at] + self.form.shape[at + 1 :], axes)

    @property
    def _vector_shape(self) -> tuple[int, ...]:
        return self.shape


class Base:
    """The base as torch names it.

    Attributes:
      params: The parameters.
      leaves: The same by path.
      sites: By the names of tensors in torch, in the order of the model.
      body: Name of the module that holds the body of a model with a head, with a dot; empty if not known.
      model_type: As in config.json; None for a model that is not jpeft's.
      task: The name of the task in HF PEFT that the model is for; None if there is none.
      axes: Geometry of kernels, for the option of that name.
      config: The model's configuration; None for a model that is not jpeft's.
      tied: The torch module of a head that is the word embedding; None if there is none.
      second_names: Names of tensors by second names that torch has for them.
      torch_class: Where transformers has the class of the model, as HF PEFT writes it; None for a model that is not jpeft's.
    """

    def __init__(
        self,
        params: tree.Params,
        sites: Sequence[Site],
        *,
        body: str = "",
        model_type: str | None = None,
        task: str | None = None,
        axes: Any = None,
        config: Any = None,
        tied: str | None = None,
        second_names: Mapping[str, str] = MappingProxyType({}),
        torch_class: Mapping[str, str] | None = None,
    ):
        self.params, self.leaves = params, tree.flatten(params)
        self.sites = {site.name: site for site in sites}
        self.body, self.model_type, self.task, self.axes, self.config, self.tied = body, model_type, task, axes, config, tied
        self.second_names, self.torch_class = second_names, torch_class

    @property
    def kernels(self) -> dict[str, Site]:
        """The sites that are kernels or tables, by module."""
        return {site.module: site for site in self.sites.values() if site.form is not None}

    @property
    def modules(self) -> list[str]:
        """The names of all torch modules with parameters, and of those that hold them, in the order of the model."""
        found: dict[str, None] = {}
        for site in self.sites.values():
            parts = site.module.split(".")
            found |= dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return list(found)

    def at(self, path: Path) -> list[Site]:
        """The sites of one parameter, in the order of the stack."""
        return [site for site in self.sites.values() if site.path == path]

    def count(self, path: Path) -> int | None:
        """How many layers are stacked in a parameter; None if none are."""
        sites = self.at(path)
        return None if not sites or sites[0].index is None else len(sites)

    @functools.cached_property
    def word(self) -> Site | None:
        """The table of word embeddings; None if there is none with a torch name."""
        paths = layouts.find(self.params, layouts.Role.EMBEDDING, required=False)
        return next((site for site in self.sites.values() if site.kind == EMBEDDING and site.path in paths), None)

    def tensor(self, site: Site) -> np.ndarray:
        """The base's own value of a parameter, as torch has it."""
        return site.to_torch(self.leaves[site.path])


# Torch modules of heads that may be the word embedding.
_HEADS = ("cls.predictions.decoder", "lm_head.decoder", "vocab_projector", "generator_lm_head", "lm_head")

# Names of tasks in HF PEFT.
_TASKS = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
    "encoder": "FEATURE_EXTRACTION",
    "decoder": "FEATURE_EXTRACTION",
}


def base_of(params: tree.Params, *, model: Any = None, names: Names | None = None, axes: Any = None) -> Base:
    """The base of an adapter.

    Args:
      params: The parameters.
      model: One of the models of `jpeft.models`.
      names: For any other model: the torch name of each parameter.
      axes: Geometry of its kernels.

    Raises:
      ValueError: if neither is given, or the parameters are not the model's.
    """
    if names is not None:
        rename = _Renaming(names)
        # The parameters of a module of experts are in the order of the rules.
        return Base(params, sorted(_named_sites(params, rename, axes), key=lambda site: rename.place(site.path)), axes=axes)
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) is None or not hasattr(config, "scan"):
        what = "no model was given" if model is None else f"{type(model).__name__} is none of jpeft.models"
        raise ValueError(
            f"HF PEFT names its tensors by torch modules, and {what}: give model=, one of jpeft.models, or names=, which gives "
            'the torch name of each parameter: names={r"blocks_(\\d+)/attn/q/kernel": r"model.layers.\\1.self_attn.q_proj.weight"}.'
        )
    family = families.family_of(config.model_type)
    body = family.names.body_of(config.model_type) if family.names.prefixed else ""
    task = next((name for name, about in family.models.items() if isinstance(model, about.module)), "")
    leaves = tree.flatten(params)
    sites = []
    for entry in checkpoint_layout(model):
        if entry.path not in leaves or tuple(leaves[entry.path].shape) != entry.shape:
            found = f"has shape {tuple(leaves[entry.path].shape)}" if entry.path in leaves else "is missing"
            raise ValueError(f"These are not the parameters of the model: '{entry.path}' {found}, the model needs {entry.shape}.")
        last = entry.path.rpartition("/")[2]
        stack = (0,) if entry.stacked else ()
        at = len(stack)
        is_matrix = len(entry.shape) - at == 2
        form = MatrixForm(entry.shape, KernelAxes(stack, (at,), (at + 1,))) if is_matrix else None
        kind = OTHER if not is_matrix else EMBEDDING if last == "embedding" else LINEAR if entry.transposed else CONV1D
        for i, name in enumerate(entry.names):
            sites.append(Site(name, entry.path, i if entry.stacked else None, form, kind, entry.tensor_shape))
    tied = next((name for name in _HEADS if re.fullmatch(family.names.tied, f"{name}.weight")), None)
    has_head = task != "" and family.models[task].scores_words and all(site.module != tied for site in sites)
    return Base(
        params,
        sites,
        body=f"{body}." if body and any(site.name.startswith(f"{body}.") for site in sites) else "",
        model_type=config.model_type,
        task=_TASKS.get(task),
        config=config,
        tied=tied if has_head else None,
        second_names={
            re.sub(old, new, site.name): site.name for old, new in family.names.second_names for site in sites if re.search(old, site.name)
        },
        torch_class=_torch_class(config.model_type, family.models[task].hf_suffix) if task else None,
    )


def _torch_class(model_type: str, suffix: str) -> dict[str, str]:
    """The class of a model in transformers, and its module."""
    folder = model_type.replace("-", "_")
    name = f"{families.family_of(model_type).hf_classes[model_type]}{suffix}"
    return {"base_model_class": name, "parent_library": f"transformers.models.{folder}.modeling_{folder}"}


def _named_sites(params: tree.Params, rename: "_Renaming", axes: Any) -> Iterator[Site]:
    """The sites of a model whose torch names the caller gives."""
    layers = layer_axes(params)
    seen: dict[str, str] = {}
    for path, leaf in tree.flatten(params).items():
        name = rename.name(path)
        if name is None:
            continue
        shape, last = tuple(leaf.shape), path.rpartition("/")[2]
        stack = layers.get(path)
        form = None
        if len(shape) - (stack is not None) > 1 and last != "bias":
            form = MatrixForm(shape, axes_of(path, shape, axes_rules(axes), layers=layers))
        elif stack is not None and stack != 0:
            raise ValueError(f"'{path}': its layers are stacked on axis {stack}, and names= is for stacks on the first axis.")
        stacks = len(form.axes.stack) if form is not None else int(stack is not None)
        stacked = ANY_LAYER in name
        is_experts = stacks - stacked == 1 and form is not None and not name.endswith(".weight")
        if stacks - stacked != int(is_experts):
            need = f"needs {ANY_LAYER!r} for the number of the layer" if stacks else f"has {ANY_LAYER!r}, but no layers are stacked there"
            raise ValueError(f"names: the torch name {name!r} of '{path}' {need}.")
        count = (form.stack[0] if form is not None else shape[0]) if stacked else 1
        for i in range(count):
            own = name.replace(ANY_LAYER, str(i))
            if own in seen:
                raise ValueError(f"names: '{seen[own]}' and '{path}' both get the torch name {own!r}.")
            seen[own] = path
            index = i if stacked else None
            if is_experts and form is not None:
                yield Site(own, path, index, form, EXPERTS, (form.stack[-1], *form.sizes[::-1]))
            else:
                yield _named_site(own, path, index, form, shape[1:] if stacked and form is None else shape)
    if not seen:
        raise ValueError(f"names gives none of the parameters a torch name. They are {tree.first_few(tree.flatten(params))}.")


def _named_site(name: str, path: Path, index: int | None, form: MatrixForm | None, shape: tuple[int, ...]) -> Site:
    if form is None:
        return Site(name, path, index, None, OTHER, shape)
    if path.endswith("embedding"):
        return Site(name, path, index, form, EMBEDDING, form.sizes)
    inputs, outputs = form.axes.inputs, form.axes.outputs
    if not form.axes.stack and len(inputs) > 1 and inputs + outputs == tuple(range(len(form.shape))) and re.search(r"(?i)conv", path):
        *window, channels, width = form.shape
        return Site(name, path, index, form, CONV, (width, channels, *window))
    return Site(name, path, index, form, LINEAR, form.sizes[::-1])


class _Renaming:
    """The torch names that a caller gives, by a function or by rules of which the first that matches counts."""

    def __init__(self, names: Names):
        self._function = names if callable(names) else None
        self._rules = [] if callable(names) else list(names.items() if isinstance(names, Mapping) else names)

    def name(self, path: Path) -> str | None:
        """The name of a parameter.

        Raises:
          ValueError: for a rule that is none.
        """
        if self._function is not None:
            return self._function(path)
        for pattern, replacement in self._rules:
            try:
                if (match := re.fullmatch(pattern, path)) is not None:
                    return match.expand(replacement)
            except re.error as error:
                raise ValueError(
                    f"names: the rule {pattern!r}: {replacement!r} is not a regular expression and a name: {error}."
                ) from error
        return None

    def place(self, path: Path) -> int:
        """The number of the rule."""
        return next((i for i, (pattern, _) in enumerate(self._rules) if re.fullmatch(pattern, path)), 0)
