"""Write the lists of methods from the methods' classes, which are their one source: `make docs`.

README.md and docs/methods/README.md get a table, jpeft/factories.py the public spellings. With ``--check`` nothing is written; the exit
status says whether everything is up to date.
"""

import argparse
import re
import sys
from pathlib import Path

from jpeft import registry
from jpeft.core.method import Method

ROOT = Path(__file__).parents[1]


def rows(link: str) -> str:
    """The rows of a table of methods; `link` formats the name."""
    head = "| method | family | what it does | merges |\n|---|---|---|---|\n"
    line = lambda cls: f"| {link.format(cls.name)} | {cls.family} | {cls.summary} | {'no' if cls.why_no_merge else 'yes'} |\n"
    chain = "| `jpeft.chain(a=..., b=...)` | | several of them at once | if all do |\n"
    return head + "".join(map(line, registry.classes().values())) + chain


def with_table(file: Path, table: str) -> str:
    """The file's text with the table between its markers."""
    return re.sub(r"(<!-- methods -->\n).*?(<!-- /methods -->)", lambda m: m[1] + table + m[2], file.read_text(), flags=re.DOTALL)


def factories() -> str:
    """The source of jpeft/factories.py."""
    spelled: list[tuple[str, type[Method]]] = sorted(registry.classes().items(), key=lambda item: item[1].__module__)
    imports = "".join(f"from {cls.__module__} import {name} as {name}\n" for name, cls in spelled)
    names = "".join(f'    "{name}",\n' for name in sorted(registry.classes()))
    title = '"""Every method by its public spelling. Written by `make docs` from the methods\' classes."""'
    return f"{title}\n\n{imports}\n__all__ = [\n{names}]\n"


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    readme, index = ROOT / "README.md", ROOT / "docs" / "methods" / "README.md"
    texts = {
        readme: with_table(readme, rows("`{}`")),
        index: with_table(index, rows("[{0}]({0}.md)")),
        ROOT / "jpeft" / "factories.py": factories(),
    }
    stale = [file for file, text in texts.items() if not file.exists() or file.read_text() != text]
    for file in stale:
        print(f"{'out of date' if check else 'written'}: {file.relative_to(ROOT)}")
        if not check:
            file.write_text(texts[file])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
