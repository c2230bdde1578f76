"""Packages from PyPI in a folder of their own, in front of those that jpeft is installed with."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_REQUESTS = ("requests", "urllib3", "certifi", "idna", "charset-normalizer")
# Without what they need beyond these: jax, flax and the like are there, and their data pipelines and trainers are not used.
PACKAGES: dict[str, tuple[str, ...]] = {
    "flax": (),
    "transformers": ("transformers==4.57.6", "tokenizers>=0.22,<=0.23.0", "huggingface-hub>=0.34,<1.0", *_REQUESTS),
    "others": (
        *("gemma==3.3.0", "kauldron==1.4.2", "google-tunix==0.1.7", "qwix==0.1.7", "flaxdiff==0.2.11"),
        *("jax-resnet==0.0.4", "einops", "clu", "ml_collections", "google-metrax", "wrapt", "tensorboardX", "protobuf", "lark"),
        *("sentencepiece", "perfetto", "immutabledict", *_REQUESTS),
    ),
}


def make(group: str) -> Path | None:
    """Install a group's packages, once, and return their folder; None where there are none.

    Raises:
      RuntimeError: if they cannot be installed, with the reason.
    """
    wanted = PACKAGES[group]
    if not wanted:
        return None
    name = hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()[:10]
    folder = ROOT / ".third_party" / f"{group}-{name}"
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "-q",
            "install",
            "--no-deps",
            "--target",
            str(making),
            *wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            shutil.rmtree(making, ignore_errors=True)
            raise RuntimeError(f"{group}: pip could not install its packages: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        making.rename(folder)
    return folder


def variables(folder: Path | None) -> dict[str, str]:
    """The environment of a process that sees the packages of a folder first."""
    places = [str(folder)] if folder else []
    path = os.pathsep.join([*places, str(ROOT / "tests"), str(ROOT)])
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **cache, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "USE_TORCH": "0"}
