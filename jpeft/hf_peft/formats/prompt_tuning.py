"""PROMPT_TUNING, and P_TUNING, whose network HF PEFT leaves out of the file: rows in front of the text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.additive.prompts.p_tuning import PTuning
from jpeft.additive.prompts.prompt_method import PromptMethod
from jpeft.additive.prompts.prompt_tuning import PromptTuning
from jpeft.core.method import Method
from jpeft.hf_peft import prompts
from jpeft.hf_peft.config import Config
from jpeft.hf_peft.formats.base import Arrays, File, Format, Shapes, Written
from jpeft.hf_peft.sites import Base, Site
from jpeft.tree.paths import Path


class PromptTuningFormat(Format):
    """``prompt_embeddings`` is the prompt [rows, width].

    HF PEFT puts it in front of the whole text, [CLS] included, and a classifier of texts then reads its first row: ``edges=(0, 0)`` and
    ``body=""``.
    """

    peft_type = "PROMPT_TUNING"
    methods = ("prompt_tuning",)
    prefix = "base_model."
    bare = (prompts.TENSOR,)
    needs_head = True
    keys = prompts.keys("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")

    def check(self, config: Config, base: Base) -> None:
        """Refuse prompts that jpeft's models cannot have."""
        prompts.check_prompt(config, base)

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The prompt."""
        return {prompts.TENSOR: (config["num_virtual_tokens"], self._method(config, base, None).site(base.params).width)}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """The method, and its prompt."""
        method = self._method(file.config, file.base, file.head)
        return method, {method.site(file.base.params).prompt_path: file.read(prompts.TENSOR)}

    def _method(self, config: Config, base: Base, head: str | None) -> PromptMethod:
        # A classifier that pools outside of the body would read [CLS].
        body = "" if base.task == "SEQ_CLS" else None
        return self.made(length=config["num_virtual_tokens"], edges=(0, 0), body=body, head=head)

    def made(self, **options: Any) -> PromptMethod:
        """`jpeft.prompt_tuning`."""
        return PromptTuning(**options)

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The prompt."""
        prompts.require_task(base, "prompts")
        site = method.site(base.params)
        if method.template is not None:
            raise ValueError("HF PEFT puts all rows of a prompt in front of the text, and this one has a template.")
        if site.edges != (0, 0):
            raise ValueError(
                f"HF PEFT puts a prompt in front of the whole text, [CLS] included, and this one stands behind {site.edges[0]} of its "
                "tokens, so the outputs would differ. Train with edges=(0, 0) to export."
            )
        if base.task == "SEQ_CLS" and site.body and not any(module.startswith(f"{base.body}pooler") for module in base.modules):
            raise ValueError(
                "With a prompt in front, the classifier reads its first row in HF PEFT, and [CLS] here, so the outputs would differ. Train "
                "with body='' to export."
            )
        (rows,) = leaves.values()
        return Written({prompts.TENSOR: prompts.as_rows(rows)}, self.details(method, base) | prompts.sizes(base, site.width, site.rows))

    def details(self, method: Any, base: Base) -> dict[str, Any]:
        """The keys beside the sizes. A start from a text would ask for a tokenizer."""
        return {"prompt_tuning_init": "RANDOM"}


class PTuningFormat(PromptTuningFormat):
    """``prompt_embeddings`` is what the network makes. The network itself is in the file for training."""

    peft_type = "P_TUNING"
    methods = ("p_tuning",)
    keys = prompts.keys("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")

    def made(self, **options: Any) -> PromptMethod:
        """`jpeft.p_tuning` without the network."""
        return PTuning(encoder="none", **options)

    def details(self, method: Any, base: Base) -> dict[str, Any]:
        """The kind of network; HF PEFT makes it only to train."""
        return {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0, "encoder_hidden_size": None}
