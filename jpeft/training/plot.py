"""The training curve as a picture: loss and validation metric over steps."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.checkpoint.files import write_atomically
from jpeft.extras import explained
from jpeft.tasks.task import Task
from jpeft.training.config import TrainConfig
from jpeft.training.run_folder import RunFolder

with explained():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

PALETTE = ("#9aa5b1", "#1f6fb2", "#d9822b", "#3a9a6b", "#8457b2", "#c0455e", "#6b7f2a", "#2f9c95")
TRAIN, VALIDATION, METRIC, INK = "#9aa5b1", "#d9822b", "#1f6fb2", "#3b4451"


def plot_curve(
    path: str | os.PathLike[str], lines: Sequence[Mapping[str, Any]], metric: str, title: str = "", *, higher_is_better: bool = True
) -> None:
    """Draw the lines of a metrics.jsonl into a PNG, atomically.

    Args:
      path: The PNG to write.
      lines: Records with `step`, `split` ("train" or "validation"), `loss` and, for validation, the metrics.
      metric: Name of the validation metric for the lower panel.
      title: Text above the picture.
      higher_is_better: Whether the highest value of the metric is marked as the best, or the lowest.
    """
    figure, upper, lower = _panels(title)
    train = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] == "validation"]

    _draw(upper, train, "loss", TRAIN, "training", marker="")
    _draw(upper, validation, "loss", VALIDATION, "validation")
    _draw(lower, validation, metric, METRIC, "validation")
    _finish(upper, lower, f"validation {metric}")
    if validation:
        _name_best(lower, validation, metric, max if higher_is_better else min)
    write_figure(figure, path)


def plot_curves(path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, title: str = "") -> None:
    """Draw several runs into one PNG: training loss above, validation metric below, one colour per run.

    Args:
      path: The PNG to write, atomically.
      runs: Lines of metrics.jsonl by the run's name.
      metric: Name of the validation metric for the lower panel.
      title: Text above the picture.
    """
    figure, upper, lower = _panels(title)
    for color, (name, lines) in zip(itertools.cycle(PALETTE), runs.items()):
        _draw(upper, [line for line in lines if line["split"] == "train"], "loss", color, name, marker="")
        _draw(lower, [line for line in lines if line["split"] == "validation"], metric, color, name)
    _finish(upper, lower, f"validation {metric}")
    write_figure(figure, path)


def plot_run(folder: RunFolder, config: TrainConfig, task: Task) -> None:
    """Draw a run's curve.png from its metrics.jsonl."""
    # Two parts of the path, because a folder is often just called "model", and a hub id has an owner.
    model = "/".join(Path(config.model).parts[-2:])
    title = f"{config.method} on {model}"
    plot_curve(folder.curve, folder.records(), task.metric, title, higher_is_better=task.higher_is_better)


def _panels(title: str) -> tuple[Figure, Axes, Axes]:
    # Matplotlib's object interface: no global state, no display, safe beside a user's own pyplot.
    figure = Figure(figsize=(7.2, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", fontweight="bold")
    return figure, upper, lower


def _finish(upper: Axes, lower: Axes, metric: str) -> None:
    for axes, name in ((upper, "loss"), (lower, metric.replace("_", " "))):
        axes.set_ylabel(name, color=INK)
        axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c5ccd3")
        axes.tick_params(colors=INK, labelsize=9)
        axes.margins(x=0.02, y=0.08)
    if upper.has_data():
        upper.legend(frameon=False, fontsize=9, labelcolor=INK)
    upper.set_ylim(bottom=0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlabel("step", color=INK)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG, atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _draw(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, color: str, label: str, marker: str = "o") -> None:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if points:
        steps, values = zip(*points)
        # A single training record would be an invisible line.
        axes.plot(
            steps,
            values,
            color=color,
            label=label,
            linewidth=1.6,
            marker=marker or ("." if len(points) == 1 else ""),
            markersize=4,
        )


def _name_best(axes: Axes, lines: Sequence[Mapping[str, Any]], metric: str, choose: Callable[..., Any]) -> None:
    best = choose(lines, key=lambda line: line[metric])
    axes.plot(best["step"], best[metric], "o", markersize=9, markerfacecolor="none", markeredgecolor=METRIC)
    # Above the panel, where no curve crosses it.
    text = f"best {best[metric]:.3f} at step {best['step']}"
    axes.set_title(text, loc="right", fontsize=9, color=METRIC, pad=4)
