"""How the tests write down the parameter tree of a family: its names and shapes, two tiny blocks, and which leaf has which role.

A tree is written as lines, ``name shape`` for each layer or leaf. Braces stand for alternatives: ``self_attn/{q,k}_proj D>D``.

* ``D>F``: a kernel of these inputs and outputs, and a bias; ``D>F nobias`` has none; ``D>F w`` calls the kernel ``w``;
* ``norm``: scale and bias; ``rms``: a scale alone;
* ``V,D``: one leaf of that name and shape.
"""

import dataclasses
import itertools
import re

Shapes = dict[str, tuple[int, ...]]

# D width, F inner width, N heads, M heads of keys and values, K head_dim, V vocabulary, P positions, C classes, E experts, W patch.
SIZES = {"D": 12, "F": 48, "N": 3, "M": 1, "K": 4, "V": 23, "P": 17, "C": 5, "E": 2, "W": 7}
BLOCKS = 2


def expand(text: str) -> list[str]:
    """All names that braces stand for.

    >>> expand("self_attn/{q,k}_proj/{kernel,bias}")
    ['self_attn/q_proj/kernel', 'self_attn/q_proj/bias', 'self_attn/k_proj/kernel', 'self_attn/k_proj/bias']
    """
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def leaves(lines: str) -> Shapes:
    """The leaves that lines stand for.

    >>> leaves("mlp/{up,gate} D>F nobias")
    {'mlp/up/kernel': (12, 48), 'mlp/gate/kernel': (12, 48)}
    """
    out: Shapes = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        names, shape, *options = line.split()
        for name in expand(names):
            if shape in ("norm", "rms"):
                out |= {f"{name}/{leaf}": (SIZES["D"],) for leaf in ("scale", "bias")[: 1 + (shape == "norm")]}
            elif ">" in shape:
                inputs, outputs = map(_sizes, shape.split(">"))
                out[f"{name}/{'w' if 'w' in options else 'kernel'}"] = (*inputs, *outputs)
                if not options:
                    out[f"{name}/bias"] = outputs
            else:
                out[name] = _sizes(shape)
    return out


def _sizes(text: str) -> tuple[int, ...]:
    """``"3D,K"``: three times the width, and the width of a head."""
    sizes = [re.fullmatch(r"(\d*)([A-Z]?)", part) for part in text.split(",")]
    return tuple(int(size[1] or 1) * SIZES.get(size[2], 1) for size in sizes if size)


@dataclasses.dataclass(frozen=True)
class Part:
    """One stack of blocks.

    Attributes:
      at: Path of a block, with ``{i}`` for its number.
      block: The leaves of a block, as lines.
      roles: Which leaves of a block have which role, separated by spaces. For ``@ffn``, ``@ffn_residual`` and ``@block`` they are modules,
        and "." is the block itself. No leaf has the roles that are not named here.
    """

    at: str
    block: str
    roles: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's parameters and what is to be found among them.

    Attributes:
      name: Of the family.
      layout: Name of the layout that it follows.
      parts: Its stacks of blocks.
      outside: The leaves outside the blocks, as lines.
      roles: As for `Part`, for what is outside the blocks.
      uneven: Leaves of one block alone, as lines with whole paths. They have no role, and stacked blocks cannot have them.
    """

    name: str
    layout: str
    parts: tuple[Part, ...]
    outside: str
    roles: dict[str, str]
    uneven: str = ""

    def shapes(self, form: str = "numbered") -> Shapes:
        """The tree with its blocks "numbered", "stacked" on their leaves' first axis, or "stacked-1" on their second."""
        out = leaves(self.outside) | (leaves(self.uneven) if form == "numbered" else {})
        for part in self.parts:
            for name, shape in leaves(part.block).items():
                if form == "numbered":
                    out |= {f"{part.at.format(i=i)}/{name}": shape for i in range(BLOCKS)}
                else:
                    at = form == "stacked-1"
                    out[f"{container(part, form)}/{name}"] = (*shape[:at], BLOCKS, *shape[at:])
        return dict(sorted(out.items()))

    def expected(self, role: str, form: str = "numbered") -> set[str]:
        """The leaves (or modules) that have a role."""
        out = {name for names in self.roles.get(role, "").split() for name in expand(names)}
        for part in self.parts:
            for i in range(BLOCKS) if form == "numbered" else ("",):
                block = part.at.format(i=i) if form == "numbered" else container(part, form)
                names = [name for names in part.roles.get(role, "").split() for name in expand(names)]
                out |= {block if name == "." else f"{block}/{name}" for name in names}
        return out


def container(part: Part, form: str) -> str:
    """Path of a stack of blocks, without their numbers. `nn.scan` calls a class Block ScanBlock_0 where its user gives no name."""
    path = re.sub(r"[/_]\{i\}", "", part.at)
    return f"Scan{path}_0" if form != "numbered" and path == "EncoderBlock" else path
