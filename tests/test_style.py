"""One dialect through the package: error messages are sentences, sections of docstrings are indented by two, imports are absolute."""

import ast
import itertools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jpeft"
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields", "Example", "Examples")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def errors_of_dialect(source: str) -> list[str]:
    """What is wrong with the error messages and docstrings of a file."""
    wrong = []
    tree = ast.parse(source)
    names = names_of_code(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and (message := literal_message(node)) is not None:
            wrong += [f"line {node.lineno}: {fault}: {message}" for fault in faults_of_message(message, names)]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node) or ""
            wrong += [f"{getattr(node, 'name', 'module')}: {fault}" for fault in faults_of_sections(doc)]
    return wrong


def literal_message(node: ast.Raise) -> str | None:
    """The message of `raise ValueError("...")` with `{}` for each value of an f-string; None for any other statement."""
    call = node.exc
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "ValueError" and call.args):
        return None
    message = call.args[0]
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if isinstance(message, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in message.values)
    return None


def names_of_code(tree: ast.Module) -> set[str]:
    """The names of functions, classes, arguments and fields in a file, with which a message may begin: "seeds must be ..."."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.keyword)) and node.arg}
    return defined | arguments | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def faults_of_message(message: str, names: set[str]) -> list[str]:
    """A message begins with a capital letter, a quote, a flag, a value or a name of the code, and ends with a full stop."""
    first = message.split()[0] if message.split() else ""
    # "lora: ..." begins with the name of a method.
    begins = re.match(r"""[A-Z`'"\[({]|--|[a-z_0-9]+:$""", first) or re.search(r"[_=({`\[\]]", first) or first.rstrip(".,:;") in names
    # A message may quote another one, or end with a sentence from elsewhere: "...: {error}", "... . {hint}".
    ends = re.search(r"[.?]({})?$|[.:]\s{}$", message) or re.fullmatch(r"({}\s*)+", message)
    return ([] if begins else ["begins in lower case"]) + ([] if ends else ["has no full stop"])


def faults_of_sections(doc: str) -> list[str]:
    """The first line of a section is indented by two spaces."""
    lines = doc.splitlines()
    faults = []
    for heading, body in itertools.pairwise(lines):
        match = re.fullmatch(rf"( *)({'|'.join(SECTIONS)}):\s*", heading)
        if match and len(body) - len(body.lstrip()) != len(match[1]) + 2:
            faults.append(f"the section {match[2]} is not indented by two spaces")
    return faults


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_dialect(file):
    assert errors_of_dialect(file.read_text()) == []


def test_files_and_functions_can_be_read_in_one_go():
    """No file has more than 350 lines, and no function more than 60 without its docstring, inner functions counted in."""
    long = []
    for file in files():
        source = file.read_text()
        long += [f"{file}: {lines} lines"] if (lines := len(source.splitlines())) > 350 else []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                doc = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
                lines = (node.end_lineno or 0) - node.lineno + 1 - doc
                long += [f"{file}:{node.lineno} {node.name}: {lines} lines"] if lines > 60 else []
    assert not long


def test_imports_are_absolute():
    for file in PACKAGE.rglob("*.py"):
        relative = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, file


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('raise ValueError("give one of them.")', "begins in lower case"),
        ('raise ValueError(f"no split {name!r}.")', "begins in lower case"),
        ('raise ValueError("Give one of them")', "has no full stop"),
        ('raise ValueError(f"rank={rank}: at least 1, got {rank}")', "has no full stop"),
        ('def f():\n    """Do.\n\n    Args:\n        x: Four spaces.\n    """', "section Args is not indented by two"),
        ('"""Do.\n\nReturns:\nNothing.\n"""', "section Returns is not indented by two"),
    ],
)
def test_faults_are_found(source, fault):
    (wrong,) = errors_of_dialect(source)
    assert fault in wrong


@pytest.mark.parametrize(
    "source",
    [
        'raise ValueError("Give one of them.")',
        'raise ValueError(f"{name} is unknown.")',
        'raise ValueError(f"{reason}")',
        'raise ValueError(f"rank={rank}: at least 1.")',
        'raise ValueError("batch_size must be at least 1.")',
        'def f(seeds):\n    raise ValueError("seeds must be different numbers.")',
        'raise ValueError(f"The adapter is damaged: {error}")',
        'raise ValueError("--words needs two labels.")',
        "raise ValueError(\"'mean' is not a rule.\")",
        "raise ValueError(message)",
        'raise KeyError("query")',
        'def f():\n    """Do.\n\n    Args:\n      x: Two spaces.\n        More.\n\n    >>> 1\n    1\n    """',
    ],
)
def test_the_dialect_passes(source):
    assert errors_of_dialect(source) == []
