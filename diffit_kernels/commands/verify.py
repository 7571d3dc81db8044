"""``diffit-kernels verify``: what each option of sampling costs in accuracy and gains in time."""

import argparse
import json
import math
import platform
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import diffit_kernels
from diffit_kernels.checkpoint import from_pretrained
from diffit_kernels.checkpoint_files import resolve, written_aside
from diffit_kernels.commands.arguments import add_guidance, default_device, positive, switch
from diffit_kernels.commands.sample import untold_config
from diffit_kernels.dispatch import BACKENDS
from diffit_kernels.image_model import ImageDiffiT
from diffit_kernels.model import DiffiT
from diffit_kernels.precision import apply_precision, dtype_of
from diffit_kernels.sampling import check_extra
from diffit_kernels.verification import TIMES, Row, Settings, Verification, verify

WIDTH = 100
NAME_WIDTH, TIME_WIDTH, ERROR_WIDTH = 34, 8, 10
INDENT = "    "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="file, folder, hub id, or 'digits'")
    add("--image_size", type=positive, help="of an image-space checkpoint that does not tell")
    add(
        "--num_sampling_steps",
        type=positive,
        default=10,
        help="of the trajectory on whose states all is compared; default %(default)s",
    )
    add("--batch_size", type=positive, default=4, help="default %(default)s")
    add_guidance(parser)
    add("--seed", type=int, default=0, help="of noise and classes; default 0")
    add("--device", default=default_device(), help="default %(default)s here")
    add("--backend", choices=BACKENDS, help="of the fused ops; default by device")
    add("--repeat", type=positive, default=3, help="timed evaluations of each step; default 3")
    switch(parser, "--check", True, "hold float32 against float64, which takes twice the memory")
    add("--out", type=Path, help=".json for all numbers")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables and the verdict; 0, or 1 if an exact option is not exact."""
    check_extra()
    from tqdm import tqdm

    if arguments.seed < 0:
        raise ValueError(f"--seed must be >= 0, got {arguments.seed}")
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {arguments.out.parent}")
    path = resolve(arguments.model_path)
    config = untold_config(arguments, path)

    def load(precision: str) -> DiffiT | ImageDiffiT:
        model = from_pretrained(
            path,
            config=config,
            device=arguments.device,
            dtype=torch.float64 if precision == "float64" else dtype_of(precision),
            backend=arguments.backend,
        )
        _check_image_size(arguments.image_size, model)
        return model if precision == "float64" else apply_precision(model, precision)

    settings = Settings(
        num_steps=arguments.num_sampling_steps,
        batch_size=arguments.batch_size,
        guide=arguments.cfg_cond,
        cfg_scale=arguments.cfg_scale,
        scale_pow=arguments.scale_pow,
        seed=arguments.seed,
        repeat=arguments.repeat,
        check=arguments.check,
    )
    with tqdm(unit="step", leave=False) as bar:

        def show(name: str, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update()

        found = verify(load, settings, show)
    about = _about(arguments)
    print("\n\n".join((_title(found, about), _table(found), _steps(found), _verdict(found))))
    if arguments.out is not None:
        with written_aside(arguments.out) as file:
            file.write(json.dumps(_plain(about | _numbers(found)), indent=1).encode())
        print(f"wrote {arguments.out}")
    return 0 if found.passed else 1


def _check_image_size(image_size: int | None, model: DiffiT | ImageDiffiT) -> None:
    if image_size is None:
        return
    if not isinstance(model, ImageDiffiT):
        raise ValueError(
            f"--image_size is for checkpoints in image space, and this one is latent: {image_size}"
        )
    if image_size != model.image_size:
        raise ValueError(
            f"--image_size {image_size} does not fit the checkpoint, whose images have "
            f"{model.image_size}"
        )


def _about(arguments: argparse.Namespace) -> dict:
    """What was asked for, and where it ran."""
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    names = ("num_sampling_steps", "batch_size", "seed", "repeat", "backend")
    return {
        "model_path": arguments.model_path,
        **{name: getattr(arguments, name) for name in names},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffit_kernels": diffit_kernels.__version__,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _title(found: Verification, about: dict) -> str:
    guidance = "no guidance" if found.cfg_scale is None else f"guidance {found.cfg_scale:g}"
    if found.scale_pow is not None:
        guidance += f", power {found.scale_pow:g}"
    threads, steps = _count(about["threads"], "thread"), _count(about["num_sampling_steps"], "step")
    lines = (
        f"{about['model_path']}: {found.prediction} at the states of {steps} of {found.sampler}, "
        f"{guidance}, batch {about['batch_size']}, seed {about['seed']}",
        f"on {about['device_name']}, {threads}; torch {about['torch']}, "
        f"diffit-kernels {about['diffit_kernels']}",
        "error: rms of the difference from the published equations in float32, over their rms; "
        "max |diff|: the largest difference; "
        "ms of a step: its prediction alone, the mean over the steps of each one's median of "
        f"{about['repeat']}",
    )
    return "\n".join(_wrapped(line) for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _table(found: Verification) -> str:
    """A line for each option."""
    with_memory = found.rows[0].peak_mib is not None
    heads = ("max error", f"at {found.time}", "mean error", "max |diff|", "ms", "speed")
    heads += ("MiB",) * with_memory
    widths = [max(len(head), 7) + 1 for head in heads]
    lines = [_aligned("option", heads, widths)]
    base = statistics.mean(found.rows[0].milliseconds)
    for row in found.rows:
        if row.refused is not None:
            lines.append(f"{row.option.name:<{NAME_WIDTH}} not run:")
            lines.append(_wrapped(row.refused, INDENT))
            continue
        worst, took = _worst(row.errors), statistics.mean(row.milliseconds)
        values = [
            _small(row.errors[worst]),
            "" if row is found.rows[0] else _time(found.times[worst]),
            _small(statistics.mean(row.errors)),
            _small(row.largest[_worst(row.largest)]),
            f"{took:.2f}" if took < 1000 else f"{took:.0f}",
            f"{base / took:.2f}×",
        ]
        values += [f"{row.peak_mib:.0f}"] if with_memory else []
        lines.append(_aligned(row.option.name, values, widths))
        if row.note is not None:
            lines.append(_wrapped(row.note, INDENT))
    for row in found.rows:
        if row.refused is None and (broken := _broken(row)):
            at = ", ".join(_time(found.times[index]) for index in broken)
            lines.append(_wrapped(f"{row.option.name}: NaN or infinite at {found.time} = {at}"))
    return "\n".join(lines)


def _steps(found: Verification) -> str:
    """A line for each step."""
    literal, *others = (row for row in found.rows if row.refused is None)
    columns = {row.option.column: row.errors for row in others}
    if literal.errors_of_float64 is not None:
        columns = {"rounding*": literal.errors_of_float64} | columns
    widths = [ERROR_WIDTH] * len(columns)
    lines = ["error at each step", _aligned(found.time, columns, widths, TIME_WIDTH)]
    for index, at in enumerate(found.times):
        values = [_small(errors[index]) for errors in columns.values()]
        lines.append(_aligned(_time(at), values, widths, TIME_WIDTH))
    if literal.errors_of_float64 is not None:
        lines.append("* of the published equations in float32, against float64")
    return "\n".join(lines)


def _verdict(found: Verification) -> str:
    if not found.checked:
        return "exact: not checked (--check False)"
    return "\n".join(_verdict_on(found, row) for row in found.rows if row.option.exact)


def _verdict_on(found: Verification, row: Row) -> str:
    name = f"exact, {row.option.name}:"
    if row.errors_of_float64 is None:
        return _wrapped(f"{name} NOT CHECKED, it did not run; --check False goes without")
    rounding = found.rows[0].errors_of_float64
    excess = [e / b for e, b in zip(row.errors_of_float64, found.bounds, strict=True)]
    worst = _worst(excess)
    error, literal = row.errors_of_float64[worst], rounding[worst]
    ratio = f"{error / literal:.2g} times" if literal else f"{_small(error)} beside none of"
    text = (
        f"{ratio} the literal model's rounding at {found.time} = {_time(found.times[worst])} "
        f"({_small(error)} and {_small(literal)} against float64; allowed is "
        f"{_small(found.bounds[worst])}, {TIMES} times + 4 eps)"
    )
    verdict = "yes, at worst" if found.is_exact(row) else "NO,"
    return _wrapped(f"{name} {verdict} {text}")


def _worst(values: Sequence[float]) -> int:
    """The index of the largest; what is not finite is larger."""
    return max(range(len(values)), key=lambda i: (not math.isfinite(values[i]), values[i]))


def _broken(row: Row) -> list[int]:
    return [i for i, value in enumerate(row.largest) if not math.isfinite(value)]


def _wrapped(text: str, first: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=INDENT)


def _aligned(name: str, values: Sequence[str], widths: Sequence[int], name_width=NAME_WIDTH) -> str:
    cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
    return f"{name:<{name_width}}" + "".join(cells)


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def _time(value: float) -> str:
    return f"{value:.4g}"


def _numbers(found: Verification) -> dict:
    numbers = asdict(found)
    for row, numbers_of_row in zip(found.rows, numbers["rows"], strict=True):
        checked = found.checked and row.option.exact
        numbers_of_row["is_exact"] = found.is_exact(row) if checked else None
    return numbers | {"passed": found.passed}


def _plain(value):
    """What JSON can hold: a number that is not finite as 'nan', 'inf' or '-inf'."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
