"""Load a bottleneck adapter of the library adapters onto a base."""

import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jpeft import tree
from jpeft.adapterhub.config import CONFIG, WEIGHTS, method_of
from jpeft.adapterhub.heads import read_head
from jpeft.adapterhub.places import SECOND_NAMES, places
from jpeft.core.peft import Peft
from jpeft.hf_peft.sites import base_of
from jpeft.hf_peft.tensors import Tensors
from jpeft.hosts.registry import unwrap
from jpeft.models.checkpoints.folder import read_json
from jpeft.tree.paths import first_few

_NAME = re.compile(r"(.*\.(?:adapters|shared_parameters)\.)([^.]+)(\..+)")


def load_adapterhub(folder: str | os.PathLike[str], params: tree.Params, *, model: Any) -> Peft:
    """Load a bottleneck adapter that the library adapters (AdapterHub) wrote with `save_adapter(..., use_safetensors=True)`.

    Its ``double_seq_bn`` (Houlsby) is `jpeft.adapter`, ``seq_bn`` (Pfeiffer) is `jpeft.pfeiffer`, ``par_bn`` is `jpeft.parallel_adapter` in
    post-norm models, and ``compacter`` is `jpeft.compacter`. A head beside the adapter comes along. Torch is not needed.

    Args:
      folder: A folder with adapter_config.json and adapter.safetensors.
      params: The base.
      model: The model of the base, one of `jpeft.models`.

    Returns:
      A `Peft`, to run and to train on.

    Raises:
      ValueError: if there is no such adapter, it is of another kind or base, tensors are missing, left over, misshapen or not finite.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> from jpeft.models import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 4), int))["params"]
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save_adapterhub(folder, jpeft.apply(params, method="pfeiffer", size=2), model=model)
    >>> jpeft.load_adapterhub(folder, params, model=model).method.name
    'pfeiffer'
    """
    source = Path(folder).expanduser()
    if not source.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    base = base_of(unwrap(params), model=model)
    content = read_json(source / CONFIG, f"{source} holds no {CONFIG}.")
    method = method_of(source / CONFIG, content, base)
    tensors = Tensors(source, WEIGHTS)
    # The name of the adapter stands in every name; a model without a head has no name of its body.
    stored: dict[str, str] = {}
    for name in tensors.names:
        match = _NAME.fullmatch(name)
        stored[f"{match[1]}{{name}}{match[3]}" if match else name] = name
    leaves: dict[str, Any] = {}
    missing: list[str] = []
    for place in places(method, base):
        found = [name if name in stored else name.removeprefix(base.body) for name in place.names]
        if lost := [name for name in found if name not in stored]:
            missing += lost
        else:
            leaves[place.path] = place.to_leaf([tensors.read_raw(stored.pop(name)) for name in found])
    second = tuple(SECOND_NAMES.values()) if getattr(method, "own_norm", False) else ()
    spare = [name for name in stored if not name.endswith(second)] if second else list(stored)
    if missing or spare:
        said = [f"{len(missing)} tensors are missing ({first_few(missing, 3)})"] if missing else []
        said += [f"{len(spare)} have no place in the model ({first_few(spare, 3)})"] if spare else []
        raise ValueError(f"{tensors.file} does not fit its configuration and the model: {'; '.join(said)}.".replace("{name}", "NAME"))
    head = read_head(source, base)
    method = method.replace(head="|".join(map(re.escape, head)) or None)
    adapter = tree.unflatten({path: jnp.asarray(leaf) for path, leaf in (leaves | head).items()})
    _check_shapes(tensors.file, method, base.params, adapter)
    return Peft(base.params, adapter, method)


def _check_shapes(file: Path, method: Any, params: tree.Params, adapter: tree.Adapter) -> None:
    shapes = lambda each: {path: tuple(leaf.shape) for path, leaf in tree.flatten(each).items()}
    expected, found = shapes(method.expected(params, adapter)), shapes(adapter)
    wrong = {path: (shape, expected.get(path)) for path, shape in found.items() if shape != expected.get(path)}
    if wrong or len(expected) != len(found):
        shown = ", ".join(f"'{path}' {shape}, {needed} is needed" for path, (shape, needed) in list(wrong.items())[:3])
        raise ValueError(
            f"{file} does not fit its configuration and the model: {shown or first_few(sorted(expected.keys() - found.keys()))}."
        )
