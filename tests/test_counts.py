"""Counts of a step against those of benchmarks/baselines: launches, FLOP, bytes, reads by the host, and how full packs are."""

import counts
import pytest
import torch
from operators import counted
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("group", counts.GROUPS)
def test_no_count_moves_by_more_than_5_percent(group):
    if why := counts.obstacle(group):
        pytest.skip(why)
    stored = counts.read(group)
    moved = [str(change) for change in counts.compare(group, stored["counts"], counts.count(group)) if change.moved]
    message = "\n".join([f"stored with {stored['versions']}", counts.COLUMNS, *moved, f"if it should: {counts.UPDATE}"])
    assert not moved, message


def test_what_is_stored_is_what_the_documents_say():
    """The host reads the device once in a step and never in a micro-batch, but for the mask of padded rows."""
    steps = counts.read("steps")["counts"]
    assert set(steps) == set(counts.STEPS) and set(counts.read("widths")["counts"]) == set(counts.WIDTHS)
    assert {case: each["reads after them"] for case, each in steps.items()} == dict.fromkeys(steps, 1)
    assert {case for case, each in steps.items() if each["reads in micro-batches"]} == {"lora bf16 padded"}


def test_a_change_is_seen_in_either_direction():
    stored = {"a": {"launches": 100, "reads": 0}, "gone": {"launches": 1}}
    found = {"a": {"launches": 104, "reads": 0}, "new": {"launches": 1}}

    def moved(now: dict) -> list[tuple[str, str]]:
        return [(change.case, change.count) for change in counts.compare("steps", stored, now) if change.moved]

    assert moved(stored) == [] and moved(found) == [("gone", "launches"), ("new", "launches")]
    assert moved(stored | {"a": {"launches": 94, "reads": 0}}) == [("a", "launches")]
    assert moved(stored | {"a": {"launches": 106, "reads": 1}}) == [("a", "launches"), ("a", "reads")]


@pytest.mark.parametrize("fake", [False, True])
def test_what_is_counted_of_an_operator(fake):
    with FakeTensorMode() if fake else torch.device("cpu"):
        a, b, out = torch.ones(8, 32), torch.ones(32, 4), torch.zeros(8, 4)
        with counted() as counter:
            product = torch.mm(a, b)
            out.addmm_(a, b), product.T.unsqueeze(0), torch.empty(10**6)
            del product
            assert float(out.sum()) == 1.0 or not fake
            out.new_ones(16)
    assert counter.launches == 4 and counter.flop == 2 * (2 * 8 * 32 * 4)
    assert counter.traffic == 4 * ((256 + 128 + 32) + (32 + 256 + 128 + 32) + (32 + 1) + (32 + 16))
    assert counter.peak == 4 * (32 + 10**6) and counter.now == 0
    assert counter.reads == ["__float__"]
