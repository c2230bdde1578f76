"""The benchmarks beside torch: some of their cases at toy size, and the processes that run them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmarks."""
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("bench", "gpu", "steps.cases", "steps.machine", "steps.processes")
        yield {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


def lines_of(bench, who, what, **options):
    """The lines of a case of the GPU's set at toy size."""
    cases = bench["cases"]
    found = next(case for case in cases.gpu_cases() if (case.who, case.what) == (who, what))
    small = cases.toy(found)
    small = cases.case(who, what, small.kind, small.batch, small.length, **dict(small.options) | options)
    return list(bench["processes"].in_this_process(small, "toy"))


NUMBERS = {"ms", "tokens_s", "peak_GiB", "temp_GiB", "compile_s", "loss", "TFLOP", "needed_TFLOP", "limit_share"}


@pytest.mark.parametrize(
    ("what", "options", "count"),
    [
        ("LoRA, scan, dots", {}, 1),
        ("BERT", {"methods": ("lora", "fish_mask", "no_method")}, 3),
        ("sweep of 8 adapters", {"adapters": 2}, 2),
    ],
)
def test_cases_of_jax(bench, what, options, count):
    found = lines_of(bench, "jpeft", what, **options)
    assert len(found) == count
    for line in found:
        assert (line["who"], line["what"]) == ("jpeft", what)
        if line.get("method") == "no_method":
            assert "There is no method" in line["failed"]
        elif what.startswith("sweep"):
            assert line["ms"] > 0
        else:
            assert line.keys() >= NUMBERS, line
    if what == "LoRA, scan, dots":
        # A random model knows nothing, and trains with the adapter of LoRA on all projections.
        assert found[0]["loss"] == pytest.approx(5.55, abs=0.1)
        assert found[0]["TFLOP"] > found[0]["needed_TFLOP"] > 0


def test_generation(bench):
    assert [line["method"] for line in lines_of(bench, "jpeft", "generation")] == ["unmerged", "merged"]


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize(("who", "what"), [("HF PEFT", "LoRA, checkpointing"), ("torch", "BERT, eager")])
def test_cases_of_torch(bench, who, what):
    pytest.importorskip("peft")
    found = lines_of(bench, who, what, **({"methods": ("lora", "bitfit")} if what.startswith("BERT") else {}))
    assert len(found) == (2 if what.startswith("BERT") else 1)
    for line in found:
        assert line.keys() >= NUMBERS, line


def test_the_sets_have_every_case_that_is_compared(bench):
    """Names are unique, jpeft and torch run the same shapes, and the GPU's set is ordered by what matters."""
    cases = bench["cases"]
    for found in (cases.gpu_cases(), cases.cpu_cases()):
        assert len({case.name for case in found}) == len(found)
        ours = {(case.kind, case.batch, case.length) for case in found if case.who == "jpeft"}
        assert {(case.kind, case.batch, case.length) for case in found} == ours
        assert {case.who for case in found} == {"jpeft", "qwix", "HF PEFT", "torch"}
    lengths = {case.length for case in cases.gpu_cases() if case.kind == "llama"}
    assert lengths == {1024, 4096, 32768}
    # 2 (16 (2048 (2 2048 + 2 512) + 3 2048 8192) + 2048 128256) for each token, and half of 4 16 L^2 2048.
    assert cases.forward_flops(cases.LLAMA["gpu"], 1, 8, decoder=True) == 8 * 2 * 1235746816 + 4 * 16 * 64 * 2048 / 2


SCRIPT = """
import json, sys, time
name = sys.argv[sys.argv.index("--case") + 1]
if "broken" in name:
    raise SystemExit("RuntimeError: out of memory")
sys.stdin.readline()
print("something else")
print(json.dumps({"who": "jpeft", "what": name, "batch": 1, "length": 1, "ms": 1.0}), flush=True)
if "slow" in name:
    time.sleep(60)
"""


def test_processes_fail_and_run_out_of_time(bench, tmp_path):
    """A line for each: what it printed, why it failed, that no time was left."""
    (tmp_path / "script.py").write_text(SCRIPT)
    case, found = bench["cases"].case, []
    cases = [case("jpeft", what, "llama", 1, 1, seconds) for what, seconds in (("quick", 0), ("broken", 0), ("long", 99), ("slow", 0))]
    bench["processes"].in_processes(cases, "toy", str(tmp_path / "script.py"), seconds=4, ahead=True, say=found.append)
    quick, broken, long, slow, late = found
    assert quick["ms"] == 1
    assert broken["failed"] == "RuntimeError: out of memory"
    assert long["skipped"].startswith("it takes about 99 s")
    assert slow["ms"] == 1
    assert late["failed"] == "the time is over"


def test_the_table_has_medians_and_what_failed(bench):
    line = {"who": "jpeft", "what": "LoRA", "batch": 4, "length": 8}
    lines = [line | {"ms": 3.0, "tokens_s": 10}, line | {"ms": 1.0, "tokens_s": 30}, line | {"who": "qwix", "failed": "no module"}]
    text = bench["bench"].table(lines)
    assert "| jpeft: LoRA, 4 × 8 | 2 | 20 | – | – | – | – |" in text
    assert "- qwix: LoRA, 4 × 8: no module" in text
    assert "jax 0." in bench["machine"].machine()


UNINSTALLED = """
import importlib.metadata, sys

WITHOUT = ("jaxtyping", "beartype", "chex", "grain", "tyro", "safetensors", "tokenizers", "pyarrow", "matplotlib")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in WITHOUT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
sys.path[:] = [path for path in sys.path if path != sys.argv[1]]
sys.path.insert(0, sys.argv[1] + "/benchmarks")
import gpu
sys.exit(gpu.main(["--toy", "--only", "jpeft: LoRA, scan, dots, 8"]))
"""


def test_jpeft_runs_from_its_folder(tmp_path):
    """Without an installed distribution, and without packages beyond jax, flax and optax."""
    command = [sys.executable, "-c", UNINSTALLED, str(FOLDER.parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    machine, line = map(json.loads, done.stdout.splitlines())
    assert "jax 0." in machine["machine"]
    assert line.keys() >= NUMBERS, line
