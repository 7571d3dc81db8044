"""The same few steps of training by one process, or by two that share each batch.

As a script, one of the two: ``python -m tests.two_processes DEVICE RANK FOLDER``. For each way of
sharing the first process writes what came out, FOLDER/<way>.safetensors.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffit_kernels import DiffiT

ROOT = Path(__file__).parents[1]
BATCHES = (4, 6, 2)  # samples of each step
TIMEOUT = 240  # seconds


def make_model(device, **changes):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = DiffiT(**sizes, class_dropout_prob=0.0, use_fused_tmsa=True, **changes)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model.to(device)


def train(model, device, rank=0, count=1):
    """The losses, last gradients and parameters of steps with every ``count``-th sample.

    By SGD: the key's bias has rounding noise for a gradient, which AdamW would blow up to steps.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for size in BATCHES:
        x = torch.randn(size, 4, 8, 8, generator=generator)
        t = torch.randint(1000, (size,), generator=generator)
        y = torch.randint(5, (size,), generator=generator)
        x, t, y = (value[rank::count].to(device) for value in (x, t, y))
        optimizer.zero_grad()
        loss = (model(x, t, y).float() - torch.cat((x, x), 1)).square().mean()
        loss.backward()
        optimizer.step()
        if count > 1:
            dist.all_reduce(loss := loss.detach())
        losses.append(loss.detach() / count)
    results = {"losses": torch.stack(losses).cpu()}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        results[f"parameter {name}"] = whole(parameter.detach())
        if parameter.requires_grad:
            results[f"gradient {name}"] = whole(parameter.grad)
    return results


def whole(tensor):
    """A tensor, gathered if it is sharded, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def shared(model, device):
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def sharded(model, device, **options):
    """Every block for itself, then the rest."""
    mesh = dist.init_device_mesh(device.type, (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def recomputed(model, device):
    model.gradient_checkpointing = True
    return sharded(model, device)


def in_bfloat16(model, device):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return sharded(model, device, mp_policy=policy)


WAYS = {"ddp": shared, "fsdp": sharded, "recomputed": recomputed, "bfloat16": in_bfloat16}


def main(kind, rank, folder):
    device = torch.device(f"{kind}:{rank}" if kind == "cuda" else kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    for name, way in WAYS.items():
        results = train(way(make_model(device), device), device, rank, 2)
        if rank == 0:
            save_file(results, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def run(kind, folder):
    """What each way gives, from two new processes; neither outlives this call."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.two_processes", kind]
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank), str(folder)],
                        env=environment,
                        stdout=file,
                        stderr=file,
                    )
                )
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {name: load_file(folder / f"{name}.safetensors") for name in WAYS}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
