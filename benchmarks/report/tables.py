"""Rows grouped into races, and the Markdown tables that the races make."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.rows import Row

SUMMARISED = (
    *("block", "dit_block", "model", "image_model", "training", "image_training", "sampling"),
    *("window_attention", "adaln", "mlp", "time_projection", "time_projections", "group_norm"),
)
SCALING = {"scaling_batch": "batch", "scaling_tokens": "tokens", "scaling_depth": "depth"}
FLOORS = ("large_product", "products", "copy")
ORDER = (*SUMMARISED, *SCALING, *FLOORS)
LITERAL = "literal"
ROLES = ("ours", "peer", "floor")


@dataclass
class Race:
    """The rows of one case, by provider."""

    benchmark: str
    case: str
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The case's parameters; a bare number has its name before it."""
        parameters = next(iter(self.rows.values()))["parameters"]
        return ", ".join(f"{n} {v}" if v.isdigit() else v for n, v in parameters.items())

    @property
    def dtype(self) -> str:
        return next(iter(self.rows.values()))["dtype"]

    def timed(self, value: str = "median_s") -> dict[str, Row]:
        """The rows with such a value, which only what was timed has."""
        return {n: r for n, r in self.rows.items() if r["status"] == "timed" and r[value]}

    def best(self, role: str, value: str = "median_s") -> Row | None:
        """The row with the least value among "ours", or the peers, which compute the same."""
        found = [row for row in self.timed(value).values() if row["role"] == role]
        return min(found, key=lambda row: row[value], default=None)

    def ahead(self, value: str = "median_s") -> float | None:
        """The best peer's value through that of the best of ours: above 1 we are ahead."""
        peer, ours = self.best("peer", value), self.best("ours", value)
        return peer[value] / ours[value] if peer and ours else None

    def against_literal(self, row: Row, value: str = "median_s") -> float | None:
        literal = self.timed(value).get(LITERAL)
        return literal[value] / row[value] if literal else None


def races(rows: Iterable[Row]) -> dict[str, list[Race]]:
    """The races of each benchmark, benchmarks in :data:`ORDER`, cases in that of the rows."""
    found: dict[str, dict[str, Race]] = {}
    for row in rows:
        cases = found.setdefault(row["benchmark"], {})
        race = cases.setdefault(row["case"], Race(row["benchmark"], row["case"]))
        race.rows[row["provider"]] = row
    known = [name for name in ORDER if name in found]
    return {name: [*found[name].values()] for name in [*known, *sorted(found.keys() - set(known))]}


def providers(found: Iterable[Race], value: str = "median_s") -> list[str]:
    """Providers that were timed in any of the races, in the order in which rows name them."""
    timed = {name for race in found for name in race.timed(value)}
    return [name for name in dict.fromkeys(n for race in found for n in race.rows) if name in timed]


def origin(rows: Sequence[Row]) -> str:
    """Where and by what rows were measured; where they differ, all that there is of a field."""

    def every(name: str) -> str:
        known = dict.fromkeys(str(row[name]) for row in rows if row[name] is not None)
        return " / ".join(known)

    device, processor = every("device"), f"{every('instructions')}, {every('threads')} threads"
    host = processor if device == every("cpu") else f"host {every('cpu')}, {processor}"
    versions = (("driver", "driver"), ("torch", "torch"), ("Triton", "triton"), ("CUDA", "cuda"))
    parts = [f"{name} {every(key)}" for name, key in versions if every(key)]
    commits = dict.fromkeys(_commit(row) for row in rows)
    days = sorted({row["time"][:10] for row in rows})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    parts += [f"Python {every('python')}", f"commit {' / '.join(commits)}", f"measured {when}"]
    return f"{device} ({host}), " + ", ".join(parts)


def _commit(row: Row) -> str:
    tree = f"sources {row['sources']}"
    if row["commit"] is None:
        return f"unknown, {tree}"
    dirty = {True: f" with changes, {tree}", False: "", None: f", perhaps with changes, {tree}"}
    return row["commit"][:10] + dirty[row["dirty"]]


def table(found: Sequence[Race], value: str = "median_s") -> str:
    """Cases down, providers across; where ours meet peers, also who is the best and by how much.

    Args:
        value: "median_s" or "peak_mib".
    """
    columns = providers(found, value)
    contest = any(race.ahead(value) for race in found)
    floor = value == "median_s" and any(_of_floor(race) for race in found)
    unit = "peak MiB" if value == "peak_mib" else "median ms"
    ratio = f" ({LITERAL} / it)" if LITERAL in columns else ""
    head = [unit + ratio, *columns]
    head += ["best peer", "best peer / best of ours"] * contest + ["best of ours: of floor"] * floor
    lines = [head, ["---"] * len(head)]
    for race in found:
        if race.timed(value):
            cells = [race.label, *(_cell(race, name, value) for name in columns)]
            lines.append(cells + _contest(race, value) * contest + [_of_floor(race)] * floor)
    return _markdown(lines)


def _cell(race: Race, name: str, value: str) -> str:
    """The value, and its ratio to the literal equations', or where floors are measured its rate."""
    if name not in race.timed(value):
        status = race.rows.get(name, {}).get("status")
        return status if status in ("refused", "failed") else ""
    row = race.rows[name]
    text = number(row[value]) if value == "peak_mib" else _time(row)
    ratio = race.against_literal(row, value)
    if ratio is not None:
        return f"{text} ({ratio:.2f}×)"
    rate = _rate(row) if race.benchmark in FLOORS else ""
    return f"{text} ({rate})" if rate else text


def _time(row: Row) -> str:
    steps = row["sizes"].get("steps")
    text = number(1e3 * row["median_s"])
    return f"{text}, {number(steps / row['median_s'])} steps/s" if steps else text


def _rate(row: Row) -> str:
    """Of arithmetic if the row has any, else of bytes."""
    if row["tflop_per_s"]:
        return flops_rate(row["tflop_per_s"])
    return f"{number(row['gb_per_s'])} GB/s" if row["gb_per_s"] else ""


def flops_rate(tera: float) -> str:
    return f"{number(tera)} TFLOP/s" if tera >= 1 else f"{number(1e3 * tera)} GFLOP/s"


def _contest(race: Race, value: str) -> list[str]:
    ahead = race.ahead(value)
    return ["", ""] if ahead is None else [race.best("peer", value)["provider"], behind(ahead)]


def behind(ratio: float) -> str:
    """A ratio of a peer's value to ours, bold where the peer is ahead."""
    return f"**{ratio:.2f}×**" if round(ratio, 2) < 1 else f"{ratio:.2f}×"


def _of_floor(race: Race) -> str:
    ours = race.best("ours")
    if ours is None or not ours["of_floor"]:
        return ""
    return f"{100 * ours['of_floor']:.0f} % ({ours['floor_by']})"


def summary(found: Mapping[str, Sequence[Race]]) -> str:
    """A line for each case of an op, block, model, training step or sampling run."""
    head = ["case", "best of ours", "median ms", "against literal"]
    head += ["against the best peer", "best peer", "of the floor"]
    lines = [head, ["---"] * len(head)]
    for race in (race for name in SUMMARISED for race in found.get(name, ())):
        case, ours = f"{race.benchmark.replace('_', ' ')} {race.label}", race.best("ours")
        if ours is None:
            wrong = [f"{r['provider']}: {r['status']}" for r in _wrong_of_ours(race)]
            lines += [[case, f"**none** ({'; '.join(wrong)})", *[""] * 5]] if wrong else []
            continue
        literal, ahead = race.against_literal(ours), race.ahead()
        ratios = ["" if ratio is None else behind(ratio) for ratio in (literal, ahead)]
        peer = race.best("peer")["provider"] if ahead else ""
        lines.append([case, ours["provider"], _time(ours), *ratios, peer, _of_floor(race)])
    note = "Ratios are times of the other through ours; **bold**: the other is faster."
    return f"{_markdown(lines)}\n\n{note}"


def _wrong_of_ours(race: Race) -> list[Row]:
    wrong = ("refused", "failed")
    return [r for r in race.rows.values() if r["role"] == "ours" and r["status"] in wrong]


def not_timed(found: Mapping[str, Sequence[Race]]) -> str:
    """A list of who did not take part and why, the cases of one reason together."""
    cases: dict[tuple[str, str, str], list[Race]] = {}
    for race in (race for benchmark in found.values() for race in benchmark):
        for name, row in race.rows.items():
            if row["status"] != "timed":
                reason = row["reason"] or "not asked to"
                cases.setdefault((row["status"], name, reason), []).append(race)
    lines = [
        f"- {status}: {name} ({_where(those, found)}): {escaped(reason)}"
        for (status, name, reason), those in sorted(cases.items(), key=_urgency)
    ]
    return "\n".join(lines)


def _urgency(item: tuple[tuple[str, str, str], list[Race]]) -> int:
    """What is wrong stands before what is absent."""
    order = ("refused", "failed", "verified", "missing")
    return order.index(item[0][0]) if item[0][0] in order else len(order)


def _where(those: Sequence[Race], found: Mapping[str, Sequence[Race]]) -> str:
    """The cases by benchmark: "all of block; mlp forward, float32"."""
    by_benchmark: dict[str, list[str]] = {}
    for race in those:
        by_benchmark.setdefault(race.benchmark, []).append(race.label)
    return "; ".join(
        f"all of {name}" if len(labels) == len(found[name]) else f"{name} {' | '.join(labels)}"
        for name, labels in by_benchmark.items()
    )


def mixed(found: Mapping[str, Sequence[Race]]) -> list[str]:
    """Cases whose rows are not all of the same code, so that they were no race."""
    every = (race for benchmark in found.values() for race in benchmark)
    return [race.case for race in every if len({r["sources"] for r in race.rows.values()}) > 1]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)


def number(value: float) -> str:
    """Four digits, never an exponent."""
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e4 else f"{value:.0f}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
