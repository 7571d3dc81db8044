"""``python -m benchmarks report``: pages, plots and tables in documents, all from rows alone.

A device's folder gets README.md and plots/. A document gets its tables between two lines:

    <!-- rows: NAME [FOLDER] [WORDS] -->
    <!-- /rows -->

NAME is ``summary``, a line for each case, or ``plots``, links to the pictures. FOLDER is one of
``benchmarks/results/``, needed if several have rows. WORDS choose: of a summary benchmarks and
dtypes, of plots their names.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.report.plots import Plot, plots
from benchmarks.report.tables import (
    FLOORS,
    LITERAL,
    SUMMARISED,
    Race,
    mixed,
    not_timed,
    origin,
    races,
    summary,
    table,
)

ROWS = "rows.jsonl"
DOCUMENTS = (rows.ROOT / "README.md", rows.ROOT / "benchmarks" / "NOTES.md")
MARKER = re.compile(r"^<!-- (?:rows:(?P<what>[^\n]*?)|/rows) *-->$", re.MULTILINE)
OURS = re.compile(r"bars_.+|scaling|roofline|memory")  # stems of plots that may be removed
READING = f"""\
Written by `python -m benchmarks report` from `{ROWS}`, which has more of each entry: quantiles,
rates, errors, sizes. A number is a median, and in brackets how many times it goes into that of the
{LITERAL} equations. Providers of a case ran in turns in one process, each after its results had
been held against float64; who erred too much was not timed. Peers compute what the case asks for,
floors less: no bias, or products alone. **Bold**: a peer is ahead of ours."""


def run(folders: Sequence[Path], check: bool) -> int:
    """Write what follows from the rows, or only say what does not; the exit status.

    Args:
        folders: with rows each; none: all of ``results/``, and the documents.

    Raises:
        ValueError: a folder without rows, or a marker that is wrong.
    """
    found = [*folders] or with_rows()
    if not found:
        print(f"no {ROWS} under {rows.RESULTS}")
    documents = () if folders else DOCUMENTS
    differing = [path for folder in found for path in update(folder, check)]
    differing += [path for document in documents for path in update_document(document, check)]
    for path in differing:
        print(f"{'stale' if check else 'written'}: {path}")
    if check and differing:
        print("`python -m benchmarks report` makes them anew")
    return int(check and bool(differing))


def with_rows(results: Path = rows.RESULTS) -> list[Path]:
    """The folders of devices that have rows."""
    return sorted(path.parent for path in results.glob(f"*/{ROWS}"))


def update(folder: Path, check: bool = False) -> list[Path]:
    """Bring a folder's page and plots up to its rows; the files that were not, which may be gone.

    Args:
        check: change nothing.
    """
    found = load(folder)
    drawn = {folder / "plots" / f"{name}.svg": plot for name, plot in plots(found).items()}
    old = [path for path in (folder / "plots").glob("*.svg") if OURS.fullmatch(path.stem)]
    gone = sorted(path for path in old if path not in drawn)
    stale = [path for path, plot in drawn.items() if not _shows(path, plot)]
    if not check:
        for path in gone:
            path.unlink()
        for path, plot in drawn.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(plot.svg())
    return gone + stale + _write(folder / "README.md", page(found), check)


def load(folder: Path) -> dict[str, list[Race]]:
    """The races of a folder by benchmark.

    Raises:
        ValueError: there are no rows, or of more than one device.
    """
    path = folder / ROWS
    found = rows.read(path) if path.exists() else []
    if not found:
        raise ValueError(f"{path}: no rows there")
    devices = sorted({row["device"] for row in found})
    if len(devices) > 1:
        raise ValueError(f"{path}: rows of several devices, {', '.join(devices)}: one a folder")
    return races(found)


def _shows(path: Path, plot: Plot) -> bool:
    return path.exists() and plot.digest in path.read_text()


def _write(path: Path, text: str, check: bool) -> list[Path]:
    """Make a file this text; the path if it was not."""
    if path.exists() and path.read_text() == text:
        return []
    if not check:
        path.write_text(text)
    return [path]


def page(found: dict[str, list[Race]]) -> str:
    """A device's page: origin, each benchmark's tables and plots, who was not timed and why."""
    every = [row for cases in found.values() for race in cases for row in race.rows.values()]
    drawn = plots(found)
    parts = [f"# {every[0]['device']}", origin(every), READING]
    if mixed(found):
        parts.append(f"**Rows of different code, no races**: {'; '.join(mixed(found))}.")
    parts += [_image(drawn[name], f"plots/{name}.svg") for name in drawn if "bars_" not in name]
    for name, cases in found.items():
        parts.append(f"## {name.replace('_', ' ')}")
        if f"bars_{name}" in drawn:
            parts.append(_image(drawn[f"bars_{name}"], f"plots/bars_{name}.svg"))
        values = ["median_s"] if name in FLOORS else ["median_s", "peak_mib"]
        timed = [value for value in values if any(race.timed(value) for race in cases)]
        parts += [table(cases, value) for value in timed] or ["Nothing of it was timed."]
    if not_timed(found):
        parts += ["## Not timed", not_timed(found)]
    return "\n\n".join(parts) + "\n"


def _image(plot: Plot, link: str) -> str:
    return f"![{plot.title}]({link})"


def update_document(path: Path, check: bool = False, results: Path = rows.RESULTS) -> list[Path]:
    """Bring what stands between a document's markers up to the rows; the path if it was not."""
    return _write(path, fill(path.read_text(), path, results), check)


def fill(text: str, path: Path, results: Path = rows.RESULTS) -> str:
    """A document's text with what belongs between its markers.

    Raises:
        ValueError: a marker that is not closed, closes nothing, or asks for what is not there.
    """

    def place(marker: re.Match) -> str:
        return f"{path}, line {text.count(chr(10), 0, marker.start()) + 1}: {marker[0]}"

    parts, end, opening = [], 0, None
    for marker in MARKER.finditer(text):
        closes = marker["what"] is None
        if closes != (opening is not None):
            wrong = "closes nothing" if closes else "the one before is open"
            raise ValueError(f"{place(marker)}: {wrong}")
        if closes:
            content = _content(opening["what"].split(), path, results, place(opening))
            parts.append(f"\n\n{content}\n\n")
            end, opening = marker.start(), None
        else:
            parts.append(text[end : marker.end()])
            end, opening = marker.end(), marker
    if opening is not None:
        raise ValueError(f"{place(opening)}: never closed by <!-- /rows -->")
    return "".join(parts) + text[end:]


def _content(words: Sequence[str], path: Path, results: Path, here: str) -> str:
    """What a marker asks for."""
    makers: dict[str, Callable[..., str]] = {"summary": _summary, "plots": _links}
    name, *words = words or [""]
    if name not in makers:
        raise ValueError(f"{here}: {name!r} is none of {', '.join(makers)}")
    known = with_rows(results)
    chosen = [folder for folder in known if folder.name in words] or known
    if len(chosen) != 1:
        names = ", ".join(folder.name for folder in known) or "none"
        raise ValueError(f"{here}: one folder with rows is needed, and there are: {names}")
    (folder,) = chosen
    words = [word for word in words if word != folder.name]
    try:
        return makers[name](load(folder), words, os.path.relpath(folder, path.parent))
    except KeyError as unknown:
        raise ValueError(f"{here}: there is no {unknown} in {folder / ROWS}") from None


def _summary(found: dict[str, list[Race]], words: Sequence[str], link: str) -> str:
    """The summary of these benchmarks and dtypes, or of all, with its origin."""
    every = [row for cases in found.values() for race in cases for row in race.rows.values()]
    names = [name for name in SUMMARISED if name in found]
    dtypes = {race.dtype for cases in found.values() for race in cases}
    for word in words:
        if word not in dtypes.union(names):
            raise KeyError(word)
    benchmarks = [name for name in names if name in words] or names
    wanted = [word for word in words if word in dtypes] or dtypes
    chosen = {name: [r for r in found[name] if r.dtype in wanted] for name in benchmarks}
    where = f"{origin(every)}: [all rows' tables]({Path(link).as_posix()}/README.md)"
    return f"{summary(chosen)}\n\n{where}."


def _links(found: dict[str, list[Race]], words: Sequence[str], link: str) -> str:
    drawn = plots(found)
    names = words or [*drawn]
    return "\n\n".join(
        _image(drawn[name], f"{Path(link).as_posix()}/plots/{name}.svg") for name in names
    )
