"""Figures from a plot's numbers, to be read at 800 pixels on light pages and dark ones.

What the numbers are is said where they are made, in plots.py.
"""

import contextlib
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from benchmarks.report.tables import flops_rate, number

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "diffit_kernels",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # each text names them all
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",  # a dark page shows the plot on paper
}
WIDTH = 8.3  # inches: 800 px
# Okabe and Ito's colours, told apart by all kinds of colour vision.
COLOURS = {"ours": "#56b4e9", "peer": "#e69f00", "floor": "#bbbbbb"}
NAMES = {"ours": "ours", "peer": "peers, the same results", "floor": "floors, less work"}
LINES = {
    "ours": ("#0072b2", "#56b4e9", "#009e73"),
    "peer": ("#000000", "#d55e00", "#e69f00", "#cc79a7"),
    "floor": ("#999999",),
}
DASHES = {"ours": "-", "peer": "--", "floor": ":"}
MARKS = "osD^vP*Xp<>h"
CUT = 6.0  # times the best of ours; longer bars end at the panel's edge


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within the context matplotlib draws by :data:`STYLE`, whatever the user has set."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def bars(numbers: dict) -> Figure:
    """A panel for each case, a bar for each provider, their times through our best one's."""
    roles, cases = numbers["roles"], numbers["cases"]
    columns = 2 if len(cases) == 4 else min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    height = lines * (0.55 + 0.16 * len(roles)) + 0.5
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    ends = [v[-1] for case in cases.values() for v in case.values() if not isinstance(v, str)]
    edge = min(CUT, max(ends))
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, edge) if tick <= edge]
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    for axis in axes[len(cases) - columns : len(cases)]:
        axis.tick_params(labelbottom=True)
    for axis, (label, case) in zip(axes, cases.items(), strict=False):
        axis.set_title("\n".join(textwrap.wrap(label, 72 // columns)), loc="left")
        axis.axvline(1, color="#0072b2", linewidth=0.8)
        for place, (name, role) in enumerate(roles.items()):
            _bar(axis, place, role, case.get(name, ""), edge)
        axis.set_yticks(range(len(roles)), [*roles], parse_math=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xticks(ticks)
        axis.set_xlim(0, (1 + 0.1 * columns) * edge)  # behind the edge is the column of numbers
        axis.spines.bottom.set_bounds(0, edge)
    axis.set_ylim(len(roles) - 0.5, -0.5)
    present = [role for role in COLOURS if role in roles.values()]
    handles = [Patch(color=COLOURS[role], label=NAMES[role]) for role in present]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    figure.supxlabel("time through that of the best of ours (line); whiskers: p20 and p80")
    return figure


def _bar(axis: Axes, place: int, role: str, value: Sequence[float] | str, edge: float) -> None:
    """One bar up to the edge and its number behind it, or the word for why there is none."""
    column = {"x": 1, "y": place, "ha": "right", "va": "center"}
    column["transform"] = axis.get_yaxis_transform()  # the panel's right side is at x = 1
    if isinstance(value, str):
        axis.text(s=value, color="#555555", style="italic", **column)
        return
    low, middle, high = value
    axis.barh(place, min(middle, edge), height=0.75, color=COLOURS[role])
    if low < edge:
        ends = [0, 1] if high <= edge else [0]
        look = {"color": "black", "linewidth": 0.8, "marker": "|", "markersize": 4}
        axis.plot((low, min(high, edge)), (place, place), markevery=ends, **look)
    text = f"{middle:.2f}" if middle < 10 else number(round(middle))
    axis.text(s=f"→ {text}" if middle > edge else text, **column)


def scaling(numbers: dict) -> Figure:
    """Time against batch, tokens and depth, a line for each provider; both axes logarithmic."""
    roles, panels = numbers["roles"], numbers["panels"]
    names = {"batch": "batch", "tokens": "tokens of a sample", "depth": "depth (blocks)"}
    figure = Figure((WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    handles = {}
    for axis, (size, curves) in zip(axes, panels.items(), strict=True):
        for name in (name for name in roles if name in curves):
            x, median, low, high = zip(*curves[name], strict=True)
            look = _line(roles, name)
            (handles[name],) = axis.plot(x, [1e3 * t for t in median], **look)
            ends = [[1e3 * t for t in times] for times in (low, high)]
            axis.fill_between(x, *ends, color=look["color"], alpha=0.2, linewidth=0)
        _doublings(axis, {point[0] for points in curves.values() for point in points})
        axis.set_xlabel(names[size])
    figure.axes[0].set_ylabel("median ms (band: p20 to p80)")
    _legend(figure, handles.values())
    return figure


def roofline(panels: dict) -> Figure:
    """For each dtype rates against arithmetic intensity, below the machine's two ceilings."""
    figure = Figure((WIDTH, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False).flat
    benchmarks = sorted({point[0] for panel in panels.values() for point in panel["points"]})
    marks = dict(zip(benchmarks, cycle(MARKS), strict=False))
    for axis, (dtype, panel) in zip(axes, panels.items(), strict=True):
        arithmetic, bandwidth = panel["ceilings"]
        ridge = 1e3 * arithmetic / bandwidth
        where = [point[3] for point in panel["points"]] + [ridge]
        ends = [min(where) / 2, max(where) * 2]
        roof = [min(arithmetic, 1e-3 * bandwidth * x) for x in (ends[0], ridge, ends[1])]
        axis.plot([ends[0], ridge, ends[1]], roof, color="black", linewidth=1)
        for name, role, _, *place in panel["points"]:
            face = COLOURS["ours"] if role == "ours" else "none"
            edge = LINES["ours"][0] if role == "ours" else LINES["peer"][1]
            axis.plot(*place, marks[name], markerfacecolor=face, markeredgecolor=edge, markersize=5)
        ceilings = f"{flops_rate(arithmetic)}, copy {number(bandwidth)} GB/s"
        axis.set(xscale="log", yscale="log", xlabel="FLOP/byte", title=f"{dtype}: {ceilings}")
        axis.grid(color="#eeeeee", linewidth=0.6)
    for axis in figure.axes:  # which share y
        _plain(axis.xaxis)
        _plain(axis.yaxis)
        axis.minorticks_off()
    figure.axes[0].set_ylabel("TFLOP/s of useful work")
    grey = {"color": "#555555", "linestyle": "none", "markersize": 5}
    names = {name: name.replace("_", " ") for name in benchmarks}
    handles = [Line2D([], [], marker=marks[n], label=names[n], **grey) for n in benchmarks]
    handles += [Patch(color=COLOURS["ours"], label="filled: best of ours")]
    handles += [Patch(facecolor="none", edgecolor=LINES["peer"][1], label="hollow: best peer")]
    handles += [Line2D([], [], color="black", linewidth=1, label="measured ceilings")]
    _legend(figure, handles)
    return figure


def memory(numbers: dict) -> Figure:
    """Peak memory of a block against resolution, and of training steps."""
    curves, bars, roles = numbers["curves"], numbers["bars"], numbers["roles"]
    lines = sum(len(case) + 1 for case in bars.values())
    height = max(3.3 if curves else 0, 0.16 * lines + 0.7)
    figure = Figure((WIDTH, height), layout="constrained")
    axes = iter(figure.subplots(1, bool(curves) + bool(bars), squeeze=False).flat)
    if curves:
        axis = next(axes)
        for name in (name for name in roles["curves"] if name in curves):
            axis.plot(*zip(*curves[name], strict=True), **_line(roles["curves"], name))
        _doublings(axis, {point[0] for points in curves.values() for point in points})
        axis.set(xlabel="resolution (px)", ylabel="peak MiB")
        axis.set_title("one block, forward and backward", loc="left")
        axis.legend()
    if bars:
        _memory_bars(next(axes), bars, roles["bars"])
    return figure


def _memory_bars(axis: Axes, bars: dict, roles: Mapping[str, str]) -> None:
    """Each case's providers below its name."""
    labels, widest = [], max(value for case in bars.values() for value in case.values())
    for label, case in bars.items():
        labels.append(label)
        for name in (name for name in roles if name in case):
            place, value = len(labels), case[name]
            axis.barh(place, value, height=0.75, color=COLOURS[roles[name]])
            axis.text(value + 0.01 * widest, place, number(round(value)), va="center")
            labels.append(name)
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    for tick, label in zip(axis.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if label in bars else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, 1.15 * widest), ylim=(len(labels) - 0.5, -0.5), xlabel="peak MiB")
    axis.set_title("training step", loc="left")


def _line(roles: Mapping[str, str], name: str) -> dict[str, Any]:
    """How a provider's line looks: colour and mark by its place among those of its role."""
    same = [other for other in roles if roles[other] == roles[name]]
    colours, place = LINES[roles[name]], same.index(name)
    mark = MARKS[[*roles].index(name) % len(MARKS)]
    look = {"color": colours[place % len(colours)], "linestyle": DASHES[roles[name]]}
    return look | {"marker": mark, "markersize": 4, "linewidth": 1.2, "label": name}


def _doublings(axis: Axes, sizes: set[int]) -> None:
    """Logarithmic axes; the ticks of x are the sizes that were run."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)


def _plain(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, as many as there is room for."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _legend(figure: Figure, handles: Iterable[Artist]) -> None:
    figure.legend(handles=[*handles], loc="outside lower center", ncols=3)
