"""``python -m benchmarks``: the commands around the measurements; see ``--help``."""

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="pages, plots and the documents' tables from rows")
    folders = "with rows.jsonl; without any: all of benchmarks/results, and the documents"
    report.add_argument("folders", nargs="*", type=Path, metavar="DIR", help=folders)
    report.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    resources = commands.add_parser(
        "resources", help="registers, spills and shared memory of every kernel, without a GPU"
    )
    resources.add_argument("--target", type=int, action="append", help="80, 86, 89, 90, 100, 120")
    resources.add_argument("--dtype", action="append", help="bfloat16, float16, float32, tf32")
    resources.add_argument("--json", type=Path, help="also write the rows here")
    tune = commands.add_parser("tune", help="choose tile sizes on the GPU at hand")
    tune.add_argument("--budget", type=float, default=3600, help="seconds; run again to go on")
    gpu = commands.add_parser("gpu", help="tests, tuning and all rows on a fresh CUDA machine")
    gpu.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on from there")
    gpu.add_argument("--budget", type=float, default=540, help="seconds in all")
    gpu.add_argument("--commit", help="of these sources, for rows of trees without git")
    gpu.add_argument("--again", action="store_true", help="also repeat what has failed")
    gpu.add_argument("--rehearse", action="store_true", help="as much of it as a CPU can run")
    for command in (resources, tune):
        command.add_argument("--only", default="", help="cases that match this pattern")
    given = parser.parse_args(arguments)
    if given.command == "report":
        from benchmarks.report.pages import run

        try:
            return run(given.folders, given.check)
        except ValueError as wrong:
            report.error(str(wrong))
    if given.command == "gpu":
        from benchmarks.gpu import run as run_stages

        return run_stages(given.out, given.budget, given.commit, given.again, given.rehearse)
    if given.command == "tune":
        from benchmarks.tune import tune

        print(tune(given.only, given.budget))
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
    from benchmarks.cases import DTYPES
    from benchmarks.resources import TARGETS, print_resources

    targets, dtypes = given.target or TARGETS, given.dtype or DTYPES
    return print_resources(given.json, targets, dtypes, given.only, os.cpu_count())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
