"""What the documents say, run: docstring examples, the README's loop."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from tables import case
from tiny_text import make_model

import jpeft

ROOT = Path(__file__).parents[1]
MODULES = ["jpeft", *(m.name for m in pkgutil.walk_packages(jpeft.__path__, "jpeft.") if not m.name.endswith("__main__"))]


def code_blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:jpeft.* is now called:DeprecationWarning")  # three modules are old spellings
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    scope = {"jax": jax, "jnp": jnp, "jpeft": jpeft, "key": jax.random.key(0)}
    results = doctest.testmod(module, extraglobs=scope, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_the_readme_loop_runs_twice(tmp_path, monkeypatch, capsys):
    """As a whole program that needs nothing else, and again in the folder where its adapter is saved."""
    monkeypatch.chdir(tmp_path)
    loop, options = code_blocks("README.md")
    for _ in range(2):
        scope: dict[str, Any] = {}
        exec(loop, scope)
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert accuracy > 0.85
    again = jpeft.load("out", scope["params"])
    chex.assert_trees_all_equal(again.adapter, scope["peft"].adapter)
    got = scope["model"].apply({"params": scope["merged"]}, scope["x"])
    chex.assert_trees_all_close(got, scope["forward"](scope["peft"], scope["x"]), atol=1e-4)
    exec(options, {"jpeft": jpeft, "params": case("lora", "plain").params})


def test_the_recipes_run(tmp_path, monkeypatch):
    """Every block of docs/how-to.md, one after the other, on a tiny encoder."""
    monkeypatch.chdir(tmp_path)
    first, *blocks = code_blocks("docs/how-to.md")
    scope: dict[str, Any] = {}
    exec(first, scope)
    scope["folder"] = str(make_model(tmp_path / "model"))
    for block in blocks:
        exec(block, scope)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(scope["peft"].adapter)} == {"float32"}
    for name in ("reviews", "biases"):
        assert scope["loaded_again"][name].params is scope["loaded"].params


def test_the_page_on_any_model_runs(capsys):
    """Every block of docs/any_model.md, one after the other."""
    names: dict[str, Any] = {}
    for block in code_blocks("docs/any_model.md"):
        exec(block, names)
    assert names["logits"].shape == (8, 4)
    assert "ok   merges" in capsys.readouterr().out


def test_the_page_on_serving_runs(tmp_path, monkeypatch):
    """Every block of docs/serving.md, one after the other; a server's answers are those of each adapter alone."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code_blocks("docs/serving.md"):
        exec(block, names)
    answers, adapters = names["answers"], names["adapters"]
    assert [name for name, _ in answers] == ["french", "brief", None, "formal", "polite", "french", "brief"]
    at = len(answers) - 1
    alone = jpeft.wrap(names["model"].apply, adapters["brief"].method)
    text = names["generate"](alone, adapters["brief"].variables, jnp.array([[3, 5, 2, at]]), max_new_tokens=8)
    assert answers[at][1] == text.tokens[0].tolist()
    assert (tmp_path / "dora" / "adapter_model.safetensors").exists()


def test_the_page_on_hf_peft_runs(tmp_path, monkeypatch):
    """Every block of docs/hf_peft.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in code_blocks("docs/hf_peft.md"):
        exec(block, names)
    chex.assert_trees_all_equal(names["again"].adapter, names["peft"].adapter)
    assert (tmp_path / "own" / "adapter_config.json").is_file()


def test_the_readme_trains_at_the_rates_of_the_command_line():
    lora = jpeft.methods()["lora"]
    assert f"linear_schedule({lora.learning_rate:g}".replace("0.003", "3e-3") in (ROOT / "README.md").read_text()
    assert f'{{"@head": {lora.head_lr_scale}}}' in (ROOT / "README.md").read_text()


def test_the_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text()
    for name in jpeft.methods():
        assert f"| `{name}` |" in readme
    for path in re.findall(r"\]\(([\w./]+)\)", readme):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"^make (\w+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target


PAGES = sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("name", PAGES)
def test_pages_of_methods(name):
    """Short, about a method that exists, in the index, and naming no option that its factory lacks."""
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert len(text.splitlines()) <= 60
    assert f"[{name}]({name}.md)" in (ROOT / "docs" / "methods" / "README.md").read_text()
    table = re.search(r"\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    named = {option for row in table[1].splitlines() for option in re.findall(r"`(\w+)`", row.split("|")[1])} if table else set()
    assert named <= set(inspect.signature(jpeft.methods()[name].factory).parameters)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))])
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / file).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / file).parent.joinpath(link.partition("#")[0]).exists()]
    assert not missing


def test_the_glossary_defines_each_word_once():
    """Headwords are unique and in order, and every name of the code exists."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    sections = [re.findall(r"^\*\*([^*]+)\*\*: ", section, flags=re.MULTILINE) for section in text.split("\n## ")]
    words = [word for section in sections for word in section]
    assert [sorted(section) for section in sections] == sections
    assert len(set(words)) == len(words)
    for name in re.findall(r"`(jpeft\.[\w.]+)`", text):
        found = jpeft
        for part in name.split(".")[1:]:
            # A module that `import jpeft` does not import, an attribute, or a field without a default.
            if inspect.ismodule(found) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part) if hasattr(found, part) else found.__dataclass_fields__[part]
