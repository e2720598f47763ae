"""Tests of the CUDA path on stand-in libraries: only where `make cuda-dry` has preloaded them, and within LIMIT."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

LIMIT = 20 * 2**30  # bytes of host memory, of all processes of a test
MORE = f"more than {LIMIT / 2**30:.0f} GiB of host memory"
LARGEST = pytest.StashKey[dict[str, int]]()  # bytes at the peak of each test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and "FAKECUDA" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="no stand-in CUDA libraries: make cuda-dry"))


@pytest.fixture(autouse=True)
def within_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill what a test has started when it takes more than LIMIT, before the kernel chooses whom to kill.

    Where pytest itself takes more, it ends: a thread cannot stop the test.
    """
    peaks, over = request.config.stash.setdefault(LARGEST, {}), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            family = psutil.Process().children(recursive=True)
            own = resident(psutil.Process())
            total = own + sum(map(resident, family))
            peaks[request.node.name] = max(total, peaks.get(request.node.name, 0))
            if total > LIMIT:
                for member in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
            if own > LIMIT:
                end(request)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    over.set()
    watcher.join()
    assert peaks.get(request.node.name, 0) <= LIMIT, MORE


def end(request: pytest.FixtureRequest) -> None:
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{request.node.nodeid}: {MORE}; pytest ends", file=sys.stderr, flush=True)
        os._exit(1)


def resident(process: psutil.Process) -> int:
    """Bytes of a process's own memory; what it shares with others is counted once, where it began."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, peak in sorted(config.stash.get(LARGEST, {}).items(), key=lambda pair: -pair[1])[:3]:
        terminalreporter.write_line(f"host memory: {peak / 2**30:.1f} GiB in {name}")
