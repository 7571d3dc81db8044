"""The table of a file of rows, in Markdown."""

import json
from collections import defaultdict
from pathlib import Path


def report(path: Path) -> str:
    """Medians in ms by case and provider, and each provider's ratio to the literal one."""
    content = json.loads(path.read_text())
    cases = defaultdict(dict)
    for row in content["benchmarks"]:
        cases[row["group"]][row["extra_info"]["provider"]] = 1e3 * row["stats"]["median"]
    providers = list(dict.fromkeys(name for case in cases.values() for name in case))
    machine, commit = content["machine_info"], content["commit_info"]
    lines = [
        f"{machine['cpu']} ({machine['instructions']}, {machine['threads']} threads), "
        f"GPU {machine['gpu']}, torch {machine['torch']}, Python {machine['python']}, "
        f"commit {commit['id'][:10]}{' with changes' if commit['dirty'] else ''}",
        "",
        f"| median ms (literal / it) | {' | '.join(providers)} |",
        f"|---|{'---|' * len(providers)}",
    ]
    for case, times in cases.items():
        cells = (f"{times[name]:.1f} ({times['literal'] / times[name]:.2f}×)" for name in providers)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)
