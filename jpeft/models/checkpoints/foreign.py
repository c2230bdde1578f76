"""Folders and checkpoints that are no plain model: each is named as what it is, with the way out."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHERS = {
    "*.gguf": "a GGUF file (quantised weights of llama.cpp)",
    "*.h5": "weights of TensorFlow",
    "*.msgpack": "weights of Flax",
    "*.onnx": "an ONNX file",
    "*.npz": "NumPy arrays",
}

# Endings of the tensors that go with quantised weights: bitsandbytes, GPTQ and AWQ, compressed-tensors, fp8, torchao.
_QUANTISED = re.compile(
    r"(.*\.)?(SCB|weight_format|qweight|qzeros|g_idx|scales|weight_scale(_inv|_2)?|weight_zero_point|weight_g_idx|weight_packed|weight_shape"
    r"|(weight\.)?(nested_)?(absmax|quant_map)|weight\.quant_state\..*|(input|output|k|v)_scale|activation_scale|bitmask|compressed"
    r"|row_offsets|\w+_blocks|\w+_scales|weight_q(data|scale)|.*_qdata|meta)"
)
_ADAPTED = re.compile(
    r"(.*\.)?(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_l|base_layer|vera_lambda_\w|hada_w1_a|oft_r)(\..*)?"
)
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def check_folder(folder: Path, content: Mapping[str, Any] | None) -> None:
    """Refuse a folder that holds something else than a plain model.

    Args:
      folder: The folder.
      content: Its config.json; None if it has none.

    Raises:
      ValueError: naming what the folder is and what to give instead.
    """
    if content is not None and isinstance(content.get("run"), dict):
        raise ValueError(f"{folder} is a run of jpeft, not a model: write its model with `jpeft merge {folder} OUT` and give OUT.")
    if (folder / "jpeft.json").is_file():
        raise ValueError(
            f"{folder} is an adapter of jpeft, not a model: give the model that it was trained on, and load the adapter onto it with "
            "jpeft.load, or write the model of its run with `jpeft merge RUN OUT`."
        )
    if (folder / "adapter_config.json").is_file():
        base = _base_of(folder / "adapter_config.json")
        raise ValueError(
            f"{folder} is an adapter of HF PEFT (adapter_config.json){base}, not a plain model: merge it first, in Python with peft: "
            "model.merge_and_unload().save_pretrained(OUT), and give OUT."
        )
    if content is None:
        inside = _list_models_inside(folder)
        hint = f" {inside}" if inside else f" {list_weights(folder)}"
        raise ValueError(f"{folder} has no config.json: not a Hugging Face model folder.{hint}".rstrip())


def list_weights(folder: Path) -> str:
    """Return a sentence about weights in formats that are not read, with the way out; empty if there are none."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [path.name for path in there if any(path.match(pattern) for pattern in PICKLES) and path.name != "training_args.bin"]
    if pickles:
        return (
            f"It holds {_few(pickles)}: pickled files, which can run code when they are opened, so jpeft does not read them. Write the "
            "model as safetensors, in Python with transformers and torch: AutoModel.from_pretrained(FOLDER).save_pretrained(OUT), with the "
            "class of the task in place of AutoModel to keep its head."
        )
    for pattern, kind in OTHERS.items():
        if found := [path.name for path in there if path.match(pattern)]:
            return f"It holds {_few(found)}: {kind}, which jpeft does not read. Give the model in Hugging Face's format, as safetensors."
    if found := [path.name for path in there if path.suffix == ".safetensors"]:
        return f"It holds {_few(found)}, and the name must be model.safetensors, or an index must name the files."
    return ""


def check_quantised(folder: Path, content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a quantised checkpoint, by its configuration or by the names of its tensors.

    Raises:
      ValueError: saying what shows it, and the way out.
    """
    found = None
    for key in ("quantization_config", "compression_config"):
        if content.get(key) is not None:
            about = content[key]
            method = about.get("quant_method") if isinstance(about, dict) else None
            found = f"config.json has {key}" + (f", method {method!r}" if isinstance(method, str) else "")
    for name in ("quantize_config.json", "quant_config.json"):
        if found is None and (folder / name).is_file():
            found = f"it has a {name}"
    if found is None and (tensors := [name for name in names if _QUANTISED.fullmatch(name)]):
        found = f"it holds {_few(tensors)}"
    if found is not None:
        raise ValueError(f"{folder} is a quantised checkpoint ({found}). {NEEDS_FLOATS}")


NEEDS_FLOATS = (
    "jpeft needs weights in floats: give the checkpoint that it was made from, or write one, in Python with transformers and torch: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).dequantize().save_pretrained(OUT)."
)


def check_adapted(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that holds an adapter beside the weights, which would be left out.

    Raises:
      ValueError: naming some of the adapter's tensors.
    """
    if found := [name for name in names if _ADAPTED.fullmatch(name)]:
        raise ValueError(
            f"{folder} holds an adapter that is not merged ({_few(found)}), and without it the model is another one: merge it first, in "
            "Python with peft: model.merge_and_unload().save_pretrained(OUT), and give OUT."
        )


def find_prefix(missing: Sequence[str], bare: Mapping[str, str], stored: Iterable[str]) -> str:
    """Return a sentence about a prefix that stands in front of the names of tensors; empty if there is none.

    Args:
      missing: Names of tensors that a checkpoint lacks.
      bare: The same names without the name of the body in front.
      stored: Names of the tensors that it has.

    >>> find_prefix(["bert.a.weight"], {"bert.a.weight": "a.weight"}, ["module.bert.a.weight"])[:68]
    "The tensors stand under the foreign prefix 'module.', such as module"
    """
    stored = list(stored)
    ends = {name: name for name in missing} | {bare[name]: name for name in missing}
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for name in stored:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            # The longest end that is asked for: the prefix is what is left.
            if ".".join(parts[depth:]) in ends:
                prefix = ".".join(parts[:depth]) + "."
                counts[prefix] += 1
                example.setdefault(prefix, name)
                break
    if counts and (best := counts.most_common(1)[0])[1] * 2 >= len(missing):
        prefix = best[0]
        return (
            f"The tensors stand under the foreign prefix {prefix!r}, such as {example[prefix]}: something was wrapped around the model "
            f"when it was saved. Save the model inside it, or rename the tensors with name.removeprefix({prefix!r})."
        )
    wrapped = [name for name in stored if _WRAPPERS & set(name.split("."))]
    if wrapped:
        return f"The names of the tensors hold those of a wrapper, such as {wrapped[0]}: save the model inside it, or rename the tensors."
    return ""


def _base_of(file: Path) -> str:
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f" for {base}" if isinstance(base, str) and base else ""


def _list_models_inside(folder: Path) -> str:
    """Return a sentence about folders inside this one that hold a model, such as those of sentence-transformers."""
    inside = sorted(path.name for path in folder.iterdir() if (path / "config.json").is_file() and path.is_dir())
    models = [name for name in inside if list((folder / name).glob("*.safetensors"))] or [
        name for name in inside if list_weights(folder / name)
    ]
    kind = "It is a model of sentence-transformers, with its parts in folders." if (folder / "modules.json").is_file() else ""
    if models:
        return f"{kind} Give the folder of the model inside it: {', '.join(str(folder / name) for name in models[:4])}.".lstrip()
    return kind


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
