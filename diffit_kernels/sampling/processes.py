"""The processes that torchrun started on one run: which takes what, and how far all of them are.

Samples need nothing of one another, so the processes share counters in torchrun's key-value store
and nothing else: no collective, whose time limit would end a run with one slow process.
"""

import datetime
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from diffit_kernels.checkpoint_files import first_line

PATIENCE = 1800  # seconds without a step of any process, after which a run is given up
POLL = 0.2  # seconds


def is_started_by_torchrun() -> bool:
    """Whether torchrun started this process, be it alone."""
    return dist.is_available() and dist.is_torchelastic_launched()


def own_device(device: str) -> str:
    """``device``, or this process's own GPU if it says ``cuda`` and torchrun started several."""
    if device == "cuda" and is_started_by_torchrun():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if torch.cuda.device_count() > int(os.environ["LOCAL_RANK"]):
            torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank`` of ``count``, and the counters that all of them share.

    Every method but :meth:`take` and :meth:`advance` is called once, by each process.

    Raises:
        ConnectionError: torchrun, which keeps the counters, is gone.
        TimeoutError: nothing was done for :data:`PATIENCE` seconds.
    """

    rank: int
    count: int
    store: "dist.Store"

    def begin(self) -> None:
        """Go on when the first process is here, which has seen what was done before."""
        patience = datetime.timedelta(seconds=PATIENCE)
        if self.rank > 0:
            _reached(self.rank, lambda: self.store.wait(["begun"], patience))
        else:
            _reached(self.rank, lambda: self.store.set("begun", "yes"))

    def take(self, name: str) -> bool:
        """Whether this process is the first of all to ask for ``name``."""
        return self._add(f"taken {name}", 1) == 1

    def advance(self, amount: int) -> int:
        """Add ``amount`` to what is done; returns what all processes together have done."""
        return self._add("done", amount)

    def finish(self, on_progress: Callable[[int], None]) -> None:
        """Say that this process is done; the first one waits for all.

        ``on_progress`` is called with what all processes together have done.
        """
        finished = self._add("finished", 1)
        done, since = self.advance(0), time.monotonic()
        while self.rank == 0 and finished < self.count:
            on_progress(done)
            time.sleep(POLL)
            finished, before, done = self._add("finished", 0), done, self.advance(0)
            if done != before:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                raise TimeoutError(
                    f"{self.count - finished} of {self.count} processes are not done, and made "
                    f"no step for {PATIENCE} seconds; the same command goes on"
                )
        on_progress(done)

    def _add(self, key: str, amount: int) -> int:
        return _reached(self.rank, lambda: self.store.add(key, amount))


def joined_processes() -> Processes:
    """This process and those that torchrun started with it, or this one alone.

    Raises:
        ConnectionError: one of them did not start.
    """
    if not is_started_by_torchrun():
        return Processes(0, 1, dist.HashStore())
    rank = int(os.environ["RANK"])
    store, rank, count = _reached(rank, lambda: next(dist.rendezvous("env://")))
    return Processes(rank, count, _reached(rank, lambda: fresh_part(store, rank, count)))


def fresh_part(store: "dist.Store", rank: int, count: int) -> "dist.Store":
    """A part of ``store`` in which nothing is counted yet, the same for all processes.

    When torchrun starts its processes anew after a failure, the store has what those before left.
    So the first process answers each other's own question, which no process before can have asked.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"process {rank}", question)
        name = store.get(f"answer to {question}").decode()  # waits for it
        store.add(f"readers of {name}", 1)
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    while store.add(f"readers of {name}", 0) < count - 1:
        for other in range(1, count):
            store.set(f"answer to {store.get(f'process {other}').decode()}", name)
        time.sleep(POLL)
    return dist.PrefixStore(name, store)


def _reached(rank: int, call: Callable):
    """What ``call`` to the store gives."""
    try:
        return call()
    except dist.DistError as error:
        raise ConnectionError(
            f"process {rank} cannot reach the other processes of this run: {first_line(error)}; "
            "the same command goes on"
        ) from error
