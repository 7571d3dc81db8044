"""One call in a thread while the caller goes on: a batch is decoded while the next is sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Makes calls in a thread, in the order given, one at a time.

    What a call raises is raised by the next method, or on leaving the ``with`` block. Left by
    another exception, the block still waits for the call under way, whose work is kept.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._call: Future | None = None

    def call(self, function: Callable, *arguments) -> None:
        """Begin a call once the one before is done, so that one is in memory at most."""
        self.wait()
        self._call = self._thread.submit(function, *arguments)

    def wait(self) -> None:
        """Wait for the call under way."""
        call, self._call = self._call, None
        if call is not None:
            call.result()

    def check(self) -> None:
        """Raise what the call under way has raised, without waiting for it."""
        if self._call is not None and self._call.done():
            self.wait()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()
