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


def test_the_command_shows_flags_and_stores(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command leaves it
    assert counts.main(["packing"]) == 0
    assert capsys.readouterr().out.count("+0.0%") == 6
    monkeypatch.setattr(counts, "FOLDER", tmp_path)
    assert counts.main(["packing"]) == 1  # nothing is stored there
    assert counts.main(["packing", "--update"]) == 0 and counts.main(["packing"]) == 0
    file = tmp_path / "packing.json"
    file.write_text(file.read_text().replace('"packs": 84', '"packs": 79'))
    assert counts.main(["packing"]) == 1
    assert " 79 " in (line := next(x for x in capsys.readouterr().out.splitlines() if "+6.3%" in x)) and " 84 " in line


def test_counts_of_another_torch_are_not_compared(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(counts, "versions", lambda: {"torch": "2.99.1"})
    assert counts.main(["packing"]) == 1 and "here is 2.99.1" in capsys.readouterr().out


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
