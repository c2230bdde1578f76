"""A layout: the regexes by which one naming scheme is read."""

import dataclasses
import functools
import re
from typing import NamedTuple

from jpeft.layouts.roles import ATTENTION_INPUTS, NORMALISATIONS, OUTER, PROJECTIONS, Role, Wanted
from jpeft.tree.paths import Path

# Names outside the blocks, and of normalisations, hardly differ between families, so all layouts share them.
NORMS = (
    r"(?!(q|k|query|key)_)([^/]*([Ll]ayer_?[Nn]orm|rmsnorm|RMSNorm)[^/]*|ln_\w+|ln\d*|norm\w*|"
    r"(\w+_)?(attention|ffn|ffw|mlp|final|encoder|decoder|encoderdecoder)_norm)"
)
FINAL_NORM = r"ln_f|final_?layer_?norm|final_norm|norm|layer_?norm|encoder_norm|decoder_norm|encoderdecoder_norm|ln_post|post_layernorm|ln"
EMBEDDING = (
    r"(word_embeddings|wte|embed_tokens(/weight)?|token_embeddings?|tok_embeddings|token_embedder|embedder|embed|embed_in|embeddings?|shared|"
    r"Embed_0)/embedding|embedder/(input_embedding|input_emb)"
)
POSITIONS = r"(position_embeddings?|wpe|embed_positions|pos_embed)/embedding|position_embeddings|(posembed_\w+/)?pos_embeddings?"
HEAD = r"pre_classifier|classifier|score|qa_outputs|classification_head"
LM_HEAD = r"lm_head|cls|vocab_\w+|embed_out|proj_out|(decoder/)?logits?_?dense|generator_(lm_head|predictions)|discriminator_predictions"


class Match(NamedTuple):
    """Where a role was found in the path of a leaf."""

    prefix: str  # path of what is around the named module: in a block, of the block
    rest: str  # what follows the module's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One naming scheme: a row of the table.

    Each role has a regex for the path of a module from the block on; what stands around the block is free. An empty one means that the
    scheme has no such module.

    Attributes:
      name: Of the scheme.
      families: Which model families follow it.
      ffn: The module around the feed-forward layer: what it reads is the layer's input, what it returns its output.
      ffn_residual: The module that is called with the feed-forward layer's output and the residual, and adds them.
      enclosed: Every text stands between a first and a last token that are no words, as [CLS] and [SEP], and every token sees all others.
      without: Regex of modules outside the blocks that a tree of this scheme does not have. It tells schemes with equal blocks apart.
      loose: The names are too common to be looked for in a tree that follows no scheme.
      weights: Names of the leaf that holds the weight of a projection; "" where the projection itself is the leaf.
      norm_leaves: Names of a normalisation's leaves.
    """

    name: str
    families: str
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    kv: str = ""
    attention_out: str = ""
    cross_attention_out: str = ""
    ffn_in: str = ""
    ffn_out: str = ""
    ffn: str = ""
    ffn_residual: str = ""
    post_norm: str = ""
    norms: str = NORMS
    final_norm: str = FINAL_NORM
    embedding: str = EMBEDDING
    positions: str = POSITIONS
    pooler: str = "pooler"
    head: str = HEAD
    lm_head: str = LM_HEAD
    enclosed: bool = False
    without: str = ""
    loose: bool = False
    weights: tuple[str, ...] = ("kernel", "w")
    norm_leaves: tuple[str, ...] = ("scale", "bias", "weight", "w")

    def pattern(self, role: Role) -> str:
        """The regex of a role."""
        return "" if role in (Role.ATTENTION_IN, Role.BLOCK) else getattr(self, role.removeprefix("@"))

    def match(self, role: Role, path: Path) -> Match | None:
        """Where the modules with a role are in the path of one of their leaves, whichever leaf that is."""
        pattern = self.pattern(role)
        found = _compiled(role, pattern).fullmatch(path) if pattern else None
        if found is None or (role in NORMALISATIONS and found["rest"].removeprefix("/") not in self.norm_leaves):
            return None
        return Match(found["prefix"] or "", found["rest"])

    def has(self, wanted: Wanted, path: Path, shape: tuple[int, ...] | None) -> Match | None:
        """Where in the path of a leaf its role is; None if it is not the leaf that is wanted."""
        match = self.match(wanted.role, path)
        if match is None:
            return None
        if wanted.leaf is not None:
            return match if match.rest.endswith(f"/{wanted.leaf}") else None
        if wanted.role in PROJECTIONS:
            is_weight = match.rest.removeprefix("/") in self.weights
            return match if is_weight and (shape is None or len(shape) > 1) else None
        return match

    def follows(self, block: list[Path], outside: list[Path]) -> bool:
        """Whether blocks with these leaves, and these outside them, are named by this scheme."""
        has = lambda role: any(self.match(role, path) for path in block)
        if not any(has(role) for role in ATTENTION_INPUTS):
            return False
        needed = [role for role in (Role.ATTENTION_OUT, Role.FFN_IN, Role.FFN_OUT, Role.POST_NORM) if self.pattern(role)]
        if not all(has(role) for role in needed):
            return False
        return not (self.without and any(_compiled(Role.FINAL_NORM, self.without).fullmatch(path) for path in outside))


@functools.cache
def _compiled(role: Role, pattern: str) -> re.Pattern[str]:
    """The regex of a whole path, with the groups ``prefix`` and ``rest``; the shortest prefix is tried first."""
    anywhere = r"((?P<prefix>.*?)/)??"
    # Heads are at the top of a tree; the names of normalisations are common enough to be excluded near embeddings.
    start = {Role.HEAD: "(?P<prefix>)", Role.LM_HEAD: "(?P<prefix>)", Role.FINAL_NORM: f"(?!.*embed){anywhere}"}.get(role, anywhere)
    rest = {Role.EMBEDDING: "", Role.POSITIONS: ""}
    rest |= {role: "(/.*)?" for role in OUTER if role not in rest}
    return re.compile(rf"{start}({pattern})(?P<rest>{rest.get(role, '(/[^/]+)?')})")


@functools.cache
def container(pattern: str) -> re.Pattern[str]:
    """The regex of a leaf below a module whose path ends in `pattern`, with the group ``module``."""
    return re.compile(rf"(?P<module>(.*?/)??({pattern}))/.+")
