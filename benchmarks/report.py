"""The tables of a file of rows, in Markdown."""

import json
from collections import defaultdict
from pathlib import Path


def report(path: Path, baseline: str = "literal") -> str:
    """A table for each benchmark: cases down, providers across, and the ratio to ``baseline``."""
    content = json.loads(path.read_text())
    tables = defaultdict(lambda: defaultdict(dict))  # benchmark -> case -> provider -> row
    for row in content["benchmarks"]:
        name = row["name"].partition("[")[0]
        tables[name][row["group"]][row["extra_info"]["provider"]] = row
    machine, commit = content["machine_info"], content["commit_info"]
    origin = (
        f"{machine['cpu']} ({machine['instructions']}, {machine['threads']} threads), "
        f"GPU {machine['gpu']}, torch {machine['torch']}, Python {machine['python']}, "
        f"commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}"
    )
    return "\n\n".join([origin, *(_table(cases, baseline) for cases in tables.values())])


def _table(cases: dict[str, dict[str, dict]], baseline: str) -> str:
    """Where ours meet peers, two more columns say which peer is best, and how ours compare."""
    rows = [row for case in cases.values() for row in case.values()]
    providers = list(dict.fromkeys(row["extra_info"]["provider"] for row in rows))
    roles = {row["extra_info"].get("role") for row in rows}
    contest = {"peer", "ours"} <= roles
    what = "peak MiB" if "peak_mib" in rows[0]["extra_info"] else "median ms"
    ratio = f" ({baseline} / it)" if baseline in providers else ""
    head = [what + ratio, *providers, *(["best peer", "best peer / best of ours"] * contest)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, case in cases.items():
        cells = [_cell(case, provider, baseline) for provider in providers]
        if contest:
            cells += _contest(case)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def _value(row: dict) -> float:
    return row["extra_info"].get("peak_mib", 1e3 * row["stats"]["median"])


def _cell(case: dict[str, dict], provider: str, baseline: str) -> str:
    """The value, and its ratio to the baseline's; where there is none, the rate."""
    if provider not in case:
        return ""
    value, info = _value(case[provider]), case[provider]["extra_info"]
    if baseline in case:
        return f"{value:.4g} ({_value(case[baseline]) / value:.2f}×)"
    rates = {"gflop_per_s": "GFLOP/s", "gb_per_s": "GB/s"}
    return f"{value:.4g}" + "".join(
        f" ({info[key]:.0f} {unit})" for key, unit in rates.items() if key in info
    )


def _contest(case: dict[str, dict]) -> list[str]:
    """The best peer, and by how much the best of ours beats it."""
    best = {}
    for provider, row in case.items():
        role, this = row["extra_info"].get("role"), (_value(row), provider)
        best[role] = min(best.get(role, this), this)
    if not {"peer", "ours"} <= best.keys():
        return ["", ""]
    return [best["peer"][1], f"{best['peer'][0] / best['ours'][0]:.2f}×"]
