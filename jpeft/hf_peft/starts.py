"""What HF PEFT takes off the base when an adapter begins in directions of its kernels (PiSSA, OLoRA).

The files hold the trained factors alone, and HF PEFT computes the factors of the start again. Here the base stays as it is, and they are
leaves: ``W' = W + s (a b - a0 b0)``. They are what HF PEFT computes and not what `jpeft.lora` would, wherever the two differ.
"""

import warnings
from typing import Any

import numpy as np

from jpeft.hf_peft.config import Config
from jpeft.hf_peft.sites import CONV1D, LINEAR, Base, Site


def start_of(config: Config) -> str | None:
    """The start that an adapter was given by its kernels: "pissa", "olora" or None.

    Raises:
      ValueError: for a start that changed the base in a way that the base alone does not tell.
    """
    init = config["init_lora_weights"]
    if isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal"):
        return None
    if isinstance(init, str) and init.lower().startswith("pissa"):
        if init.lower() != "pissa":
            warnings.warn(
                f"{config.file}: HF PEFT approximates the singular values of init_lora_weights={init!r} at random, each time that it loads "
                "the adapter. Here they are exact, so the outputs are close to HF PEFT's and not equal.",
                stacklevel=2,
            )
        return "pissa"
    if isinstance(init, str) and init.lower() == "olora":
        return "olora"
    raise config.error(
        f"init_lora_weights={init!r} may have changed the base when the adapter began, by what is not in the file. In Python with peft, "
        "write it as a plain LoRA: model.save_pretrained(OUT, path_initial_model_for_weight_conversion=...)."
    )


def check_start(config: Config, kind: str, sites: list[Site]) -> None:
    """Refuse layers that HF PEFT gives no such start.

    Raises:
      ValueError: naming one.
    """
    known = (LINEAR, CONV1D) if kind == "pissa" else (LINEAR,)
    odd = [site.module for site in sites if site.kind not in known]
    if odd or config["use_dora"]:
        what = f"'{odd[0]}'" if odd else "use_dora"
        raise config.error(f"init_lora_weights={config['init_lora_weights']!r} is not read together with {what}.")


def factors(kind: str, base: Base, site: Site, rank: int, scale: float) -> dict[str, Any]:
    """The factors ``a0`` and ``b0`` of one kernel."""
    weight = base.tensor(site).astype(np.float32)
    weight = weight.T if site.kind == CONV1D else weight  # [outputs, inputs]
    if kind == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(s[:rank] / np.float32(scale))
        return {"a0": (root[:, None] * v[:rank]).T, "b0": (u[:, :rank] * root).T}
    q, r = np.linalg.qr(weight)
    return {"a0": r[:rank].T, "b0": q[:, :rank].T}
