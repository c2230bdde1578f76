"""TRAINABLE_TOKENS: rows of embeddings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.core.chain import chain
from jpeft.core.method import Method
from jpeft.hf_peft import targets, whole
from jpeft.hf_peft.config import INDICES, TARGETS, Config, Key
from jpeft.hf_peft.formats.base import Arrays, File, Format, Shapes, Written
from jpeft.hf_peft.sites import Base, Site
from jpeft.tree.paths import Path

ROWS = "trainable_tokens_delta"


class TrainableTokensFormat(Format):
    """``trainable_tokens_delta`` holds the new rows themselves, in the order of `token_indices`."""

    peft_type = "TRAINABLE_TOKENS"
    methods = ("trainable_tokens",)
    saves_modules = False
    follows_ties = True
    keys = {"token_indices": Key([], INDICES), "target_modules": Key(None, TARGETS), "init_weights": Key(True)}

    def check(self, config: Config, base: Base) -> None:
        """Refuse an adapter without tokens."""
        if not config["token_indices"]:
            raise config.error("token_indices names no tokens.")

    def targets(self, config: Config, base: Base, rename: Callable[[str], str]) -> list[Site]:
        """The tables."""
        tables = {rename(module): site for module, site in whole.token_tables(base).items()}
        if config["target_modules"] is None:
            if base.word is None:
                raise config.error("target_modules is not given, and the model has no word embedding that jpeft knows.")
            found = [base.word]
        else:
            found = [tables[name] for name in targets.chosen(config, tables, base)]
        if not found:
            raise config.error(f"target_modules={config['target_modules']!r} chooses no table of embeddings: {', '.join(tables)}.")
        if (last := max(config["token_indices"])) >= (rows := min(site.shape[0] for site in found)):
            raise config.error(f"token_indices has the token {last}, but the table has {rows} rows.")
        return found

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The rows of each table."""
        return {f"{module}.{ROWS}": (len(config["token_indices"]), site.shape[1]) for module, site in _tables(sites, base).items()}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """`jpeft.trainable_tokens`; a chain for several tables."""
        tables = {f"{site.module}.{ROWS}": (site, tuple(file.config["token_indices"])) for site in sites}
        parts = whole.token_parts(tables, file.base, file.read)
        if len(parts) == 1:
            return next(iter(parts.values()))
        leaves = {f"{name}/{path}": leaf for name, (_, own) in parts.items() for path, leaf in own.items()}
        return chain(**{name: method for name, (method, _) in parts.items()}), leaves

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The new rows."""
        rows = whole.token_tensors(method, leaves, base)
        tables = [base.kernels[module] for module in rows]
        return Written(
            {f"{module}.{ROWS}": rows[site.module] for module, site in _tables(tables, base).items()},
            {
                "token_indices": list(method.tokens),
                "target_modules": targets.names_for(list(rows), base.modules),
                "init_weights": True,
            },
        )


def _tables(sites: Sequence[Site], base: Base) -> dict[str, Site]:
    """The tables by module. HF PEFT repeats the rows of the word embedding for a head that is tied to it."""
    own = {site.module: site for site in sites}
    return own | ({base.tied: base.word} if base.tied is not None and base.word is not None and base.word.module in own else {})
