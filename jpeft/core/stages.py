"""The stages of a training run in steps."""

from typing import NamedTuple

from jpeft.core.method import Stage


class Segment(NamedTuple):
    """The steps of one stage.

    Attributes:
      name: Name of the stage.
      begin: Steps done before it.
      end: Steps done after it.
      course: First and last step of the learning rate's course that the stage is in: the stages from one `Stage.restart` to the next.
    """

    name: str
    begin: int
    end: int
    course: tuple[int, int]


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
    >>> [(s.begin, s.end, s.course) for s in plan(jpeft.diff_pruning().stages, 100)]
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
    restarts = [0, *(begin for stage, begin in zip(stages, begins[1:], strict=True) if stage.restart), steps]
    course = lambda begin: (max(r for r in restarts if r <= begin), min(r for r in restarts if r > begin))
    names = [first, *(stage.name for stage in stages)]
    return tuple(Segment(name, begin, end, course(begin)) for name, begin, end in zip(names, begins, ends, strict=True))
