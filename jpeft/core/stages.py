"""Stages of training: how one leads to the next, and which steps of a run belong to which."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jpeft.core.statistics import Statistic, kinds_of
from jpeft.deprecation import renamed_fields


@renamed_fields(needs="requires_stats", restart="restart_schedule")
@dataclasses.dataclass(frozen=True)
class Stage:
    """A later stage of training, and how to get there from the stage before it.

    Attributes:
      name: Its name in logs.
      share: Its share of the training steps, counted from the beginning of the method's present stage. The present stage takes what the
        later ones leave.
      advance: ``(params, adapter, *, key, stats=None) -> (method, adapter)``: the method of this stage, and the adapter that it starts
        from. Pure; it may look at values, since the values can decide how many entries of a leaf are trained from here on.
      requires_stats: Kinds of statistics of the current model that `advance` must be given.
      restart_schedule: Whether the learning rate's schedule begins anew, as in a training of its own. Otherwise the run's schedule
        continues.
    """

    name: str
    share: float
    advance: Callable[..., Any]
    requires_stats: tuple[type[Statistic], ...] = ()
    restart_schedule: bool = False

    def __post_init__(self) -> None:
        """Take the names of kinds, as earlier versions spelled them, for the kinds."""
        if self.requires_stats is None or isinstance(self.requires_stats, str):
            object.__setattr__(self, "requires_stats", kinds_of(self.requires_stats))


class Segment(NamedTuple):
    """The steps of one stage.

    Attributes:
      name: Name of the stage.
      begin: Steps done before it.
      end: Steps done after it.
      schedule_span: First and last step of the learning rate's schedule that the stage belongs to. A schedule covers the stages from one
        `Stage.restart_schedule` to the next.
    """

    name: str
    begin: int
    end: int
    schedule_span: tuple[int, int]


def plan(stages: tuple[Stage, ...], steps: int, *, first: str = "") -> tuple[Segment, ...]:
    """Divide the steps of a run among the present stage of a method and those to come.

    Args:
      stages: `Method.stages`, as they are at the beginning of the run.
      steps: Steps of the whole run.
      first: Name of the present stage.

    Returns:
      One segment a stage, the present one first. A later stage gets its share of the steps, rounded, and at least one.

    Raises:
      ValueError: if the shares leave nothing for the present stage, or there are too few steps for all.

    >>> import jpeft
    >>> from jpeft.core.stages import plan
    >>> [(s.begin, s.end, s.schedule_span) for s in plan(jpeft.diff_pruning().stages, 100)]
    [(0, 50, (0, 50)), (50, 100, (50, 100))]
    """
    if not stages:
        return (Segment(first, 0, steps, (0, steps)),)
    lengths = [max(1, round(stage.share * steps)) for stage in stages]
    present = steps - sum(lengths)
    if present < 1:
        shares = ", ".join(f"{stage.name} {stage.share:g}" for stage in stages)
        raise ValueError(
            f"{steps} steps are too few for {len(stages) + 1} stages, of which the later ones ask for the shares {shares}: "
            "train longer, or give them less."
        )
    ends = [present]
    for length in lengths:
        ends.append(ends[-1] + length)
    begins = [0, *ends[:-1]]
    restarts = [0, *(begin for stage, begin in zip(stages, begins[1:], strict=True) if stage.restart_schedule), steps]
    span = lambda begin: (max(r for r in restarts if r <= begin), min(r for r in restarts if r > begin))
    names = [first, *(stage.name for stage in stages)]
    return tuple(Segment(name, begin, end, span(begin)) for name, begin, end in zip(names, begins, ends, strict=True))
