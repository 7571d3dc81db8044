"""Types of the command line's arguments; each raises with the rule and the value."""

import argparse
import math

import torch


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def split(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be k/n with k < n, as '0/4', got {text!r}")
    return int(part), int(parts)


def boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return values[text.lower()]


def labels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"must be numbers with commas between, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def switch(parser: argparse.ArgumentParser, name: str, default: bool, what: str) -> None:
    """Add an argument that is True, False, or alone for True, as the published command has them."""
    words = {"type": boolean, "nargs": "?", "const": True, "default": default}
    parser.add_argument(name, **words, help=f"{what}; default {default}")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of guidance, with the published defaults of each kind of model."""
    switch(parser, "--cfg_cond", True, "guide")
    add = parser.add_argument
    add("--cfg_scale", type=finite, help="default as published: 4.4, 1.49 at 512 pixels, DiT 1.5")
    add("--scale_pow", type=finite, help="of the guidance schedule; default 4, DiT 0: constant")
