"""Kills inside file operations, and several writers at once. `python tests/kills.py` does many more, and kills of real runs at random."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_kills_inside_file_operations():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), "--every", os.environ.get("JPEFT_KILL_EVERY", "17")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) kills inside file operations", done.stdout)[1]) >= 12
