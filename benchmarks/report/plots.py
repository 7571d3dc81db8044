"""The plots of a device's rows, as SVG whose bytes and description follow from the numbers drawn.

A plot is numbers, taken from rows here, and a function of drawing.py. The description in the file
carries a digest of the numbers, so that a stale plot is known without drawing it again.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import drawing
from benchmarks.report.tables import FLOORS, ROLES, SCALING, Race, providers
from benchmarks.rows import Row


@dataclass(frozen=True)
class Plot:
    """The numbers of a plot, as JSON has them, and how they are drawn."""

    title: str
    numbers: Any
    draw: Callable[[Any], Figure]

    @property
    def digest(self) -> str:
        text = json.dumps([self.title, self.numbers])
        return "sha256 " + hashlib.sha256(text.encode()).hexdigest()

    def svg(self) -> bytes:
        """The picture, the same to the byte for the same numbers and matplotlib."""
        file = io.BytesIO()
        about = {"Date": None, "Title": self.title, "Description": self.digest}
        with drawing.style():
            self.draw(self.numbers).savefig(file, format="svg", metadata=about)
        return file.getvalue()


def plots(found: Mapping[str, Sequence[Race]]) -> dict[str, Plot]:
    """The plots by name, those that the rows are enough for."""
    made = {
        "scaling": Plot("Time against batch, tokens and depth", _scaling(found), drawing.scaling),
        "roofline": Plot("Roofline", _roofline(found), drawing.roofline),
        "memory": Plot("Peak memory", _memory(found), drawing.memory),
    }
    for name in found.keys() - {*FLOORS, *SCALING}:
        title = f"{name.replace('_', ' ')}: time relative to the best of ours"
        made[f"bars_{name}"] = Plot(title, _bars(found[name]), drawing.bars)
    return {name: made[name] for name in sorted(made) if made[name].numbers}


def _roles(found: Sequence[Race], value: str = "median_s") -> dict[str, str]:
    """Each provider's role: ours first, then peers, then floors."""
    roles = {n: r["role"] for race in found for n, r in race.timed(value).items()}
    order = sorted(providers(found, value), key=lambda name: ROLES.index(roles[name]))
    return {name: roles[name] for name in order}


def _bars(found: Sequence[Race]) -> dict | None:
    """For each case and provider p20, median and p80 through our best median, or why not."""
    cases = {}
    for race in found:
        ours = race.best("ours")
        if ours is None or len(race.timed()) < 2:
            continue
        base, timed = ours["median_s"], race.timed()
        cases[race.label] = {
            name: [row[key] / base for key in ("p20_s", "median_s", "p80_s")]
            if name in timed
            else row["status"]
            for name, row in race.rows.items()
        }
    return {"roles": _roles(found), "cases": cases} if cases else None


def _curves(found: Sequence[Race], size: str, values: Sequence[str]) -> dict[str, list]:
    """For each provider, and dtype where there are several: [size, values...] by rising size.

    None at all where every race is of one size.
    """
    dtypes = {race.dtype for race in found}
    curves: dict[str, list] = {}
    for race in found:
        for name, row in race.timed(values[0]).items():
            series = f"{name}, {race.dtype}" if len(dtypes) > 1 else name
            curves.setdefault(series, []).append([row["sizes"][size], *(row[v] for v in values)])
    if len({point[0] for points in curves.values() for point in points}) < 2:
        return {}
    return {name: sorted(points) for name, points in curves.items()}


def _curve_roles(found: Sequence[Race], value: str) -> dict[str, str]:
    dtypes = dict.fromkeys(race.dtype for race in found)
    roles = _roles(found, value)
    if len(dtypes) == 1:
        return roles
    return {f"{name}, {dtype}": role for name, role in roles.items() for dtype in dtypes}


def _scaling(found: Mapping[str, Sequence[Race]]) -> dict | None:
    """Seconds (median, p20, p80) against each size: panel, provider, points."""
    runs = {size: found[name] for name, size in SCALING.items() if name in found}
    values = ("median_s", "p20_s", "p80_s")
    panels = {size: _curves(cases, size, values) for size, cases in runs.items()}
    panels = {size: curves for size, curves in panels.items() if curves}
    every = [race for cases in runs.values() for race in cases]
    return {"roles": _curve_roles(every, "median_s"), "panels": panels} if panels else None


def _roofline(found: Mapping[str, Sequence[Race]]) -> dict | None:
    """For each dtype the two ceilings that were measured, and [FLOP/byte, TFLOP/s] of the best."""
    copies = [r["gb_per_s"] for race in found.get("copy", ()) for r in race.timed().values()]
    panels = {}
    for product in found.get("large_product", ()):
        ceiling = max((r["tflop_per_s"] for r in product.timed().values()), default=None)
        points = [
            [name, role, race.case, *_place(row)]
            for name in found.keys() - {*FLOORS, *SCALING}
            for race in found[name]
            for role in ("ours", "peer")
            if race.dtype == product.dtype and _place(row := race.best(role))
        ]
        if copies and ceiling and points:
            panels[product.dtype] = {"ceilings": [ceiling, max(copies)], "points": sorted(points)}
    return panels or None


def _place(row: Row | None) -> list[float] | None:
    if row is None or not (row["tflop_per_s"] and row["gb_per_s"]):
        return None
    return [1e3 * row["tflop_per_s"] / row["gb_per_s"], row["tflop_per_s"]]


def _memory(found: Mapping[str, Sequence[Race]]) -> dict | None:
    """MiB of one block against resolution, and of training steps by case and provider."""
    block, training = found.get("scaling_tokens", ()), found.get("training", ())
    curves = _curves(block, "resolution", ["peak_mib"])
    bars = {
        race.label: {name: row["peak_mib"] for name, row in race.timed("peak_mib").items()}
        for race in training
        if race.ahead("peak_mib")
    }
    if not curves and not bars:
        return None
    roles = {"curves": _curve_roles(block, "peak_mib"), "bars": _roles(training, "peak_mib")}
    return {"roles": roles, "curves": curves, "bars": bars}
