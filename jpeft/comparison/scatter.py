"""Quality against size as a picture: a point with an error bar for each row, lines for the baselines, labels that overlap nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.extras import explained
from jpeft.training.plot import INK, write_figure

with explained():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation, Text
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

FAMILIES = {"selective": "#1f6fb2", "additive": "#c9701a", "reparameterized": "#2c8a5c"}
GREY, GRID = "#7a8592", "#e9edf0"
# In points, the unit of font sizes.
FONT, MARKER, NEAR = 9.0, 7.0, 5.0
LONGEST = 40  # characters of a baseline's name

# Left, lower, right and upper edge in pixels.
Box = tuple[float, float, float, float]
# Candidate positions of a text: boxes [n, 4], costs [n], and points of the lines that lead to the boxes [n, samples, 2].
Places = tuple[np.ndarray, np.ndarray, np.ndarray]


class Point(NamedTuple):
    """A row of the comparison; `spread` is half the length of its error bar."""

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
    """Draw a PNG, atomically; the horizontal axis is logarithmic.

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
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=12, parse_math=False)
    for point in points:
        color = FAMILIES.get(point.family, GREY)
        axes.errorbar(point.x, point.y, yerr=point.spread or None, color=color, elinewidth=1.3, alpha=0.55, zorder=3)
        axes.plot(point.x, point.y, "o", markersize=MARKER, color=color, markeredgecolor="white", markeredgewidth=1, zorder=4)
    for line in lines:
        axes.axhline(line.y, color=GREY, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
    _legend(axes, points)
    # Labels are positioned in pixels, so the layout must not change after this.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    taken = _label_lines(axes, lines, points)
    _label_points(axes, points, lines, taken)
    write_figure(figure, path)


def _frame(axes: Axes, points: Sequence[Point], lines: Sequence[Line]) -> None:
    axes.set_xscale("log")
    xs = [point.x for point in points] or [1.0, 10.0]
    # Room for the labels at both ends, at least half a decade in total.
    room = max(10 ** (0.09 * math.log10(max(xs) / min(xs))), 1.7)
    axes.set_xlim(min(xs) / room, max(xs) * room)
    low = [point.y - point.spread for point in points] + [line.y for line in lines]
    high = [point.y + point.spread for point in points] + [line.y for line in lines]
    pad = 0.09 * (max(high, default=1) - min(low, default=0)) or 0.05
    axes.set_ylim(min(low, default=0) - pad, max(high, default=1) + pad)
    axes.xaxis.set_major_locator(LogLocator(subs=_ticks(*axes.get_xlim()), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_amount))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.9, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c5ccd3")
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.tick_params(which="minor", color="#c5ccd3", length=3)


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Return the multiples of powers of ten that have a tick: so many that a short axis has two or more."""
    decades = math.log10(high / low)
    return (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def _amount(value: float, position: int | None = None) -> str:
    """Return 10000 as 10k."""
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


def _label_lines(axes: Axes, lines: Sequence[Line], points: Sequence[Point]) -> list[Box]:
    """Put the name of each baseline above or below its left or right end, where it overlaps the least; return the boxes of the names."""
    boxes: list[Box] = []
    radius = MARKER / 2 * axes.figure.dpi / 72
    marks = [box for point in points for box in (_around(*_pixels(axes, point.x, point.y), radius), _bar(axes, point))]
    # Baselines of one height share a label.
    labels: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.y):
        labels.setdefault(f"{line.y:.3f}" if abs(line.y) < 10 else f"{line.y:.1f}", []).append(line)
    for value, same in labels.items():
        name = ", ".join(line.label if len(line.label) <= LONGEST else f"{line.label[:LONGEST]}…" for line in same)
        style = {"parse_math": False, "color": GREY, "fontsize": FONT, "style": "italic", "zorder": 2, "textcoords": "offset points"}
        text = axes.annotate(f"{name} {value}", (0, same[0].y), xycoords=axes.get_yaxis_transform(), xytext=(0, 0), **style)
        rules = [(-1e4, y - 1, 1e4, y + 1) for y in (_pixels(axes, 1.0, line.y)[1] for line in lines if line not in same)]
        covered = {}
        for place in ((0, True), (0, False), (1, True), (1, False)):
            _beside(text, same[0].y, *place)
            covered[place] = _overlap(np.array([_box(text)]), [*boxes, *rules, *marks]).sum()
        _beside(text, same[0].y, *min(covered, key=lambda place: covered[place]))
        boxes.append(_box(text))
    return boxes


def _beside(text: Annotation, y: float, end: int, above: bool) -> None:
    """Move the name of a baseline to its left (0) or right (1) end, above or below the line."""
    text.xy = (end, y)
    text.set_position((-4 if end else 4, 3 if above else -3))
    text.set_horizontalalignment("right" if end else "left")
    text.set_verticalalignment("baseline" if above else "top")


def _label_points(axes: Axes, points: Sequence[Point], lines: Sequence[Line], taken: Sequence[Box]) -> None:
    """Put each label near its point where it overlaps the least."""
    pixel = axes.figure.dpi / 72
    centres = [_pixels(axes, point.x, point.y) for point in points]
    texts = [
        axes.text(0, 0, point.label, parse_math=False, color=FAMILIES.get(point.family, GREY), fontsize=FONT, zorder=5) for point in points
    ]
    for text in texts:
        text.set_transform(None)
    # For each point its candidate positions: boxes [n, 4], costs [n], and points of the lines to the boxes [n, samples, 2].
    places = [_places(centre, _box(text), pixel) for centre, text in zip(centres, texts)]
    marks = [_around(x, y, MARKER / 2 * pixel) for x, y in centres]
    bars = [_bar(axes, point) for point in points]
    rules = [(-1e4, y - pixel, 1e4, y + pixel) for y in (_pixels(axes, 1.0, line.y)[1] for line in lines)]
    frame = [axes.get_window_extent().extents]
    costs = []
    for i, (boxes, cost, leads) in enumerate(places):
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        covered = sum(weight * _overlap(boxes, things).sum(1) for weight, things in ((20, [*marks, *taken]), (6, bars), (3, rules)))
        crossed = _inside(leads, [*marks[:i], *marks[i + 1 :], *taken, *bars[:i], *bars[i + 1 :]])
        costs.append(cost + 40 * (area - _overlap(boxes, frame).sum(1)) + pixel**2 * 200 * crossed.sum(1) + covered)
    chosen = _cheapest(costs, [[_between(a, b, pixel) for b in places] for a in places])
    for text, (boxes, _, leads), choice in zip(texts, places, chosen):
        # The box has a margin of two points; a text's origin is its lower left corner.
        text.set_position((boxes[choice, 0] + 2 * pixel, boxes[choice, 1] + 2 * pixel))
        text.set_verticalalignment("bottom")
        start, end = leads[choice, 0], leads[choice, -1]
        if np.hypot(*(end - start)) > 7 * pixel:
            leader = Line2D([start[0], end[0]], [start[1], end[1]], color=text.get_color(), linewidth=0.8, alpha=0.5, zorder=2)
            leader.set_transform(None)
            axes.add_line(leader)


def _places(centre: tuple[float, float], box: Box, pixel: float) -> Places:
    """Return candidate positions of a label: boxes around its point, their costs (lowest near and to the right), and the lines to them."""
    x, y, width, height = *centre, box[2] - box[0], box[3] - box[1]
    boxes, costs, leads = [], [], []
    for distance in (NEAR, 10.0, 17.0, 26.0, 37.0, 50.0):
        for step in range(16):
            dx, dy = math.cos(math.pi * step / 8), math.sin(math.pi * step / 8)
            reach = (distance + MARKER / 4) * pixel
            # The side or corner of the box that faces the point lies on a circle around the point.
            x0, y0 = x + dx * reach - width * (1 - dx) / 2, y + dy * reach - height * (1 - dy) / 2
            boxes.append((x0, y0, x0 + width, y0 + height))
            sideways = {0: 0.0, 8: 0.6}.get(step, 0.8 + 0.3 * (dx < -0.1) + 0.1 * (dy < 0))
            costs.append(pixel**2 * (30 * sideways + 7 * (distance - NEAR)))
            end = np.array([np.clip(x, x0, x0 + width), np.clip(y, y0, y0 + height)])
            # The line starts at the rim of the marker.
            start = np.array(centre) + (end - centre) * min(1.0, MARKER / 2 * pixel / max(float(np.hypot(*(end - centre))), 1e-9))
            leads.append(np.linspace(start, end, 12))
    return np.array(boxes), np.array(costs), np.array(leads)


def _between(a: Places, b: Places, pixel: float) -> np.ndarray:
    """Return the costs of all pairs of positions of two labels, [n, n]: overlap, and lines through labels."""
    return 25 * _overlap(a[0], b[0]) + 200 * pixel**2 * (_inside(a[2], b[0]) + _inside(b[2], a[0]).T)


def _cheapest(costs: Sequence[np.ndarray], pairs: Sequence[Sequence[np.ndarray]]) -> list[int]:
    """Return the position of each label with the lowest total cost found, by coordinate descent from 40 fixed random starts."""
    rng = np.random.default_rng(0)
    best, least = [], math.inf
    for attempt in range(40):
        chosen = [int(np.argmin(cost)) if attempt == 0 else int(rng.integers(len(cost))) for cost in costs]
        for _ in range(20):
            before = list(chosen)
            for i in rng.permutation(len(chosen)):
                others = [pairs[i][j][:, place] for j, place in enumerate(chosen) if j != i]
                chosen[i] = int(np.argmin(costs[i] + sum(others, np.zeros(len(costs[i])))))
            if chosen == before:
                break
        total = sum(cost[place] for cost, place in zip(costs, chosen))
        total += sum(pairs[i][j][chosen[i], chosen[j]] for i in range(len(chosen)) for j in range(i))
        if total < least:
            best, least = chosen, total
    return best


def _bar(axes: Axes, point: Point) -> Box:
    (x, low), (_, high) = (_pixels(axes, point.x, y) for y in (point.y - point.spread, point.y + point.spread))
    return x - 2, low, x + 2, high


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _box(text: Text) -> Box:
    figure = text.get_figure(root=True)
    assert figure is not None
    x0, y0, x1, y1 = text.get_window_extent().padded(2 * figure.dpi / 72).extents
    return float(x0), float(y0), float(x1), float(y1)


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    x, y = axes.transData.transform((x, y))
    return float(x), float(y)


def _overlap(boxes: np.ndarray, others: Any) -> np.ndarray:
    """Return the overlap of each pair of boxes: [n, 4], [m, 4] -> [n, m]."""
    a, b = boxes[:, None], np.reshape(np.asarray(others, float), (1, -1, 4))
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(sides, 0).prod(-1)


def _inside(lines: np.ndarray, boxes: Any) -> np.ndarray:
    """Return how many points of each line, without its end, lie in each box: [n, samples, 2], [m, 4] -> [n, m]."""
    b = np.reshape(np.asarray(boxes, float), (1, 1, -1, 4))
    inner = lines[:, :-1, None]
    return ((inner > b[..., :2]) & (inner < b[..., 2:])).all(-1).sum(1)
