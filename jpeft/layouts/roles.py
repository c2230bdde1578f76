"""Roles: what a module does in a transformer, under one name for all families."""

import difflib
import enum
import re
from typing import NamedTuple


class Role(enum.StrEnum):
    """A role. Its value is the string that a method's option may hold, such as ``target="@ffn_out"``."""

    # Projections in the blocks: a role stands for their weights.
    QUERY = "@query"
    KEY = "@key"
    VALUE = "@value"
    QKV = "@qkv"
    KV = "@kv"
    ATTENTION_IN = "@attention_in"
    ATTENTION_OUT = "@attention_out"
    CROSS_ATTENTION_OUT = "@cross_attention_out"
    FFN_IN = "@ffn_in"
    FFN_OUT = "@ffn_out"
    # Modules around them: `jpeft.layouts.modules` finds these.
    FFN = "@ffn"
    FFN_RESIDUAL = "@ffn_residual"
    BLOCK = "@block"
    # Normalisations: a role stands for all their leaves.
    NORMS = "@norms"
    POST_NORM = "@post_norm"
    FINAL_NORM = "@final_norm"
    # Outside the blocks.
    EMBEDDING = "@embedding"
    POSITIONS = "@positions"
    POOLER = "@pooler"
    HEAD = "@head"
    LM_HEAD = "@lm_head"


MEANING: dict[Role, str] = {
    Role.QUERY: "the projection to queries, in self- and cross-attention",
    Role.KEY: "the projection to keys, in self- and cross-attention",
    Role.VALUE: "the projection to values, in self- and cross-attention",
    Role.QKV: "one projection to queries, keys and values together",
    Role.KV: "one projection to keys and values together",
    Role.ATTENTION_IN: "all projections into attention: queries, keys and values, apart or together",
    Role.ATTENTION_OUT: "the projection out of self-attention",
    Role.CROSS_ATTENTION_OUT: "the projection out of cross-attention",
    Role.FFN_IN: "the projections into the feed-forward layer, its gate included",
    Role.FFN_OUT: "the projection out of the feed-forward layer",
    Role.FFN: "the module whose input and output are those of the feed-forward layer",
    Role.FFN_RESIDUAL: "the module that adds its second input, the residual, to the output of the feed-forward layer",
    Role.BLOCK: "the module whose output is the hidden state behind the feed-forward layer's residual sum",
    Role.NORMS: "the normalisations of hidden states, in and around the blocks; those of queries and keys are not among them",
    Role.POST_NORM: "the normalisation of the feed-forward layer's residual sum, in post-norm blocks",
    Role.FINAL_NORM: "the normalisation behind the last block",
    Role.EMBEDDING: "the table of word embeddings",
    Role.POSITIONS: "the table of positions",
    Role.POOLER: "the pooler",
    Role.HEAD: "the task head",
    Role.LM_HEAD: "the head of a language model",
}

ATTENTION_INPUTS = (Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.KV)
PROJECTIONS = (*ATTENTION_INPUTS, Role.ATTENTION_OUT, Role.CROSS_ATTENTION_OUT, Role.FFN_IN, Role.FFN_OUT)
MODULES = (Role.FFN, Role.FFN_RESIDUAL, Role.BLOCK)
NORMALISATIONS = (Role.NORMS, Role.POST_NORM)
OUTER = (Role.EMBEDDING, Role.POSITIONS, Role.POOLER, Role.FINAL_NORM, Role.HEAD, Role.LM_HEAD)


class Wanted(NamedTuple):
    """One alternative of a target: a role, and the leaf of its modules; None for the leaf or leaves that the role stands for."""

    role: Role
    leaf: str | None


def is_role(target: object) -> bool:
    """Whether a target names roles rather than being a regex or the name of a module.

    >>> is_role("@ffn_out"), is_role(".*/ffn_out/kernel"), is_role("ffn_out")
    (True, False, False)
    """
    return isinstance(target, str) and target.startswith("@")


def parse(target: str) -> list[Wanted]:
    """The alternatives of a target.

    >>> parse("@query/bias|@attention_out")
    [Wanted(role=<Role.QUERY: '@query'>, leaf='bias'), Wanted(role=<Role.ATTENTION_OUT: '@attention_out'>, leaf=None)]

    Raises:
      ValueError: for a role that does not exist.
    """
    out: list[Wanted] = []
    for part in target.split("|"):
        match = re.fullmatch(r"(@\w+)(?:/(\w+))?", part.strip())
        if match is None or match[1] not in set(Role):
            close = difflib.get_close_matches(part, [*Role], n=1, cutoff=0.5)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"'{part}' in '{target}' is not a role.{hint} The roles are {', '.join(Role)}.")
        role = Role(match[1])
        roles = ATTENTION_INPUTS if role is Role.ATTENTION_IN else (role,)
        out += [Wanted(role, match[2]) for role in roles]
    return out
