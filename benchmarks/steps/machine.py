"""Hardware and versions, as every table of results names them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("jax", "flax", "optax", "qwix", "torch", "peft", "transformers", "liger_kernel")


def machine() -> str:
    """Return processor, GPU and versions of packages in one line."""
    parts = [f"{_processor()}, {os.cpu_count()} cores", *_gpu(), f"Python {platform.python_version()}"]
    return ", ".join([*parts, *_versions()])


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    )
    return names[0] if names else platform.machine()


def _gpu() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return [" ".join(line.replace(",", "").split()) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
