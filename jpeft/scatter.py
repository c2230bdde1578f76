"""Quality against size as a picture: a point with an error bar a row, lines for the baselines, labels that keep clear of it all."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from jpeft.plot import INK, write_figure

FAMILIES = {"selective": "#1f6fb2", "additive": "#c9701a", "reparameterized": "#2c8a5c"}
GREY, GRID = "#7a8592", "#e9edf0"
# All in points, which is what fonts are measured in.
FONT, MARKER, NEAR = 9.0, 7.0, 5.0


class Point(NamedTuple):
    """A row: `spread` is half the length of its error bar."""

    label: str
    x: float
    y: float
    spread: float
    family: str


class Line(NamedTuple):
    """A baseline."""

    label: str
    y: float


def plot_scatter(
    path: str | os.PathLike[str], points: Sequence[Point], lines: Sequence[Line], *, x_label: str, y_label: str, title: str = ""
) -> None:
    """Draws a PNG, atomically; the horizontal axis is logarithmic.

    Args:
        path: The PNG to write.
        points: One for each row, coloured by family.
        lines: Baselines, drawn from edge to edge.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        title: Text above the picture.
    """
    figure = Figure(figsize=(8.4, 5.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _frame(axes, points, lines)
    axes.set_xlabel(x_label, color=INK, labelpad=6)
    axes.set_ylabel(y_label, color=INK, labelpad=8)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=12)
    for point in points:
        color = FAMILIES.get(point.family, GREY)
        axes.errorbar(point.x, point.y, yerr=point.spread or None, color=color, elinewidth=1.3, alpha=0.55, zorder=3)
        axes.plot(point.x, point.y, "o", markersize=MARKER, color=color, markeredgecolor="white", markeredgewidth=1, zorder=4)
    for line in lines:
        axes.axhline(line.y, color=GREY, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    _legend(axes, points)
    # Texts are placed in pixels, so nothing may move after this.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    taken = _label_lines(axes, lines)
    _label_points(axes, points, lines, taken)
    write_figure(figure, path)


def _frame(axes: Axes, points: Sequence[Point], lines: Sequence[Line]) -> None:
    axes.set_xscale("log")
    xs = [point.x for point in points] or [1.0, 10.0]
    # Room for the texts at both ends, half a decade at least in all.
    room = max(10 ** (0.09 * math.log10(max(xs) / min(xs))), 1.7)
    axes.set_xlim(min(xs) / room, max(xs) * room)
    low = [point.y - point.spread for point in points] + [line.y for line in lines]
    high = [point.y + point.spread for point in points] + [line.y for line in lines]
    pad = 0.09 * (max(high, default=1) - min(low, default=0)) or 0.05
    axes.set_ylim(min(low, default=0) - pad, max(high, default=1) + pad)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_amount))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.9, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c5ccd3")
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.tick_params(which="minor", color="#c5ccd3", length=3)


def _amount(value: float, position: int | None = None) -> str:
    """10000 as 10k."""
    del position
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _legend(axes: Axes, points: Sequence[Point]) -> None:
    used = [family for family in FAMILIES if any(point.family == family for point in points)]
    handles = [Line2D([], [], marker="o", linestyle="", markersize=MARKER, color=FAMILIES[name], label=name) for name in used]
    if handles:
        style = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handletextpad": 0.1, "columnspacing": 1.2, "borderaxespad": 0}
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.015), ncols=len(handles), **style)


# --- texts ------------------------------------------------------------------------------------------------------------


def _label_lines(axes: Axes, lines: Sequence[Line]) -> list[Bbox]:
    """Names the baselines at the left end, just above each, or below where the next one above is too near; their boxes."""
    boxes: list[Bbox] = []
    for line in sorted(lines, key=lambda line: line.y):
        style = {"color": GREY, "fontsize": FONT, "style": "italic", "zorder": 2, "textcoords": "offset points"}
        text = axes.annotate(f"{line.label} {line.y:.3f}", (0, line.y), xycoords=axes.get_yaxis_transform(), xytext=(4, 3), **style)
        if any(_box(text).overlaps(box) for box in boxes):
            text.set_position((4, -3))
            text.set_verticalalignment("top")
        boxes.append(_box(text))
    return boxes


def _label_points(axes: Axes, points: Sequence[Point], lines: Sequence[Line], taken: Sequence[Bbox]) -> None:
    """Gives each text the place near its point where it covers the least; all of them in turns, until none wants to move."""
    pixel = axes.figure.dpi / 72
    centres = [_pixels(axes, point.x, point.y) for point in points]
    texts = [axes.text(0, 0, point.label, color=FAMILIES.get(point.family, GREY), fontsize=FONT, zorder=5) for point in points]
    for text in texts:
        text.set_transform(None)
    sizes = [(_box(text).width, _box(text).height) for text in texts]
    marks = [Bbox.from_extents(x - r, y - r, x + r, y + r) for x, y in centres for r in [MARKER / 2 * pixel]]
    bars = [_bar(axes, point) for point in points]
    rules = [Bbox.from_extents(-1e4, y - pixel, 1e4, y + pixel) for line in lines for y in [_pixels(axes, 1.0, line.y)[1]]]
    frame = axes.get_window_extent()
    places = [_places(*centre, *size, pixel) for centre, size in zip(centres, sizes)]

    def fixed_cost(box: Bbox) -> float:
        outside = box.width * box.height - _overlap(box, frame)
        solid = sum(_overlap(box, other) for other in (*marks, *taken))
        return 40 * outside + 20 * solid + 6 * sum(_overlap(box, bar) for bar in bars) + 3 * sum(_overlap(box, rule) for rule in rules)

    costs = [[cost + fixed_cost(box) for cost, box in options] for options in places]
    chosen = [int(np.argmin(options)) for options in costs]
    for _ in range(20):
        before = list(chosen)
        for i, options in enumerate(places):
            others = [places[j][chosen[j]][1] for j in range(len(points)) if j != i]
            total = [cost + 25 * sum(_overlap(box, other) for other in others) for cost, (_, box) in zip(costs[i], options)]
            chosen[i] = int(np.argmin(total))
        if chosen == before:
            break
    for text, centre, options, choice in zip(texts, centres, places, chosen):
        box = options[choice][1]
        # The box has a margin of two points; a text's origin is its lower left corner.
        text.set_position((box.x0 + 2 * pixel, box.y0 + 2 * pixel))
        text.set_verticalalignment("bottom")
        _leader(axes, text, centre, box, pixel)


def _places(x: float, y: float, width: float, height: float, pixel: float) -> list[tuple[float, Bbox]]:
    """Boxes around a point with what each costs by itself: right of it and near is best."""
    places = []
    for distance in (NEAR, 10.0, 17.0, 26.0, 37.0, 50.0):
        for step in range(16):
            angle = 2 * math.pi * step / 16
            dx, dy = math.cos(angle), math.sin(angle)
            reach = (distance + MARKER / 4) * pixel
            # The side or corner that faces the point lies on a circle around it.
            x0 = x + dx * reach - width * (1 - dx) / 2
            y0 = y + dy * reach - height * (1 - dy) / 2
            sideways = {0: 0.0, 8: 0.6}.get(step, 0.8 + 0.3 * (dx < -0.1) + 0.1 * (dy < 0))
            places.append((pixel * pixel * (30 * sideways + 7 * (distance - NEAR)), Bbox.from_bounds(x0, y0, width, height)))
    return places


def _leader(axes: Axes, text: Text, centre: tuple[float, float], box: Bbox, pixel: float) -> None:
    """A thin line from a point to a text that is not right beside it."""
    x, y = np.clip(centre[0], box.x0, box.x1), np.clip(centre[1], box.y0, box.y1)
    length = math.hypot(x - centre[0], y - centre[1])
    if length < 11 * pixel:
        return
    line = Line2D([centre[0], x], [centre[1], y], color=text.get_color(), linewidth=0.8, alpha=0.5, zorder=2)
    line.set_transform(None)
    axes.add_line(line)


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    x, y = axes.transData.transform((x, y))
    return float(x), float(y)


def _bar(axes: Axes, point: Point) -> Bbox:
    (x, low), (_, high) = (_pixels(axes, point.x, y) for y in (point.y - point.spread, point.y + point.spread))
    return Bbox.from_extents(x - 2, low, x + 2, high)


def _box(text: Text) -> Bbox:
    return text.get_window_extent().padded(2 * text.get_figure(root=True).dpi / 72)  # pyright: ignore[reportOptionalMemberAccess]


def _overlap(a: BboxBase, b: BboxBase) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
