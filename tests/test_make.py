"""`make setup` with pip and uv that only note what they are asked for."""

import os
import shutil
import subprocess
import sys

import cuda_drivers
import pytest
from launches import ROOT

TOOL = """#!/usr/bin/env bash
echo "$(basename $0) $*" >> {log}
case "$*" in *"install -q uv") cp $0 $(dirname $0)/uv;; esac
"""
PYTHON = """#!/usr/bin/env bash
if [ "$2" = venv ]; then mkdir -p $3/bin; cp {tool} $3/bin/pip; else exec {python} "$@"; fi
"""
PYPI = ["pip install -q -c constraints.txt torch", "pip install -q -c constraints.txt -e .[dev]"]


@pytest.fixture
def make(tmp_path):
    """Run `make setup` in a copy of the project.

    Returns:
        What was asked of pip and uv.
    """
    log = tmp_path / "log"
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src" / "manyrank" / "topology", tmp_path / "src" / "manyrank" / "topology")
    for name, text in (("tool", TOOL), ("python", PYTHON)):
        (tmp_path / name).write_text(text.format(log=log, tool=tmp_path / "tool", python=sys.executable))
        (tmp_path / name).chmod(0o755)

    def run(*args: str, code: int = 0, **env: str) -> list[str]:
        log.write_text("")
        argv = ["make", "setup", f"PYTHON={tmp_path}/python", *args]
        done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return log.read_text().splitlines()

    return run


def uv(build: str) -> list[str]:
    return [
        "pip uninstall -qq -y torch",
        "pip install -q uv",
        f"uv pip install -q --python .venv/bin/python --torch-backend={build} -c constraints.txt torch",
        *PYPI,
    ]


def test_the_default_is_pypi_s_torch(make):
    assert make() == PYPI
    assert make() == []


def test_another_build_of_torch_stays_until_another_one_is_asked_for(make):
    make()
    assert make("TORCH_INDEX=cu126") == uv("cu126")
    assert make("TORCH_INDEX=cu126") == make() == []
    assert make("TORCH_INDEX=cpu") == uv("cpu")
    assert make("TORCH_INDEX=") == ["pip uninstall -qq -y torch", *PYPI]


def test_auto_takes_the_build_for_the_driver(make, tmp_path):
    library = cuda_drivers.build(tmp_path)
    env = cuda_drivers.environment(library, ("NVIDIA H100", 80 << 30, (9, 0)), FAKE_CUDA="12040")
    assert make("TORCH_INDEX=auto", **env) == uv("cu126")
    assert make() == []


@pytest.mark.parametrize("build", ["cu128", "cu12"])
def test_a_build_that_is_not_there_is_refused_before_anything_is_removed(make, build):
    make()
    assert make(f"TORCH_INDEX={build}", code=2) == []


def test_auto_without_a_driver_installs_nothing(make):
    assert make("TORCH_INDEX=auto", code=2, CUDA_VISIBLE_DEVICES="") == []
    assert make() == PYPI
