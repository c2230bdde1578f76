"""adapter_config.json of the library adapters: which bottleneck is which method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft import layouts
from jpeft.additive.bottlenecks.adapter import HoulsbyAdapter
from jpeft.additive.bottlenecks.bottleneck_method import BottleneckMethod
from jpeft.additive.bottlenecks.compacter import Compacter
from jpeft.additive.bottlenecks.parallel_adapter import ParallelAdapter
from jpeft.additive.bottlenecks.pfeiffer import PfeifferAdapter
from jpeft.core.options import shown
from jpeft.hf_peft.sites import Base

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
VERSION = "adapters.1.3.0"

# The library's names of activations, and ours. The first name of each is written.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu", "swish": "silu", "silu": "silu", "tanh": "tanh"}

# What a bottleneck has by default, as the library writes it.
DEFAULTS: Mapping[str, Any] = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "relu",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}

# Keys that do not change what a trained bottleneck computes: how it began, and what happens in training alone.
_TRAINING = ("init_weights", "init_weights_seed", "dropout", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity")
_HARMLESS = (*_TRAINING, "stochastic_depth", "cross_adapter", "inv_adapter_reduction_factor", "adapter_residual_before_ln")
# Keys that may have any value, because a method follows from them.
_READ = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "ln_before", "is_parallel", "scaling")
_READ_PHM = ("phm_layer", "phm_dim", "phm_rank")


def method_of(file: Path, content: Mapping[str, Any], base: Base) -> BottleneckMethod:
    """The method of a configuration, without its head.

    Args:
      file: For messages.
      content: Of the file.
      base: The base.

    Raises:
      ValueError: for another base, an architecture or an option that has no counterpart here.
    """
    given = content.get("config")
    if not isinstance(given, dict):
        raise ValueError(f"{file}: config must be an object, not {shown(given)}.")
    if given.get("architecture") is not None:
        raise ValueError(f"{file}: architecture {shown(given['architecture'])} is none of bottlenecks, which alone are read.")
    _check_base(file, content, base)
    config = {**DEFAULTS, **given}
    _check_known(file, given, config)
    size = _size(file, config, int(content["hidden_size"]))
    activation: Any = ACTIVATIONS[config["non_linearity"]]
    both, attention, output = (config["mh_adapter"], config["output_adapter"]), config["mh_adapter"], config["output_adapter"]
    if both == (False, False):
        raise ValueError(f"{file}: mh_adapter and output_adapter are both false, so there is no bottleneck.")
    if config["is_parallel"]:
        _require(file, config, mh_adapter=False, output_adapter=True, ln_before=False, phm_layer=False)
        check_parallel(base)
        return ParallelAdapter(size=size, scale=float(config["scaling"]), activation=activation, head=None)
    _require(file, config, scaling=1.0)
    if config["original_ln_before"]:
        _require(file, config, mh_adapter=False, output_adapter=True, phm_layer=False)
        return PfeifferAdapter(size=size, activation=activation, own_norm=config["ln_before"], head=None)
    _require(file, config, ln_before=False)
    if config["phm_layer"]:
        _require(file, config, output_adapter=True)
        about: dict[str, Any] = {"division": config["phm_dim"], "rank": config["phm_rank"], "plus_plus": not attention}
        return Compacter(size=size, activation=activation, train_norms=False, head=None, **about)
    only: dict[str, Any] = {} if attention and output else {"target": "@attention_out" if attention else "@ffn_out"}
    return HoulsbyAdapter(size=size, activation=activation, train_norms=False, head=None, **only)


def config_of(method: BottleneckMethod, width: int, size: int) -> dict[str, Any]:
    """The configuration of a method whose bottlenecks have a width and a size; the inverse of `method_of`.

    Raises:
      ValueError: for a method or an option that the library does not have.
    """
    config = {**DEFAULTS, "reduction_factor": factor_of(width, size)}
    config["non_linearity"] = next(name for name, own in ACTIVATIONS.items() if own == method.activation)
    if isinstance(method, PfeifferAdapter):
        return config | {"mh_adapter": False, "original_ln_before": True, "ln_before": method.own_norm}
    if isinstance(method, ParallelAdapter):
        return config | {"mh_adapter": False, "is_parallel": True, "scaling": float(method.scale), "init_weights": "mam_adapter"}
    if isinstance(method, Compacter):
        return config | {"phm_layer": True, "phm_dim": method.division, "phm_rank": method.rank, "mh_adapter": not method.plus_plus}
    if isinstance(method, HoulsbyAdapter):
        parts = {"@attention_out": (True, False), "@ffn_out": (False, True)}
        attention, output = parts.get(str(method.target), (True, True))
        return config | {"mh_adapter": attention, "output_adapter": output}
    raise ValueError(
        f"The library adapters has no format for {method.name}. It has one for adapter, pfeiffer, parallel_adapter and compacter; write "
        "other methods for HF PEFT: jpeft.save_hf."
    )


def factor_of(width: int, size: int) -> int | float:
    """A reduction factor by which the width, rounded down as the library does, gives a size.

    >>> factor_of(768, 48), 16 // factor_of(16, 5)
    (16, 5.0)
    """
    if width % size == 0:
        return width // size
    # Not width / size, which rounding may bring above what gives the size.
    return width / (size + 0.5)


def check_parallel(base: Base) -> None:
    """Refuse parallel bottlenecks in pre-norm blocks.

    Raises:
      ValueError: saying how the library differs.
    """
    if not layouts.find(base.params, "@post_norm/scale", required=False):
        raise ValueError(
            "In pre-norm blocks the parallel bottleneck of the library adapters reads what comes before the normalisation, and "
            "jpeft.parallel_adapter what comes behind it: they are not the same adapter."
        )


def _check_base(file: Path, content: Mapping[str, Any], base: Base) -> None:
    width = getattr(base.config, "hidden_size", None)
    for key, own in (("model_type", base.model_type), ("hidden_size", width)):
        if content.get(key) != own:
            raise ValueError(
                f"{file}: the adapter was trained on another base: its {key} is {shown(content.get(key))}, that here is {own!r}."
            )


def _check_known(file: Path, given: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in DEFAULTS and key != "architecture"]
    if unknown:
        raise ValueError(f"{file}: jpeft does not know {', '.join(f'{key}={shown(given[key])}' for key in unknown)} of bottlenecks.")
    for key, default in DEFAULTS.items():
        value = config[key]
        if key in (*_HARMLESS, *_READ, *_READ_PHM):
            if isinstance(default, bool) and not isinstance(value, bool):
                raise ValueError(f"{file}: {key} must be true or false, not {shown(value)}.")
            continue
        if value != default and (config["phm_layer"] or "phm" not in key):
            raise ValueError(f"{file}: {key}={shown(value)} has no counterpart in jpeft; {shown(default)} has.")
    if not isinstance(config["non_linearity"], str) or config["non_linearity"] not in ACTIVATIONS:
        raise ValueError(f"{file}: non_linearity must be one of {', '.join(ACTIVATIONS)}, not {shown(config['non_linearity'])}.")
    for key in ("phm_dim", "phm_rank"):
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{file}: {key} must be a whole number of at least 1, not {shown(config[key])}.")
    if not isinstance(config["scaling"], int | float) or isinstance(config["scaling"], bool):
        raise ValueError(f"{file}: scaling must be a number, not {shown(config['scaling'])}.")


def _size(file: Path, config: Mapping[str, Any], width: int) -> int:
    """The features inside of a bottleneck: the width by the reduction factor, rounded down."""
    factor = config["reduction_factor"]
    if isinstance(factor, dict) and set(factor) == {"default"}:
        factor = factor["default"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"{file}: reduction_factor must be one number above 0 for all layers, not {shown(factor)}.")
    return max(1, int(width // factor))


def _require(file: Path, config: Mapping[str, Any], **needed: Any) -> None:
    for key, value in needed.items():
        if config[key] != value:
            kind = "is_parallel" if config["is_parallel"] else "original_ln_before" if config["original_ln_before"] else "phm_layer"
            where = f"with {kind}={config[kind]} " if config[kind] else ""
            raise ValueError(f"{file}: {key}={shown(config[key])} {where}has no counterpart in jpeft; {shown(value)} has.")
