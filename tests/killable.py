"""Processes that train and are killed, forked from one that has imported what they need."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import train_latents

ROOT = Path(__file__).parents[1]
CALLS = ("fsync", "replace")  # of a save, at the edges of which a run can be killed


def start(argv, killed_before=None):
    """A process of ``train_latents.main(argv)``; see :func:`run`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "examples")))  # the server's
    try:
        process = context.Process(target=run, args=([str(a) for a in argv], killed_before))
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return process


def run(argv, killed_before):
    """Train in silence; kill this process in place of call number ``killed_before`` of CALLS."""
    torch.set_num_threads(1)  # more only wait for one another in models as small
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    made = 0

    def counted(function):
        def call(*args):
            nonlocal made
            made += 1
            if made == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    sys.exit(train_latents.main(argv))


def finish(process):
    """Wait for a process that is to succeed."""
    process.join(120)
    assert process.exitcode == 0, process.exitcode
