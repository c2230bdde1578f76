"""Search a tree for roles: which layout its blocks follow, and which leaves and modules have a role."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.layouts import structure
from jpeft.layouts.layout import Layout, container
from jpeft.layouts.roles import MEANING, MODULES, OUTER, PROJECTIONS, Role, Wanted, parse
from jpeft.layouts.stacks import Shapes, Stack, stacks
from jpeft.layouts.table import LAYOUTS, PLAIN
from jpeft.tree.paths import Params, Path, flatten

# Which leaf tells how wide the output of a module is.
_TOLD_BY = {
    Role.FFN: Wanted(Role.FFN_OUT, None),
    Role.BLOCK: Wanted(Role.FFN_OUT, None),
    Role.FFN_RESIDUAL: Wanted(Role.POST_NORM, "scale"),
}


class RoleModule(NamedTuple):
    """A module with a role, or all those that are stacked at one path."""

    path: Path
    role: Role
    leaf: Path  # the parameter whose last axis is as wide as the module's output


class _View(NamedTuple):
    """What a tree says of itself by names and shapes."""

    shapes: dict[Path, tuple[int, ...] | None]
    kinds: dict[Path, Path]  # each leaf's counterpart in the first module of its stack: what has one role has the other
    blocks: tuple[tuple[Stack, Layout], ...]
    outside: list[Path]  # leaves in no blocks


# --- layouts ---------------------------------------------------------------------------------------------------------------------------


def blocks(params: Params) -> list[tuple[Stack, Layout]]:
    """The stacks of blocks of a model, each with the layout that its names follow; stacks that follow none are left out.

    Args:
      params: Parameters, arrays or their shapes; or a dict of shapes by path; or paths alone.

    A tree without such a stack that follows a layout itself is one block, with the path "".
    """
    return list(_view(params).blocks)


def detect(params: Params) -> Layout | None:
    """The layout that a model follows: that of its largest stack of blocks; None if it follows none.

    Args:
      params: As for `blocks`.
    """
    found = blocks(params)
    return max(found, key=lambda pair: len(pair[0].leaves) * (pair[0].count if pair[0].axis is not None else 1))[1] if found else None


def shapes_of(params: Params) -> dict[Path, tuple[int, ...] | None]:
    """The shapes of parameters, arrays or shapes already, by path; None for those of paths alone."""
    is_shape = lambda leaf: leaf is None or (isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf))
    if isinstance(params, Sequence) and all(isinstance(path, str) for path in params):
        leaves: Mapping[Path, Any] = dict.fromkeys(params)
    elif isinstance(params, Mapping) and all(is_shape(leaf) or hasattr(leaf, "shape") for leaf in params.values()):
        leaves = params
    else:
        leaves = flatten(params)
    return {path: leaf if is_shape(leaf) else tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}


def _view(params: Params) -> _View:
    return _look(tuple(shapes_of(params).items()))


@functools.lru_cache(maxsize=32)
def _look(items: tuple[tuple[Path, tuple[int, ...] | None], ...]) -> _View:
    shapes = dict(items)
    candidates, found = stacks(shapes), []
    kinds = {path: path for path in shapes}
    for stack in candidates:
        firsts: dict[str, Path] = {}
        for path, i in stack.leaves.items():
            kinds[path] = firsts.setdefault(path if i is None else stack.inside(path), path)
        outside = [path for path in shapes if path not in stack.leaves]
        layout = next((layout for layout in LAYOUTS if layout.follows([*firsts.values()], outside)), None)
        if layout in (None, PLAIN):
            layout = _read(stack, firsts.values(), shapes) or layout
        if layout is not None:
            found.append((stack, layout))
    if not found:
        distinct = [path for path, kind in kinds.items() if path == kind]
        layout = next((layout for layout in LAYOUTS if not layout.loose and layout.follows(distinct, [])), None)
        if layout is not None:
            found.append((Stack("", 1, None, dict.fromkeys(shapes, 0)), layout))
    # Where no names are known, the repeated modules with the most leaves are taken for the blocks.
    repeated = max((stack for stack in candidates if stack.count > 1), key=lambda stack: len(stack.leaves), default=None)
    around = [stack for stack, _ in found if stack.path] or ([repeated] if repeated else [])
    inside = {path for stack in around for path in stack.leaves}
    return _View(shapes, kinds, tuple(found), [path for path in shapes if path not in inside])


def _read(stack: Stack, leaves: Iterable[Path], shapes: Shapes) -> Layout | None:
    """The layout of a stack's blocks as their structure and shapes show it."""
    if stack.count < 2:
        return None
    return structure.layout_of({stack.inside(path): stack.shape_inside(shapes[path]) for path in leaves})


# --- roles -----------------------------------------------------------------------------------------------------------------------------


def find(params: Params, target: str, *, option: str = "target", required: bool = True) -> list[Path]:
    """The leaves that have a role, in the order of the tree.

    Args:
      params: As for `blocks`.
      target: A role, or several: ``"@attention_out|@ffn_out"``. For a projection its weight is meant, for a normalisation, a pooler or a
        head all leaves; ``"@query/bias"`` names the leaf.
      option: Name of the method's option, for the message.
      required: Whether it is an error if no leaf has one of the roles.

    In blocks that follow a layout of the table, that layout's names count. A model that follows none is searched for the names of all
    layouts, and a name that has different roles in different layouts is an error.

    Raises:
      ValueError: if a role does not exist, stands for modules, is not found, or could be another; the message shows what there is.

    >>> find({"mlp/up/kernel": (8, 16), "mlp/down/kernel": (16, 8)}, "@ffn_in|@ffn_out")
    ['mlp/up/kernel', 'mlp/down/kernel']
    """
    view, wanted = _view(params), parse(target)
    for role, _ in wanted:
        if role in MODULES:
            raise ValueError(f"'{role}' is {MEANING[role]}: it stands for modules and has no leaves. See `jpeft.layouts.modules`.")
    hits = {path for one in wanted for path, _ in _leaves(view, one, {role for role, _ in wanted}, option)}
    if required and not hits:
        raise ValueError(_nothing(view, target, wanted, option))
    return [path for path in view.shapes if path in hits]


def modules(params: Params, target: str, *, option: str = "target", required: bool = True) -> list[RoleModule]:
    """The modules that have a role, each with the leaf that tells how wide its output is.

    Args:
      params: As for `blocks`.
      target: As for `find`; also ``"@ffn"``, ``"@ffn_residual"`` and ``"@block"``. If several leaves belong to one module, the
        first of them tells its width.
      option: As for `find`.
      required: As for `find`.

    Raises:
      ValueError: as for `find`.

    >>> shapes = {"h_0/mlp/up/kernel": (8, 16), "h_0/mlp/down/kernel": (16, 8)}
    >>> [module.path for role in ("@ffn_out", "@ffn", "@block") for module in modules(shapes, role)]
    ['h_0/mlp/down', 'h_0/mlp', 'h_0']
    """
    view, wanted = _view(params), parse(target)
    out: dict[Path, RoleModule] = {}
    for role, leaf in wanted:
        told_by = _TOLD_BY.get(role, Wanted(role, leaf))
        for path, layout in _leaves(view, told_by, {told_by.role}, option):
            module = _module(role, path, layout)
            if module is not None:
                out.setdefault(module, RoleModule(module, role, path))
    if required and not out:
        raise ValueError(_nothing(view, target, wanted, option))
    order = {path: i for i, path in enumerate(view.shapes)}
    return sorted(out.values(), key=lambda module: order[module.leaf])


def _module(role: Role, path: Path, layout: Layout) -> Path | None:
    """The module with a role that a leaf tells of."""
    if role is Role.BLOCK:
        match = layout.match(Role.FFN_OUT, path)
        return None if match is None else match.prefix
    if role in MODULES:
        pattern = layout.pattern(role)
        match = container(pattern).fullmatch(path) if pattern else None
        return None if match is None else match["module"]
    return path.rpartition("/")[0]


def _leaves(view: _View, wanted: Wanted, among: set[Role], option: str) -> list[tuple[Path, Layout]]:
    """The leaves with a role, each with the layout that says so."""
    if wanted.role in OUTER or wanted.role is Role.NORMS:
        paths = view.outside if wanted.role in OUTER else list(view.shapes)
        return _matching(view, wanted, paths, list({layout.name: layout for _, layout in view.blocks}.values()) or [PLAIN])
    if view.blocks:
        return [hit for stack, layout in view.blocks for hit in _matching(view, wanted, stack.leaves, [layout])]
    strict = [layout for layout in LAYOUTS if not layout.loose]
    hits = _matching(view, wanted, view.shapes, strict)
    for path in dict.fromkeys(view.kinds[path] for path, _ in hits if wanted.role in PROJECTIONS):
        others = {role for role in PROJECTIONS for layout in strict if role not in among and layout.match(role, path)}
        if others:
            raise ValueError(
                f"{option}: '{path}' could be {MEANING[wanted.role]} ('{wanted.role}') or {MEANING[min(others)]} ('{min(others)}'), and "
                f"the model follows no known layout that would tell. Name the modules instead: {option}={[path.rpartition('/')[0]]!r}."
            )
    return hits


def _matching(view: _View, wanted: Wanted, paths: Iterable[Path], layouts: list[Layout]) -> list[tuple[Path, Layout]]:
    """The leaves that the first of the layouts that says so gives a role, with that layout. Only one of each kind is compared."""
    answers: dict[Path, Layout | None] = {}
    out = []
    for path in paths:
        kind = view.kinds[path]
        if kind not in answers:
            answers[kind] = next((layout for layout in layouts if layout.has(wanted, kind, view.shapes[kind])), None)
        layout = answers[kind]
        if layout is not None:
            out.append((path, layout))
    return out


# --- the message -----------------------------------------------------------------------------------------------------------------------


def _nothing(view: _View, target: str, wanted: list[Wanted], option: str) -> str:
    """Say what was looked for, where, and which leaves could be meant."""
    roles = list(dict.fromkeys(role for role, _ in wanted))
    names = sorted({leaf for _, leaf in wanted if leaf is not None})
    layouts = {layout.name: layout for _, layout in view.blocks}
    searched = [*layouts.values()] or [layout for layout in LAYOUTS if not layout.loose]
    known = [layout.pattern(Role.FFN_OUT if role is Role.BLOCK else role) for role in roles for layout in searched]
    names_of = "; ".join(MEANING[role] for role in roles)
    follows = f"Its blocks follow the layout {', '.join(map(repr, layouts))}" if layouts else "It follows no known layout"
    looked = " | ".join(dict.fromkeys(filter(None, known))) or "no names, as this layout has no such module"
    candidates = _candidates(view)
    shown = ", ".join(f"'{path}' {shape}" for path, shape in list(candidates.items())[:12]) or "(none)"
    more = f", ... ({len(candidates)} kinds)" if len(candidates) > 12 else ""
    example = next(iter(candidates), "block/*/down/kernel")
    regex, name = example.replace("*", r"\d+"), re.split(r"\*/", example)[-1].rpartition("/")[0] or example
    return (
        f"{option}={target!r}: no parameter of the model has this role ({names_of}{', leaf ' + ', '.join(names) if names else ''}). "
        f"{follows}; looked for: {looked}. "
        f"Candidates, the kernels of {'repeated modules' if _repeated(view.shapes) else 'the model'}: {shown}{more}. "
        f"Name the right ones by a regex, such as {option}=r'{regex}', or by a list of names, such as {option}={[name]!r}."
    )


def _repeated(shapes: Shapes) -> list[Path]:
    return [path for stack in stacks(shapes) if stack.count > 1 for path in stack.leaves]


def _candidates(view: _View) -> dict[str, Any]:
    """The kernels that a role could be meant for, numbers replaced by stars."""
    paths = _repeated(view.shapes) or list(view.shapes)
    is_kernel = lambda path: not path.endswith("bias") and len(view.shapes[path] or (1, 1)) > 1
    return {re.sub(r"(?<=[/_])\d+(?=/)", "*", path): view.shapes[path] or "" for path in paths if is_kernel(path)}
