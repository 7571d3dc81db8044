"""The command line: ``diffit-kernels sample | verify | evaluate | demo | info``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import diffit_kernels
from diffit_kernels.commands import evaluate, sample, verify
from diffit_kernels.commands.arguments import default_device
from diffit_kernels.demo import demo
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.info import info

INTERRUPTED = 130  # the shell's status for a process ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0; 1 where ``verify`` finds an inexact option; 2 for a bad request; 130 when interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"diffit-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffit-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED


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

    command = commands.add_parser(
        "verify",
        help="what each option of sampling costs in accuracy and gains in time",
    )
    verify.add_arguments(command)
    command.set_defaults(command=verify.run)

    command = commands.add_parser("evaluate", help="FID and the like, or samples against samples")
    evaluate.add_arguments(command)
    command.set_defaults(command=evaluate.run)
    return parser
