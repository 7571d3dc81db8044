"""The command line: ``diffit-kernels sample | evaluate | demo | info``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import diffit_kernels
from diffit_kernels.commands import evaluate, sample
from diffit_kernels.commands.arguments import default_device
from diffit_kernels.demo import demo
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.info import info

INTERRUPTED = 130  # the shell's status for a process ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a bad request, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"diffit-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffit-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffit-kernels", description=diffit_kernels.__doc__)
    parser.add_argument("--version", action="version", version=diffit_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("info", help="versions, devices, and which backend runs each op")
    command.set_defaults(command=lambda arguments: print(info()))

    command = commands.add_parser("demo", help="digits from the small model in the package")
    command.add_argument("--out", type=Path, default=Path("diffit_digits.png"), help="the picture")
    command.add_argument("--device", default=default_device())
    command.add_argument("--backend", choices=BACKENDS)
    command.add_argument("--model", choices=["digits", "image_digits"], default="digits")
    command.set_defaults(command=lambda a: print(demo(a.out, a.device, a.backend, a.model)))

    command = commands.add_parser(
        "sample",
        help="guided samples from a checkpoint, as published",
    )
    sample.add_arguments(command)
    command.set_defaults(command=sample.run)

    command = commands.add_parser("evaluate", help="FID and the like, or samples against samples")
    evaluate.add_arguments(command)
    command.set_defaults(command=evaluate.run)
    return parser
