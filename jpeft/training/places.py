"""Where the base and the data of a run are now: a run records where they were, and folders move.

A place that is given counts. Else the recorded one is looked up, and then the one that lies to the run as the recorded one did, so that a
project with models, data and runs may move as a whole. Fingerprints decide whether what is found is what the run was trained on; the place
itself does not matter.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jpeft.training.config import TrainConfig

Place = str | os.PathLike[str]

# The settings that name a place. A run may be continued with another one if the fingerprints agree.
PLACES = ("model", "data")


def find_places(config: TrainConfig, run: Place, *, model: Place | None = None, data: Place | None = None) -> TrainConfig:
    """Return the configuration of a run with the places where its base and its data are now.

    Args:
      config: The configuration that the run records.
      run: The run's folder, where it is now.
      model: Folder or hub id of the base; None to look for it.
      data: The data; None to look for it. Data that is not found keeps its recorded place, for most uses of a run need none.

    Raises:
      ValueError: if the recorded base is a folder that is not there.
    """
    here = {name: os.fspath(given) for name, given in (("model", model), ("data", data)) if given is not None}
    for name in (name for name in PLACES if name not in here):
        recorded = getattr(config, name)
        here[name] = next((place for place in _candidates(recorded, config.output, run) if os.path.exists(place)), recorded)
        if name == "model" and not os.path.exists(here[name]) and _names_a_folder(recorded):
            raise ValueError(
                f"The base of the run in {run} was in {recorded}, and there is nothing now: say where it is with --model (in Python "
                "model=...). The same base is accepted anywhere."
            )
    # A revision is one of the hub.
    revision = None if os.path.exists(here["model"]) else config.revision
    return dataclasses.replace(config, revision=revision, **here)


def _candidates(recorded: str, output: str, run: Place) -> Iterator[str]:
    """Where something may be that a run of the recorded folder `output` found at `recorded`, the likeliest first."""
    beside = None
    # What lay in the recorded folders alike lies to the run as before, if the two moved together.
    if os.path.isabs(recorded) == os.path.isabs(output):
        beside = os.path.normpath(Path(run).absolute() / os.path.relpath(recorded, output))
    # A relative place counts from the folder in which the run was begun, which need not be the present one.
    places = (os.path.expanduser(recorded), beside) if os.path.isabs(recorded) else (beside, os.path.expanduser(recorded))
    yield from filter(None, places)


def _names_a_folder(model: str) -> bool:
    """Whether a model is a path and cannot be a hub id, "name" or "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) is None
