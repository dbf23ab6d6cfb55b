"""Being asked to stop: Ctrl-C and SIGTERM end a run after the step under way, with everything saved."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A run was asked to stop, and did so with everything saved.

    Like ``KeyboardInterrupt`` it is no ``Exception``: a launcher's signal handler raises it in the middle of anything,
    and code that makes the best of errors must not take it for one.

    Attributes:
      signum: the signal that asked.
      exit_code: what a launcher should exit with: 130 after SIGINT, as shells expect, and 0 after SIGTERM, which a
        scheduler sends to be obeyed.
    """

    def __init__(self, signum: int, message: str = "stopped"):
        super().__init__(message)
        self.signum = signal.Signals(signum)

    @property
    def exit_code(self) -> int:
        """The launcher's exit code."""
        return 130 if self.signum == signal.SIGINT else 0


class StopRequest:
    """Whether somebody asked to stop: ``signum`` is the first signal that came, or None."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler: notes the request; from then on a second Ctrl-C ends the process at once."""
        if self.signum is None:
            self.signum = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = signal.Signals(signum).name
        print(f"\n{name}: finishing this step and saving; Ctrl-C now stops at once", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a flag while the block runs; outside of the main thread it changes nothing.

    A second SIGINT meets the system's own handler, which ends the process at once; no promise of a run depends on
    its last seconds.

    Yields:
      A :class:`StopRequest`, true once a signal came.

    Example:
      >>> import signal
      >>> from poise.launch.signals import stop_on_signals
      >>> with stop_on_signals() as stop:
      ...     print(bool(stop))
      False
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {signum: signal.signal(signum, request.receive) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
