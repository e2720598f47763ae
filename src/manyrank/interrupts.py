"""Signals that ask a run to stop: a worker remembers them until the step's end, the launcher passes them on. No torch.

SIGTERM, SIGUSR1 and SIGINT stop a run after a checkpoint; a second SIGINT stops it at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STARTING = 20.0  # seconds that a worker has to start listening
SAME = 1.0  # seconds in which a second SIGINT is the first one, which came from the terminal and from the launcher


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupted: float | None = None
        self._process = 0

    def listen(self) -> None:
        """Take over the signals of this process; only its main thread can."""
        self._process = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for a while; in another thread than the main one they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            self.requested, self._interrupted = False, None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper, that tokenises for instance; its parent ends it so
            os._exit(128 + number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > SAME:
                os._exit(128 + signal.SIGINT)
            self._interrupted = self._interrupted or now
        self.requested = True


STOP = StopRequest()  # of this process


def pass_on_while(work: Callable[[], int]) -> int:
    """Run `work`, which starts processes, in a thread, and pass every stop signal on to them.

    In the main thread torch's agent would take the signals itself: it ends its workers 30 s after SIGTERM, in the
    middle of a save, and does not know SIGUSR1.

    Returns:
        What `work` returned. A signal that comes before there is a process ends this one: with 75, since nothing was
        begun that could be lost, or 130 after an interrupt.
    """
    results: list[int | BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below
            results.append(error)

    passing = _Passing()
    before = {number: signal.signal(number, passing) for number in SIGNALS}
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


class _Passing:
    """The handler of the launcher's signals."""

    def __init__(self) -> None:
        self.interrupts = 0

    def __call__(self, number: int, frame: object) -> None:
        import psutil

        self.interrupts += number == signal.SIGINT
        children = psutil.Process().children()
        if not children:
            os._exit(128 + number if number == signal.SIGINT else EXIT_PREEMPTED)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.interrupts > 1:  # it may wait for another one in C++, where it hears no signal
                    child.kill()
                else:
                    _wait_until_it_listens(child.pid, number)
                    child.send_signal(number)
        if self.interrupts > 1:
            os._exit(128 + signal.SIGINT)


def _wait_until_it_listens(pid: int, number: int) -> None:
    """A worker that has just started would be ended by the signal, and not stopped."""
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (number - 1) & 1:
            return
        time.sleep(0.02)
