"""The exit code of a rank, where a signal and an error come together."""

import os
import signal

import pytest

from manyrank.signals import STOP
from manyrank.topology.ranks import Topology
from manyrank.training.exits import run_with_exit_codes


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


def test_a_sigterm_of_the_agent_is_no_stop_of_the_run(tmp_path, monkeypatch):
    """torch's agent sends it to the ranks that are left when one has failed; the exit code of that one holds."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    with STOP.listening():
        assert run_with_exit_codes(lambda: signal.raise_signal(signal.SIGTERM), Topology()) == 75
    assert not list(tmp_path.iterdir())
    (tmp_path / f"manyrank-{os.getppid()}-stop").write_text("75")
    with STOP.listening():
        assert run_with_exit_codes(lambda: signal.raise_signal(signal.SIGTERM), Topology()) == 75
    assert (tmp_path / f"manyrank-{os.getppid()}-a").read_text() == "75"
