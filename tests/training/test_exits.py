"""The exit code of a rank, where a signal and an error come together."""

import os
import signal

import pytest

from manyrank.signals import LAUNCHER, STOP, STOP_FILE
from manyrank.topology.ranks import Topology
from manyrank.training.exits import final_exit_code, for_good, run_with_exit_codes


def swallowed() -> None:
    """What an import does that a signal's exception interrupts: half a module stays, and the next use of it fails."""
    try:
        signal.raise_signal(signal.SIGUSR1)
    except BaseException:
        raise RecursionError("maximum recursion depth exceeded") from None


def swallowed_for_good() -> None:
    try:
        signal.raise_signal(signal.SIGUSR1)
    except BaseException:
        STOP.remember()  # the first step begins
    raise RecursionError("a fault of its own")


@pytest.mark.parametrize(("work", "code"), [(swallowed, 75), (swallowed_for_good, 1)])
def test_an_error_after_a_swallowed_signal_is_that_signal_until_the_first_step(work, code, capsys):
    with STOP.listening():
        assert run_with_exit_codes(work, Topology()) == code
    said = capsys.readouterr().err
    assert ("stopped before the first step" in said) == (code == 75) and ("Traceback" in said) == (code == 1)


@pytest.mark.parametrize(("number", "recorded"), [(signal.SIGTERM, None), (signal.SIGUSR1, 75)])
def test_a_sigterm_of_the_agent_is_no_stop_of_the_run(number, recorded, tmp_path, monkeypatch):
    """torch's agent sends it to the ranks that are left when one has failed; the exit code of that one counts."""
    monkeypatch.setenv(LAUNCHER, f"{os.getppid()}:{tmp_path}")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with STOP.listening():
        assert run_with_exit_codes(lambda: signal.raise_signal(number), Topology()) == 75
    assert final_exit_code() == recorded


def test_the_code_of_a_worker_counts_where_its_launcher_was_asked_to_stop(tmp_path, monkeypatch):
    """A save that fails after the signal ends the run with 1."""
    monkeypatch.setenv(LAUNCHER, f"{os.getppid()}:{tmp_path}")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert final_exit_code() is None
    (tmp_path / STOP_FILE).write_text("75")
    assert final_exit_code() == 75
    for_good(1)
    assert final_exit_code() == 1
    monkeypatch.setenv(LAUNCHER, f"1{os.getppid()}:{tmp_path}")  # that of another launcher
    assert final_exit_code() is None
