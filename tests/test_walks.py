"""How many files a change takes: a new method is one file. (A family, a host, a flag and a task are walked in tests of their own.)"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WALK = """
import jax, jax.numpy as jnp
import jpeft

assert "{name}" in jpeft.methods(), list(jpeft.methods())
params = {{"dense": {{"out": {{"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}}}}}
peft = jpeft.apply(params, method="{name}", scale=2.0)
assert peft.method == jpeft.{name}(scale=2.0) == jpeft.make(peft.method.config())
jpeft.save("adapter", peft)
assert jpeft.load("adapter", params).method == peft.method
from jpeft.cli import main
assert main(["methods"]) == 0
"""


@pytest.mark.parametrize(
    ("skeleton", "package", "name"), [("method", "additive", "output_shift"), ("weight_method", "reparameterized", "row_scale")]
)
def test_a_method_is_one_file(skeleton, package, name, tmp_path):
    """In a copy of the package, a skeleton saved under a new name is found by all that lists, makes, saves and loads methods."""
    shutil.copytree(ROOT / "jpeft", tmp_path / "jpeft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "docs" / "skeletons" / f"{skeleton}.py", tmp_path / "jpeft" / package / f"{name}.py")
    command = [sys.executable, "-c", WALK.format(name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


def test_the_lists_of_methods_are_up_to_date():
    """README.md, docs/methods/README.md and jpeft/factories.py are what `make docs` writes."""
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
