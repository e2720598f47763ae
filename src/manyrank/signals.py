"""Signals that ask a run to stop, and the end of a worker whose launcher is gone. No torch.

SIGTERM, SIGUSR1 and SIGINT end a run at once before its first step, and after a checkpoint from then on: the worker
remembers them until the step's end, the launcher passes them on. A second SIGINT ends it at once.

The launcher passes SIGTERM on as SIGUSR1, since torch's agents send SIGTERM themselves: to the ranks that are left when
one has failed, and to all when a machine comes or leaves. That ends workers, and not the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import EXIT_PREEMPTED, Preempted

if TYPE_CHECKING:
    import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 1.0  # seconds in which a second SIGINT is the same Ctrl-C, sent by the terminal and by the launcher
GRACE = 5.0  # seconds that a start has to end after a signal; it may wait in C++, where Python hears none
NOTICE = 10.0  # seconds without a worker, after which the launcher says what it waits for
ALONE = 30.0  # seconds without a worker, after which a launcher that was asked to stop waits for no other machine
CODE_FILE, STOP_FILE = "exit-code", "stopped"  # in the folder of a launcher, for workers that torch's agent starts anew
LAUNCHER = "MANYRANK_LAUNCHER"  # pid and folder of the launcher, in its workers
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopRequest:
    """Stop requests of this process by signals; until `remember` a signal raises Preempted or KeyboardInterrupt.

    Attributes:
        requested: a signal has come.
        at_start: it has come before there was anything that could be lost, and has raised.
        number: of the first signal, 0 before.
        final: a signal has come that torch's agent does not send: the run is not to be started anew.
    """

    def __init__(self) -> None:
        self.requested = self.at_start = False
        self.number, self.final = 0, False
        self._remembers = True
        self._process = 0
        self._interrupted: float | None = None  # since when, by SIGINT
        self._watched = False  # by a thread, which hears a signal before the main thread does, and counts them
        self._end: Callable[[int], object] = _end_at_once

    def listen(self, end: Callable[[int], object]) -> None:
        """Take over the signals of this process for good; only its main thread can.

        Args:
            end: ends the process after a signal's number, from any thread.
        """
        self._remembers, self._end, self._watched = False, end, True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="signals").start()
        self._take_over()

    @contextlib.contextmanager
    def listening(self, *, remember: bool = False) -> Iterator[None]:
        """Take the signals over for a while; in another thread than the main one they stay as they are.

        A second SIGINT is a KeyboardInterrupt.

        Args:
            remember: from the beginning.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._remembers = remember
        self._take_over()
        try:
            yield
        finally:
            self.requested, self.at_start, self._remembers, self._interrupted = False, False, True, None
            self.number, self.final = 0, False
            for number, handler in before.items():
                signal.signal(number, handler)

    def remember(self) -> None:
        """Remember signals from now on; something looks at `requested` before it is too late.

        A library may have swallowed the exception of an earlier signal: that one is remembered, too.
        """
        self._remembers, self.at_start = True, False

    def ignore(self) -> None:
        """Raise nothing from now on: how this process ends is decided."""
        self._remembers = True

    def _take_over(self) -> None:
        self._process = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper; its parent ends it so
            os._exit(128 + number)
        again, self.requested = self.requested, True
        self.number, self.final = self.number or number, self.final or number != signal.SIGTERM
        if not self._watched and self._is_second_interrupt(number):
            raise KeyboardInterrupt
        if not self._remembers and not again:  # once: what unwinds is left in peace
            self.at_start = True
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted

    def _is_second_interrupt(self, number: int) -> bool:
        if number != signal.SIGINT:
            return False
        first, now = self._interrupted, time.monotonic()
        self._interrupted = first or now
        return first is not None and now - first > SAME

    def _watch(self, reading: int) -> None:
        """End the process where its main thread cannot, since it waits in C++, or for something that never comes."""
        while True:
            for number in os.read(reading, 16):
                if self._is_second_interrupt(number):
                    os._exit(128 + signal.SIGINT)
                if number in SIGNALS and not self._remembers:
                    threading.Thread(target=self._end_if_still_starting, args=(number,), daemon=True).start()

    def _end_if_still_starting(self, number: int) -> None:
        time.sleep(GRACE)
        if not self._remembers:
            self._end(number)


@contextlib.contextmanager
def ending_at_a_signal() -> Iterator[None]:
    """End this launcher at a signal: it has begun nothing, and has no workers to pass the signal on to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end_at_once) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(number: int, frame: object = None) -> None:
    os._exit(ended_by(number))


def begin_worker() -> None:
    """Call this in a worker's first line: it dies with its launcher, and a signal ends it until `StopRequest.listen`."""
    for number in SIGNALS:
        signal.signal(number, _end_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `become` and `pass_on_while`
    end_with_parent()


def become(argv: Sequence[str]) -> NoReturn:
    """Replace this process by a worker, which hears a signal that comes meanwhile in `begin_worker`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(argv[0], list(argv))


def ended_by(number: int) -> int:
    """The exit code of a run that a signal ended before its first step: nothing was begun that could be lost."""
    return 128 + number if number == signal.SIGINT else EXIT_PREEMPTED


def recorded_code(folder: Path) -> int | None:
    """Return the exit code with which workers of a launcher have ended for good, else that of a launcher that was asked to stop."""
    for name in (CODE_FILE, STOP_FILE):
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return None


def launcher_folder() -> Path | None:
    """Return the folder in which the `manyrank` that has started this worker and its workers say how the run ends.

    None under another launcher.
    """
    pid, _, folder = os.environ.get(LAUNCHER, "").partition(":")
    return Path(folder) if pid == str(os.getppid()) else None


def end_with_parent() -> None:
    """End this worker with the launcher that started it, also when that is killed.

    torch's agents start workers in sessions of their own without a parent-death signal (torch 2.13, subprocess_handler.py).
    """
    if not _launched():
        return
    parent = os.getppid()
    # accelerate starts one process by itself, also inside of `manyrank`; any other parent may be a shell.
    if "TORCHELASTIC_RUN_ID" in os.environ or _runs(parent, b"accelerate", b"manyrank"):
        die_with_parent()
    if os.getppid() != parent or (parent == 1 and not _runs(1, b"python", b"torchrun", b"accelerate")):
        os._exit(128 + signal.SIGKILL)  # it ended before this line


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; its own main thread may hang by then.

    Also for `preexec_fn` of subprocess: it holds in the program that is started then.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(128 + signal.SIGKILL)


def _launched() -> bool:
    """Return whether torch's agent or `accelerate launch` has started this process; a shell's children outlive it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _runs(pid: int, *words: bytes) -> bool:
    """Return whether one of these is in a process's command line, which is empty if the process is just ending."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        command = b""
    return not command or any(word in command for word in words)


STOP = StopRequest()  # of this process
_MORTAL: list[bool] = []  # not empty: processes that this one forks end with it
_MASKS: list[set] = []  # of signals, while one is forked


def _before_fork() -> None:
    """Hold signals back: a new helper would write one into its parent's pipe."""
    if _MORTAL:
        _MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    """Detach a forked helper, such as one that tokenises: it would write its signals into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    if _MORTAL:
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of Python misses one that comes just before a wait
    _unmask()


def _unmask() -> None:
    if _MASKS:
        signal.pthread_sigmask(signal.SIG_SETMASK, _MASKS.pop())


os.register_at_fork(before=_before_fork, after_in_parent=_unmask, after_in_child=_after_fork)


@contextlib.contextmanager
def mortal_children() -> Iterator[None]:
    """End processes that this one forks together with it: a pool's would wait for work without end."""
    _MORTAL.append(True)
    try:
        yield
    finally:
        _MORTAL.pop()


def pass_on_while(work: Callable[[], int], *, waits_for: str | None = None) -> int:
    """Run `work`, which starts processes, in a thread, and pass every stop signal on to them.

    In the main thread torch's agent would take the signals itself: it ends its workers 30 s after SIGTERM, in the
    middle of a save, and does not know SIGUSR1.

    Args:
        waits_for: what it may wait for before it starts a process; printed after NOTICE seconds.

    Returns:
        What `work` returned. A signal that comes before there is a process ends this one: with 75, since nothing was
        begun that could be lost, or 130 after an interrupt. The same holds if its processes have ended and `work` still
        waits for other machines.
    """
    results: list[int | BaseException] = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # workers inherit it: one that does not listen yet loses none
        try:
            results.append(work())
        except BaseException as error:  # raised again below
            results.append(error)

    with tempfile.TemporaryDirectory(prefix="manyrank-", ignore_cleanup_errors=True) as folder:
        os.environ[LAUNCHER] = f"{os.getpid()}:{folder}"
        passing = _Passing(Path(folder))
        before = {number: signal.signal(number, passing) for number in SIGNALS}
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            thread.join(NOTICE)
            if waits_for and thread.is_alive() and not _children():
                print(f"still waiting after {NOTICE:.0f} s: {waits_for}", file=sys.stderr, flush=True)
            passing.wait_for(thread)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


class _Passing:
    """The handler of the launcher's signals.

    Attributes:
        folder: of this launcher, for its workers.
        code: the exit code of a launcher that was asked to stop, None before.
        interrupts: how often SIGINT has come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code: int | None = None
        self.interrupts = 0

    def __call__(self, number: int, frame: object) -> None:
        import psutil

        self.interrupts += number == signal.SIGINT
        self.code = self.code or ended_by(number)
        with contextlib.suppress(OSError):  # a full disk stops no signal
            (self.folder / STOP_FILE).write_text(str(self.code))
        children = _children()
        if not children:
            self._exit(self.code)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.interrupts > 1:  # it may wait for another one in C++, where it hears no signal
                    child.kill()
                else:
                    child.send_signal(signal.SIGUSR1 if number == signal.SIGTERM else number)
        if self.interrupts > 1:
            self._exit(128 + signal.SIGINT)

    def wait_for(self, thread: threading.Thread) -> None:
        """Wait for a thread; after a stop, end once no process is left for ALONE seconds: it may wait for other machines."""
        alone = 0.0  # since when
        while thread.is_alive():
            thread.join(1.0)
            if not self.code or _children():
                alone = 0.0
            elif not alone:
                alone = time.monotonic()
            elif time.monotonic() - alone > ALONE and thread.is_alive():
                self._exit(recorded_code(self.folder) or self.code)

    def _exit(self, code: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(code)


def _children() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children()
