"""Write a bottleneck adapter as the library adapters does."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft import tree
from jpeft.adapterhub import heads
from jpeft.adapterhub.config import CONFIG, VERSION, WEIGHTS, check_parallel, config_of
from jpeft.adapterhub.places import SECOND_NAMES, places
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.checkpoint.files import check_output, replace_folder, use_umask, write_json
from jpeft.checkpoint.temporary import Temporary
from jpeft.core.peft import Peft, check_peft
from jpeft.extras import explained
from jpeft.hf_peft.sites import Base, base_of
from jpeft.models import families
from jpeft.tree.paths import first_few

# The models of the library that jpeft has.
_MODELS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "gpt2", "llama", "mistral")


def save_adapterhub(
    folder: str | os.PathLike[str],
    peft: Peft,
    *,
    model: Any,
    name: str = "default",
    labels: Sequence[str] = (),
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a bottleneck adapter as the library adapters (AdapterHub) does, for its `load_adapter(folder)`.

    Args:
      folder: A new folder.
      peft: The adapter: `jpeft.adapter`, `jpeft.pfeiffer`, `jpeft.parallel_adapter` in post-norm models, or `jpeft.compacter`.
      model: The model of the base, one of `jpeft.models`.
      name: Of the adapter.
      labels: The names of the outputs of a trained head.
      base: Name of the base, for the configuration.
      overwrite: Replace an adapter that is at `folder`.

    Raises:
      ValueError: for what the library cannot hold; if `folder` exists.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> from jpeft.models import BertConfig, BertModel
    >>> model = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 4), int))["params"]
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save_adapterhub(folder, jpeft.apply(params, method="pfeiffer", size=2), model=model)
    >>> jpeft.load_adapterhub(folder, params, model=model).method.name
    'pfeiffer'
    """
    check_peft(peft, "save_adapterhub")
    if not name.isidentifier():
        raise ValueError(f"name must be a word of letters, digits and underscores, not {name!r}.")
    target = Path(folder).expanduser().absolute()
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise ValueError(f"{folder} exists and holds no adapter, so it is not replaced: choose another folder.")
    if os.path.lexists(target) and not overwrite:
        raise ValueError(f"{folder} exists already. Choose another folder, or pass overwrite=True to replace it.")
    check_output(target, folder=True)
    described = base_of(peft.params, model=model)
    tensors, config, replaced = _write(peft, described, name)
    about = {"hidden_size": described.config.hidden_size, "model_class": _class_of(model), "model_name": base or ""}
    about |= {"model_type": described.model_type, "version": VERSION}
    head = None
    if replaced:
        parts, own = heads.head_of(name, replaced, described, labels)
        head = (parts, about | {"model_class": _class_of(model, flexible=own["config"] is not None)} | own)
    _write_folder(target, tensors, {"config": config, "name": name, **about}, head)


def _write(peft: Peft, base: Base, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """The tensors, the configuration of the bottlenecks, and the leaves of the head."""
    method, leaves = peft.method, tree.flatten(peft.adapter)
    if not isinstance(method, BottleneckMethod):
        what = f"a chain of {', '.join(part for part, _ in method.parts)}" if method.parts else method.name
        raise ValueError(
            f"The library adapters holds bottlenecks in its own format, and this is {what}: write it for HF PEFT, jpeft.save_hf."
        )
    if base.model_type not in _MODELS:
        raise ValueError(f"The library adapters has no model of the type {base.model_type}; it has {', '.join(_MODELS)}.")
    if method.name == "parallel_adapter":
        check_parallel(base)
    found = places(method, base)
    tensors = {each.replace("{name}", name): part for place in found for each, part in place.to_tensors(leaves[place.path]).items()}
    for one, other in SECOND_NAMES.items() if getattr(method, "own_norm", False) else ():
        tensors |= {each.removesuffix(one) + other: tensor.copy() for each, tensor in tensors.items() if each.endswith(one)}
    own = {place.path for place in found}
    replaced = {path: leaf for path, leaf in leaves.items() if path not in own}
    norms = [path for path in replaced if path.rpartition("/")[2] == "scale" or "norm" in path.lower()]
    moved = [
        path for path in norms if not np.array_equal(np.asarray(replaced[path], np.float32), np.asarray(base.leaves[path], np.float32))
    ]
    if moved:
        raise ValueError(
            f"The library adapters keeps normalisations as they are, and {first_few(moved, 2)} was trained: use train_norms=False."
        )
    up = next(leaves[place.path] for place in found if place.path.endswith("up/bias"))
    down = next(leaves[place.path] for place in found if place.path.endswith("down/bias"))
    config = config_of(method, up.shape[-1], down.shape[-1])
    return tensors, config, {path: leaf for path, leaf in replaced.items() if path not in norms}


def _class_of(model: Any, *, flexible: bool = False) -> str:
    """The class of the torch model: that of transformers, or the library's own, whose heads are layers by number."""
    family = families.family_of(model.config.model_type)
    return family.hf_classes[model.config.model_type] + ("AdapterModel" if flexible else family.task_model(model).hf_suffix)


def _write_folder(target: Path, tensors: dict[str, np.ndarray], about: dict[str, Any], head: Any) -> None:
    with explained():
        from safetensors.numpy import save_file

    temporary = Temporary(target)
    try:
        partial = temporary.make_folder()
        save_file(tensors, partial / WEIGHTS)
        write_json(partial / CONFIG, about)
        if head is not None:
            parts, config = head
            save_file(parts, partial / heads.WEIGHTS)
            write_json(partial / heads.CONFIG, config)
        use_umask(partial)
        replace_folder(partial, target, overwrite=True)
    finally:
        temporary.remove()
