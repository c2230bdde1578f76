"""What every test shares: a CPU with eight devices, strict broadcasting, one compilation cache, fixed keys."""

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# --- environment: read when jax and huggingface_hub are imported, and inherited by the processes that tests start ---

# The suite is written for CPU: exact comparisons, eight devices, several workers. JAX_PLATFORMS=cuda runs it elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time goes into compiling tiny programs, most of them the same in every run and in every worker.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiles in two thirds of the time; slower programs do not matter at test sizes.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older code generator compiles these programs in a third of the time. Later versions have none, and XLA does not start on a flag
# that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# A test that reaches for the network is a mistake: let it fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
import shape_checks

# --- this process only: a command line under test sees the one device that its user would see ---

shape_checks.install("jpeft")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects, few of them in cycles: looking for those less often saves a tenth of the time.
gc.set_threshold(100_000, 20, 50)


def pytest_configure(config: pytest.Config) -> None:
    """Tolerate a cache entry that another worker is still writing: jax warns, and compiles for itself."""
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


def forget_programs() -> None:
    """Let go of compiled programs: a process may not map more than so many pieces of memory (`vm.max_map_count`)."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Forget a file's compiled programs after it."""
    yield
    forget_programs()


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key; split it for more."""
    return jax.random.key(0)


@pytest.fixture
def error_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Return a function that checks that a command has failed with one line, and nothing else, and returns the line."""
    monkeypatch.delenv("JPEFT_DEBUG", raising=False)

    def check(status: int) -> str:
        out, err = capfd.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return check


@pytest.fixture
def fails(error_line: Callable[[int], str], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command, which must fail, and returns its error line."""
    from jpeft.cli import main

    def run(*arguments: object) -> str:
        capfd.readouterr()
        return error_line(main([str(argument) for argument in arguments]))

    return run
