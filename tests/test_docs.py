"""What the documents say, run: docstring examples, the README's loop."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from tables import base_logits, batch, case

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


def test_the_readme_loop_trains():
    cell = case("lora", "plain")
    loop, options = code_blocks("README.md")
    scope = {"params": cell.params, "model": cell.model, "batches": [batch()] * 30}
    exec(re.sub(r"jpeft\.save\(.*", "", loop), scope)
    assert scope["loss"] < 0.5 * optax.softmax_cross_entropy_with_integer_labels(base_logits("plain"), batch()["y"]).mean()
    got = cell.model.apply({"params": scope["merged"]}, batch()["x"])
    chex.assert_trees_all_close(got, scope["forward"](scope["peft"], batch()["x"]), atol=1e-5)
    exec(options, {"jpeft": jpeft, "params": cell.params})


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
