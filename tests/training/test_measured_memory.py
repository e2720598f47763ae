"""A run's memory beside the plan's, with figures in place of a GPU."""

import json

import pytest
import torch
from planned import planned_run

from manyrank.config.resolve import resolve
from manyrank.models.catalog import read
from manyrank.plan import memory
from manyrank.plan.memory import GiB
from manyrank.topology.gpus import find_kind
from manyrank.training.memory import compare_with_measured, take_peaks


class Allocator:
    """torch.cuda's counters: bytes that are held, of which some are cached, and the peak."""

    def __init__(self, monkeypatch) -> None:
        self.held = self.cached = self.peak = 0
        for name in ("is_available", "max_memory_allocated", "max_memory_reserved", "mem_get_info", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def hold(self, size: int, *, keep: int) -> None:
        self.peak = max(self.peak, self.held + size)
        self.held, self.cached = self.held + size, size - keep

    def is_available(self) -> bool:
        return True

    def max_memory_allocated(self) -> int:
        return self.peak

    max_memory_reserved = max_memory_allocated

    def mem_get_info(self) -> tuple[int, int]:
        return 80 * GiB - self.held, 80 * GiB

    def empty_cache(self) -> None:
        self.held, self.cached = self.held - self.cached, 0

    def reset(self) -> None:
        self.peak = self.held


@pytest.fixture
def run():
    config = resolve("verify", []).config.model_copy(update={"method": "qlora"})
    return planned_run(config, read("llama-3.1-8b"), gpu=find_kind("H100-80GB"))


def test_loading_and_training_are_measured_apart(run, monkeypatch, tmp_path):
    allocator, planned = Allocator(monkeypatch), memory.estimate(run)
    allocator.hold(61 * GiB, keep=6 * GiB)
    loading = take_peaks()
    allocator.hold(20 * GiB, keep=20 * GiB)
    line = compare_with_measured(run, tmp_path, loading)
    assert f"training planned {planned.peak / GiB:.1f} GiB, measured 26.0 held by torch and 26.0 in use" in line
    assert f"loading planned {planned.loading / GiB:.1f}, measured 61.0 held by torch" in line
    facts = json.loads((tmp_path / "logs" / "memory.json").read_text())
    assert (facts["reserved_bytes"], facts["loading"]["reserved_bytes"]) == (26 * GiB, 61 * GiB)
    assert (facts["planned_bytes"], facts["loading"]["planned_bytes"]) == (planned.peak, planned.loading)


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert take_peaks() == {}
