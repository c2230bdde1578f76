"""The tables of docs/layouts.md: what `jpeft.layouts` finds in the trees of the families.

``python tests/layout_table.py`` rewrites them.
"""

import re
from pathlib import Path

from layout_families import FAMILIES
from layout_trees import Family, Part, container

from jpeft import layouts
from jpeft.layouts import Role
from jpeft.layouts.roles import MEANING, MODULES, OUTER

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
INNER = [role for role in Role if role not in OUTER and role is not Role.ATTENTION_IN]


def found(family: Family, role: Role, form: str = "numbered") -> set[str]:
    """What has a role in a family: leaves, or modules."""
    shapes = family.shapes(form)
    if role in MODULES:
        return {module.path for module in layouts.modules(shapes, role, required=False)}
    return set(layouts.find(shapes, role, required=False))


def coverage() -> str:
    """Families by roles, with a mark where something has the role."""
    rows = [["family", "layout", *(f"`{role}`" for role in Role if role is not Role.ATTENTION_IN)]]
    for name, family in FAMILIES.items():
        layout = layouts.detect(family.shapes())
        marks = ["x" if found(family, role) else "" for role in Role if role is not Role.ATTENTION_IN]
        rows.append([name, layout.name if layout else "", *marks])
    return _table(rows)


def names() -> str:
    """Families by the groups of roles, with the names of leaves: those of a block from the block on."""
    rows = [["family", "blocks", *(f"`{role}`" for role in INNER)]]
    for name, family in FAMILIES.items():
        cells = []
        for role in INNER:
            leaves = [leaf for part in family.parts for leaf in _inside(part, found(family, role))]
            cells.append(", ".join(f"`{leaf}`" for leaf in _short(dict.fromkeys(leaves))))
        rows.append([name, ", ".join(f"`{container(part, 'numbered')}`" for part in family.parts), *cells])
    return _table(rows)


def outside() -> str:
    """Families by the roles outside the blocks."""
    rows = [["family", *(f"`{role}`" for role in OUTER)]]
    for name, family in FAMILIES.items():
        rows.append([name, *(", ".join(f"`{leaf}`" for leaf in _short(dict.fromkeys(sorted(found(family, role))))) for role in OUTER)])
    return _table(rows)


def meanings() -> str:
    """The roles and what they mean."""
    return _table([["role", "what it is"], *([f"`{role}`", MEANING[role]] for role in Role)])


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text()
    sections = {"Roles": meanings(), "Coverage": coverage(), "Names in a block": names(), "Names outside": outside()}
    tables = "\n\n".join(f"### {title}\n\n{table}" for title, table in sections.items())
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL)


def _inside(part: Part, paths: set[str]) -> list[str]:
    """The paths in the first block of a stack, from the block on; "." is the block."""
    block = part.at.format(i=0)
    return [path.removeprefix(f"{block}/") if path != block else "." for path in sorted(paths) if f"{path}/".startswith(f"{block}/")]


def _short(leaves: dict[str, None]) -> list[str]:
    """Leaves without the name of a kernel, and with braces around names in one module."""
    modules: dict[str, list[str]] = {}
    for leaf in leaves:
        module, _, last = re.sub(r"/(kernel|w)$", "", leaf).rpartition("/")
        modules.setdefault(module, []).append(last)
    join = lambda module, last: f"{module}/{last}" if module else last
    return [join(module, lasts[0] if len(lasts) == 1 else f"{{{','.join(lasts)}}}") for module, lasts in modules.items()]


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(coverage())
