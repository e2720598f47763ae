"""The limit of host memory where a test takes the memory in pytest's own process."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, conftest, pytest
conftest.LIMIT = 2**29
sys.exit(pytest.main(["test_greedy.py"], plugins=[conftest]))
"""
GREEDY = """
import time
def test_greedy():
    taken = bytearray(2**30)
    time.sleep(60)
"""


def test_pytest_ends_and_names_the_test(tmp_path):
    (tmp_path / "test_greedy.py").write_text(GREEDY)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    argv = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert "test_greedy.py::test_greedy: more than 20 GiB of host memory; pytest ends" in ended.stderr
    assert ended.returncode == 1 and "passed" not in ended.stdout and "failed" not in ended.stdout
