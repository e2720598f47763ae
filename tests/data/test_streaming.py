"""A run on a stream: the same on any number of processes, and resumed exactly."""

import json

import pytest
from launches import launch

LONG = "a row that is not read\n" * 3


def test_a_run_reads_the_beginning_of_a_stream(embedded_model, tmp_path):
    rows = [json.dumps({"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."}) for i in range(1100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n" + LONG)
    data = f"--data_path={tmp_path / 'rows.jsonl'}"
    common = (data, "--streaming", "--max_steps=4", "--save_steps=2", "--global_batch_size=8")
    one = launch(tmp_path / "one", *common, "--strategy=single")
    two = launch(tmp_path / "two", *common, "--strategy=fsdp", "--nproc=2")
    resumed = launch(
        tmp_path / "resumed", *common, "--strategy=single", f"--resume_from_checkpoint={two.folder / 'checkpoint-2'}"
    )
    for run in (one, two, resumed):
        assert run.code == 0, run.stderr
    assert two.metrics() == pytest.approx(one.metrics(), abs=1e-5) and len(one.metrics()) == 4
    assert resumed.metrics() == pytest.approx(one.metrics()[2:], abs=1e-5)
    (source,) = json.loads((one.folder / "logs" / "data.json").read_text())["readings"][0]["sources"]
    assert source["rows"] == 51  # 4 steps of 8, and a tenth and 16 more
    whole = launch(tmp_path / "whole", data, "--num_train_epochs=1", "--strategy=single")
    assert whole.code == 2 and "rows.jsonl, line 1101" in whole.stderr, whole.stderr
