"""What a stage's processes say, and how all of them are found and ended."""

import codecs
import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

MARK = "BENCHMARK_STAGE_OF"  # in the environment of every process of a stage
LONGEST_LOG = 2 * 2**20  # bytes
SPENT = re.compile(r"the budget of \d+ s is spent")  # says a command that ended by its own budget


class Output(threading.Thread):
    """Copies what a process says to the console and to the end of a log, cut to its last part."""

    def __init__(self, source: int, path: Path):
        super().__init__(daemon=True)
        self.source, self.path, self.spent = source, path, False

    def run(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        tail = ""
        with open(self.path, "wb+") as log:
            while data := os.read(self.source, 2**16):
                text = decode(data)
                sys.stdout.write(text)
                sys.stdout.flush()
                log.write(data)
                log.flush()
                if log.tell() > 2 * LONGEST_LOG:
                    _cut(log)
                self.spent |= SPENT.search(tail + text) is not None
                tail = (tail + text)[-200:]
            _cut(log)

    def ended(self, seconds: float) -> bool:
        """Wait for the last of it; whether a budget was said to be spent."""
        self.join(seconds)
        return self.spent


def _cut(log) -> None:
    if log.tell() <= LONGEST_LOG:
        return
    log.seek(-LONGEST_LOG, os.SEEK_END)
    last = log.read()
    log.seek(0)
    log.truncate()
    log.write(last)
    log.flush()


def marked(mark: str) -> list[int]:
    """The processes of stages with this mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [number for number in found if number != os.getpid()]


def kill_marked(mark: str, seconds: float = 5) -> None:
    """Kill all processes with this mark, and those that they begin meanwhile; wait for the end."""
    end = time.monotonic() + seconds
    while (found := marked(mark)) and time.monotonic() < end:
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)
