"""What is odd about a run: each sign on a record that has it, and on one that nearly has."""

import json
import math
from pathlib import Path

import pytest
from launches import launch

from manyrank.tools.report import oddities
from manyrank.tools.report.run_record import RunRecord, read_run

FALLING = [3.0 - 0.1 * step for step in range(20)]


def record(
    *, config: dict | None = None, data: dict | None = None, gpu: bool = False, **curves: list[float]
) -> RunRecord:
    """A record with a line for each value of each curve."""
    lines = [{"step": step, key: value} for key, values in curves.items() for step, value in enumerate(values, 1)]
    written = {key: (value, "default") for key, value in (config or {}).items()}
    return RunRecord(Path("run"), written, lines, [], data=data or {}, versions={"GPUs": "1 x H100"} if gpu else {})


def test_a_record_without_signs_has_nothing_odd():
    run = record(loss=FALLING, eval_loss=[2.0, 1.5, 1.4], grad_norm=[0.5] * 20, config={"max_grad_norm": "1.0"})
    assert oddities.oddities(run) == [] and oddities.oddities(record()) == []


def test_overfitting():
    text = oddities.overfitting(record(eval_loss=[2.0, 1.5, 1.2, 1.25, 1.3]))
    assert text == "overfitting from step 3: the validation loss rises from 1.2 to 1.3"
    for losses in (
        [2.0, 1.5, 1.2, 1.1, 1.0],
        [2.0, 1.0, 1.2, 1.1, 1.05],  # comes back
        [2.0, 1.5, 1.2, 1.205, 1.21],  # within the noise
        [2.0, 1.5, 1.2, 1.5],  # one validation
        [],
        [math.nan],
    ):
        assert oddities.overfitting(record(eval_loss=losses)) is None


def test_a_flat_loss():
    wobble = [1.5 + 0.01 * (-1) ** step for step in range(20)]
    assert oddities.flat_loss(record(loss=wobble)) == "the loss is flat: 1.5 in the first lines, 1.5 in the last"
    assert oddities.flat_loss(record(loss=FALLING)) is None
    assert oddities.flat_loss(record(loss=wobble[:9])) is None  # too few
    assert oddities.flat_loss(record(loss=wobble, reward=[0.1] * 20)) is None  # of rewards the loss says nothing


def test_a_loss_that_diverges():
    text = oddities.diverged_loss(record(loss=[*FALLING, *[5.0] * 10]))
    assert text == "the loss has diverged: from 1.35 at its lowest to 5 at the end"
    assert "not finite at step 3" in oddities.diverged_loss(record(loss=[2.0, 1.9, math.inf]))
    assert oddities.diverged_loss(record(loss=[*FALLING, *[1.9] * 10])) is None  # keeps most of what it gained
    assert oddities.diverged_loss(record(loss=[*FALLING[:10], 9.0, *FALLING[10:]])) is None  # a spike
    assert oddities.diverged_loss(record(loss=[1.5, 1.4] * 10)) is None


def reading(rows: int, **counts: int) -> dict:
    return {"readings": [{"rows": rows, "counts": {name.replace("_", " "): count for name, count in counts.items()}}]}


def test_rows_that_are_lost():
    bad = {"readings": [{"rows": 100, "counts": {"bad, quarantined": 4, "cut at max_length": 2}}]}
    assert oddities.rows_lost(record(data=bad)) == "of 100 rows 4 left out and 2 cut at max_length"
    assert oddities.rows_lost(record(data=reading(100, cut_at_max_length=5))) is None
    assert oddities.rows_lost(record(data=reading(100, duplicates=50))) is None  # they are kept
    for damaged in ({"readings": 3}, {"readings": [{"rows": 9, "counts": [1]}]}, {"readings": [{"rows": "many"}]}):
        assert oddities.rows_lost(record(data=damaged)) is None


def test_gpus_that_are_idle():
    assert "MFU 5.0%" in oddities.low_mfu(record(mfu=[0.05] * 3, gpu=True))
    assert oddities.low_mfu(record(mfu=[0.4] * 3, gpu=True)) is None
    assert oddities.low_mfu(record(gpu=True)) is None and oddities.low_mfu(record(mfu=[0.05] * 3)) is None


@pytest.mark.parametrize(("bound", "norms"), [("1.0", [0.9] * 20), ("0.0", [9.0] * 20), ("1.0", [9.0] * 9)])
def test_gradients_that_are_not_always_clipped(bound, norms):
    assert oddities.clipped(record(grad_norm=norms, config={"max_grad_norm": bound})) is None


def test_gradients_that_are_always_clipped():
    run = record(grad_norm=[*[9.0] * 19, 0.5], config={"max_grad_norm": "1.0"})
    assert oddities.clipped(run) == "the gradient is clipped in 95% of the steps logged"


def test_rows_that_a_real_run_lost(embedded_model, tmp_path):
    """The names in logs/data.json are those that are counted."""
    good = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(8)]
    rows = [*good, good[0], {"question": "?", "answer": "word " * 400}, {"question": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--max_steps=2", "--on_bad_row=skip", "--duplicates=drop", f"--data_path={tmp_path / 'rows.jsonl'}")
    run = launch(tmp_path / "run", *given, "--overlong=truncate", "--strategy=single")
    assert run.code == 0, run.stderr
    lost = read_run(run.folder)
    assert (lost.rows, lost.rows_left_out, lost.rows_cut) == (11, 2, 1)
    assert oddities.oddities(lost) == ["of 11 rows 2 left out and 1 cut at max_length"]
