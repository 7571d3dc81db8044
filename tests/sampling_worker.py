"""One of two processes of a run that comes to grief: ``-m tests.sampling_worker FAULT sample …``.

Both store their first batch. In its second, the process of rank 1 is killed, or raises, as FAULT
says, and the other would wait for much longer than any test does.
"""

import os
import signal
import sys
import time
from pathlib import Path

from diffit_kernels.cli import main
from diffit_kernels.sampling import Denoiser

LONG = 150  # seconds
denoise = Denoiser.__call__


def run_with(fault, argv):
    shards = Path(argv[argv.index("--log_dir") + 1]) / "shards"
    calls = 0

    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            if os.environ["RANK"] == "0":
                time.sleep(LONG)
            while len(list(shards.glob("*.npz"))) < 2:
                time.sleep(0.02)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("planted in process 1")
        return denoise(*args, **kwargs)

    Denoiser.__call__ = faulty
    return main(argv)


if __name__ == "__main__":
    sys.exit(run_with(sys.argv[1], sys.argv[2:]))
