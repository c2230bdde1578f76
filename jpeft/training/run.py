"""Opening a finished run again."""

import dataclasses
import os
from typing import Any

import jpeft
from jpeft import models
from jpeft.checkpoint.adapter import read_record
from jpeft.core.peft import Peft
from jpeft.distributed import gather_to_host, on_first_process
from jpeft.tasks.task import Task, task_of
from jpeft.training.base_files import check_base_files
from jpeft.training.build import load_base
from jpeft.training.config import TrainConfig, from_json
from jpeft.training.finite import explain
from jpeft.training.run_folder import RunFolder, config_checksum
from jpeft.tree.finite import not_finite
from jpeft.tree.paths import first_few


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, loaded.

    Attributes:
      folder: Its files.
      config: Its configuration.
      task: What the model was trained for.
      labels: Names of the classes, in the order of the logits.
      loaded: The pretrained model.
      peft: The base with the trained adapter, without the parts that only training needs (`jpeft.fold`).
    """

    folder: RunFolder
    config: TrainConfig
    task: Task
    labels: tuple[str, ...]
    loaded: models.Loaded
    peft: Peft

    def configured(self, **changes: Any) -> "Run":
        """Return the run with other values of settings that do not change its model, such as `overlong`.

        Raises:
          ValueError: for a setting that the task has no use for.
        """
        config = dataclasses.replace(self.config, **changes)
        return dataclasses.replace(self, config=config, task=task_of(config))


def open_run(path: str | os.PathLike[str]) -> Run:
    """Load the model of a finished run with its adapter.

    Raises:
      ValueError: if `path` holds no finished run, or the base is not the one that the adapter was trained on.
    """
    folder = RunFolder(path)
    on_first_process(folder.tidy)
    about = folder.read_config()
    if not folder.adapter.exists():
        raise ValueError(f"The run in {folder.path} is not finished: continue it with --resume.")
    config = from_json(about["run"])
    labels = tuple(about["labels"])
    check_belongs(folder, about)
    loaded = load_base(config, labels)
    check_base_files(about.get("base_files"), loaded.folder, folder.path)
    peft = jpeft.fold(jpeft.load(folder.adapter, loaded.params))
    return Run(folder, config, task_of(config), labels, loaded, peft)


def check_belongs(folder: RunFolder, about: dict[str, Any]) -> None:
    """Check that a run's adapter was trained with the run's configuration. Adapters of earlier versions do not say it, and pass.

    Raises:
      ValueError: if it was not, or its record is damaged.
    """
    run = read_record(folder.adapter).get("run")
    if run is not None and run != config_checksum(about):
        raise ValueError(f"The adapter in {folder.adapter} is not that of the run that {folder.config} records: one of them was replaced.")


def save_merged(folder: str | os.PathLike[str], loaded: models.Loaded, peft: Peft) -> None:
    """Write the merged model as a Hugging Face folder with its labels and tokenizer; the folder may exist if it is empty.

    If there are several processes, all must call this, and each holds the whole model in its host's memory for a while.

    Raises:
      ValueError: the method's reason, if it cannot merge; if the merged weights are not finite.
    """
    params = gather_to_host(jpeft.merge(peft))
    if bad := not_finite(params):
        raise ValueError(f"The merged weights are not finite, in {first_few(bad, 3)}. {explain(peft)}")
    write = lambda: models.save(folder, loaded.model, params, labels=loaded.labels, tokenizer=loaded.tokenizer, overwrite=True)
    on_first_process(write)
