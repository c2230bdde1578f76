"""MULTITASK_PROMPT_TUNING: a prompt that tasks share, times a factor of low rank for each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpeft.additive.prompts.multitask_prompt_tuning import COLS, ROWS, SHARED, MultitaskPromptTuning
from jpeft.core.method import Method
from jpeft.hf_peft import prompts
from jpeft.hf_peft.config import ANY, COUNT, Config, Key
from jpeft.hf_peft.formats.base import Arrays, File, Shapes, Written
from jpeft.hf_peft.formats.prompt_tuning import PromptTuningFormat
from jpeft.hf_peft.sites import Base, Site
from jpeft.tree.adapters import ADDED
from jpeft.tree.paths import Path

_TENSORS = {SHARED: prompts.TENSOR, COLS: "prefix_task_cols", ROWS: "prefix_task_rows"}


class MultitaskPromptTuningFormat(PromptTuningFormat):
    """The leaves have HF PEFT's shapes: ``prompt_embeddings`` is ``shared``, ``prefix_task_cols`` and ``prefix_task_rows`` the factors."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    methods = ("multitask_prompt_tuning",)
    bare = tuple(_TENSORS.values())
    keys = dict(PromptTuningFormat.keys) | {
        "num_tasks": Key(1, COUNT),
        "num_ranks": Key(1, COUNT),
        "prompt_tuning_init_state_dict_path": Key(None, ANY),
        "prompt_tuning_init_task": Key(0, ANY),
    }

    def expected(self, config: Config, base: Base, sites: Sequence[Site], rename: Callable[[str], str]) -> Shapes:
        """The prompt and the factors."""
        shared = super().expected(config, base, sites, rename)
        rows, width = shared[prompts.TENSOR]
        tasks, rank = config["num_tasks"], config["num_ranks"]
        return shared | {_TENSORS[COLS]: (tasks, rows, rank), _TENSORS[ROWS]: (tasks, rank, width)}

    def load(self, file: File, sites: Sequence[Site]) -> tuple[Method, Arrays]:
        """`jpeft.multitask_prompt_tuning`."""
        prompt: Any = self._method(file.config, file.base, file.head)
        about = {"tasks": file.config["num_tasks"], "rank": file.config["num_ranks"]}
        method = MultitaskPromptTuning(length=prompt.length, edges=prompt.edges, body=prompt.body, head=prompt.head, **about)
        module = method.site(file.base.params).module
        return method, {f"{module}/{ADDED}/{name}": file.read(tensor) for name, tensor in _TENSORS.items()}

    def save(self, method: Any, leaves: Mapping[Path, Any], base: Base) -> Written:
        """The prompt and the factors; the tasks of the examples of a batch are no part of an adapter."""
        own = {path.rpartition("/")[2]: leaf for path, leaf in leaves.items()}
        written = super().save(method, {SHARED: own[SHARED]}, base)
        factors = {_TENSORS[name]: prompts.as_rows(own[name]) for name in (COLS, ROWS)}
        config = {"num_tasks": method.tasks, "num_ranks": method.rank}
        return Written(dict(written.tensors) | factors, written.config | config)
