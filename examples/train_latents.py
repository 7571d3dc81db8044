"""Train a latent DiffiT on precomputed latents; killed at any moment, the same command goes on.

    python examples/train_latents.py --data latents.npz --model Diffit --dtype bfloat16 --out run
    torchrun --nproc-per-node 8 examples/train_latents.py ...      on several GPUs
    diffit-kernels sample --model_path run/weights.safetensors ...

The data is what ``latent_data.py`` reads, such as the .npz of ``diffit-kernels sample --vae none``.
The process and the loss are the published ones (``diffusion_loss.py``); weights for sampling are an
exponential moving average. The folder ``--out`` holds checkpoint, weights and losses
(``run_folder.py``).

Every random number of a step belongs to (seed, step), and batches to places in an order that
belongs to the seed. So a resumed run makes the same steps as one that was never stopped, on a CPU
to the bit, and several processes make the steps of one process up to rounding.

The letters: B batch over all processes; C channels and S side of a latent.
"""

import argparse
import contextlib
import copy
import functools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from diffit_kernels import DiffiT
from diffit_kernels.dispatch import BACKENDS
from diffusion_loss import (
    NUM_TIMESTEPS,
    Diffusion,
    constant_rate,
    cosine_rate,
    hybrid_loss,
    update_ema,
)
from latent_data import Latents, batches, generator, seed_of
from run_folder import RunFolder

SIZES = {
    "digits": {"hidden_size": 96, "depth": 4, "num_heads": 3, "patch_size": 1, "num_classes": 10},
    "Diffit": {
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "patch_size": 2,
        "num_classes": 1000,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERRUPTED = 130  # the shell's status for a process ended by Ctrl-C
HALF_BIN = 1 / 255  # 256 levels on [-1, 1] are 2 / 255 apart, as published for images
DECIDING = [
    "batch_size",
    "lr",
    "schedule",
    "warm_up",
    "weight_decay",
    "clip",
    "ema_decay",
    "label_dropout",
    "latent_scale",
    "dtype",
    "seed",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says; returns the exit status: 0, 2 for a bad request, 130 if interrupted.

    The command line's own arguments are taken if ``argv`` is None.
    """
    args = parse_arguments(argv)
    try:
        with joined_processes(args.device) as process:
            train(args, process)
    except (ValueError, TypeError, OSError, NotImplementedError, FloatingPointError) as error:
        print(f"train_latents: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint"
        print(f"\ntrain_latents: {message}", file=sys.stderr)
        return INTERRUPTED
    return 0


def flag(name: str) -> str:
    """The command line's spelling of an argument."""
    return f"--{name.replace('_', '-')}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a latent DiffiT on precomputed latents, or go on where a run stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help=".npz file, or folder of .safetensors shards")
    add("--out", type=Path, default=Path("run"), help="folder of the run, resumed if it has one")
    add("--model", choices=SIZES, default="Diffit", help="the sizes not given below")
    for name in SIZES["Diffit"]:
        add(flag(name), type=int, help="of the model; default by --model")
    add("--steps", type=int, default=400_000, help="optimizer steps in all")
    add("--batch-size", type=int, default=256, help="latents per step, over all processes")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="of the rate")
    add("--warm-up", type=int, default=100, help="steps over which the rate rises")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--ema-decay", type=float, default=0.9999, help="of the averaged weights")
    add("--label-dropout", type=float, default=0.1, help="share of labels made the null class")
    add("--latent-scale", type=float, default=1.0, help="factor; 0.18215 for a VAE's raw latents")
    add("--dtype", choices=DTYPES, default="float32", help="of autocast; weights stay float32")
    add("--seed", type=int, default=0, help="of weights, order and noise")
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    add("--log-every", type=int, default=10, help="steps between recorded losses")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=BACKENDS, help="of the fused ops; by device if not given")
    switch = functools.partial(add, action=argparse.BooleanOptionalAction)
    switch("--use-fused-tmsa", default=True, help="fused ops, or the literal equations")
    switch("--gradient-checkpointing", default=False, help="recompute blocks to save memory")
    switch("--compile", default=False, help="run the model through torch.compile")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "lr", "clip", "latent_scale", "save_every", "log_every"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            parser.error(f"{flag(name)} must be positive, got {value}")
    for name in ("warm_up", "weight_decay", "seed"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            parser.error(f"{flag(name)} must be at least 0, got {value}")
    for name in ("ema_decay", "label_dropout"):
        if not 0 <= (value := getattr(args, name)) < 1:
            parser.error(f"{flag(name)} must be in [0, 1), got {value}")
    return args


@dataclass(frozen=True)
class Process:
    """One of ``count`` processes that make each step together, and its device."""

    rank: int
    count: int
    device: torch.device


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[Process]:
    """This process, joined with the others if torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield Process(0, 1, torch.device(device))
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), torch.device(device))
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, process: Process) -> None:
    """Make the steps that ``--out`` lacks; its first process writes, all read.

    Raises:
        ValueError: data, sizes or checkpoint do not fit.
        FloatingPointError: a loss is no longer finite. The checkpoint before it stays.
    """
    if args.batch_size % process.count:
        raise ValueError(
            f"--batch-size must be a multiple of the {process.count} processes, "
            f"got {args.batch_size}"
        )
    latents = Latents(args.data, args.latent_scale)
    given = {name: value for name in SIZES["Diffit"] if (value := getattr(args, name)) is not None}
    sizes = SIZES[args.model] | given
    latents.check_labels(sizes["num_classes"])
    settings = sizes | {name: getattr(args, name) for name in DECIDING}
    if args.schedule == "cosine":
        settings["steps"] = args.steps
    flags = {flag(name): value for name, value in settings.items()}
    folder = RunFolder(args.out, {"--data": latents.fingerprint, **flags})
    training = Training(args, sizes, latents.shape, process)
    step = 0
    if (state := folder.resume()) is not None:
        step = training.load(state)
    first = process.rank == 0
    if first:
        folder.clean(step)
    share = slice(process.rank, None, process.count)
    bar = tqdm(initial=step, total=args.steps, desc="training", mininterval=0.5, disable=not first)
    for x0, labels in batches(latents, args.seed, args.batch_size, range(step, args.steps), share):
        losses = training.step(step, x0, labels, share)
        step += 1
        bar.update()
        save = step % args.save_every == 0 or step == args.steps
        if not (save or step % args.log_every == 0):
            continue
        noise, variance = mean_over(process, losses)
        if not math.isfinite(noise + variance):
            raise FloatingPointError(
                f"the loss of step {step} is not finite: noise {noise}, variance {variance}"
            )
        if first:
            bar.set_postfix(loss=f"{noise + variance:.4f}", refresh=False)
            folder.record(step, noise, variance)
            if save:
                folder.save(step, training.state(), training.ema)
    bar.close()
    if first:
        print(f"weights of step {step}: {folder.weights}\nlosses: {folder.losses}")


class Training:
    """All that changes from step to step, and how.

    Args:
        args: the command line.
        sizes: of the model, by the names of DiffiT's arguments.
        shape: (C, S, S) of the latents.
        process: which part of each batch is this process's.
    """

    def __init__(self, args: argparse.Namespace, sizes: dict, shape: tuple, process: Process):
        self.args, self.process = args, process
        self.null_class = sizes["num_classes"]
        torch.manual_seed(args.seed)
        # The null class is one more class here, as labels are dropped by step(), which draws the
        # same ones for any number of processes; the model's own dropout could not.
        self.model = DiffiT(
            input_size=shape[1],
            in_channels=shape[0],
            **sizes | {"num_classes": self.null_class + 1},
            class_dropout_prob=0.0,
            use_fused_tmsa=args.use_fused_tmsa,
            backend=args.backend,
        ).to(process.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.model.gradient_checkpointing = args.gradient_checkpointing
        self.network = torch.compile(self.model) if args.compile else self.model
        if process.count > 1:
            self.network = torch.nn.parallel.DistributedDataParallel(self.network)
        self.diffusion = Diffusion.linear(process.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=args.dtype == "float16")

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on; the rest follows from the command line and the step."""
        names = ("model", "ema", "optimizer", "scaler")
        return {name: getattr(self, name).state_dict() for name in names}

    def load(self, state: dict[str, Any]) -> int:
        """Take over what :meth:`state` gave; returns the number of steps made."""
        for name in ("model", "ema", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        return state["step"]

    def step(self, step: int, x0: Tensor, labels: Tensor, share: slice) -> Tensor:
        """One step of AdamW on ``share`` of a batch; x0 (B / processes, C, S, S) and its labels.

        Returns the two parts of the loss, (2,) on the device.
        """
        x0, labels = x0.to(self.process.device), labels.to(self.process.device)
        t, epsilon, dropped = (value[share] for value in self.draw(step, x0.shape[1:]))
        labels = torch.where(dropped, self.null_class, labels)
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * rate
        parts = hybrid_loss(self.predict, self.diffusion, x0, labels, t, epsilon, HALF_BIN)
        self.scaler.scale(sum(parts)).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, step, self.args.ema_decay)
        return torch.stack(parts).detach()

    def draw(self, step: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Timesteps, noise and dropped labels of the whole batch, from (seed, step) alone."""
        batch, device, seed = self.args.batch_size, self.process.device, self.args.seed
        # For whatever else draws, such as a dropout in a changed model.
        torch.manual_seed(seed_of(seed, 2, step, self.process.rank))
        draws = {"generator": generator(seed, 1, step, device=device), "device": device}
        t = torch.randint(NUM_TIMESTEPS, (batch,), **draws)
        epsilon = torch.randn(batch, *shape, **draws)
        return t, epsilon, torch.rand(batch, **draws) < self.args.label_dropout

    def rate(self, step: int) -> float:
        """The learning rate's share of its peak."""
        if self.args.schedule == "cosine":
            return cosine_rate(step, self.args.steps, self.args.warm_up)
        return constant_rate(step, self.args.warm_up)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output, under autocast unless ``--dtype`` is float32."""
        dtype = DTYPES[self.args.dtype]
        with torch.autocast(self.process.device.type, dtype, enabled=dtype != torch.float32):
            return self.network(x, t, y)


def mean_over(process: Process, values: Tensor) -> list[float]:
    """The mean of ``values`` over all processes."""
    if process.count > 1:
        dist.all_reduce(values)
    return (values / process.count).tolist()


if __name__ == "__main__":
    sys.exit(main())
