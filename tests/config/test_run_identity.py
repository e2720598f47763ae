"""A resumed run is compared with its checkpoint: every difference is told with the key that allows it."""

import json
import re

import pytest

from manyrank.config.identity import FIXED, batch_per_process, early_changes, identity, refuse_changes
from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.topology.precision import Precision


@pytest.fixture(scope="module")
def saved(whole_run, tmp_path_factory):
    """A checkpoint's folder with every name that any run compares, and these values."""
    given = {"model": "m", "data_path": "d", "task": "grpo", "rewards": "{exact: 1}"}
    grpo = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    own = json.loads((whole_run.folder / "checkpoint-3" / "run.json").read_text())
    run = identity(grpo, Precision.FP16) | own | {"batch_per_process": 4}
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "run.json").write_text(json.dumps(run))
    return folder, json.loads(json.dumps(run))


def test_every_name_that_is_compared_is_told_with_a_key_that_allows_it(saved):
    folder, run = saved
    fixed = set()
    assert {"total_steps", "model", "data", "examples", "tokens", "rewards", "bf16", "learning_rate"} <= run.keys()
    for name in run:
        other = run | {name: "other"}
        with pytest.raises(UserError, match="would not be the same") as refusal:
            refuse_changes(folder, other, allowed=[])
        change = refusal.value.what.partition("the same: ")[2]
        assert change.startswith(f"{name}: ") and "-> other" in change
        if change.endswith("(cannot change)"):
            fixed.add(name)
            with pytest.raises(UserError):
                refuse_changes(folder, other, allowed=[name])
            continue
        typed = re.search(r"\(--resume_changes (.*)\)$", change)
        assert f"add --resume_changes {typed[1].split(' or ')[0]};" in refusal.value.fix
        for key in typed[1].split(" or "):
            assert refuse_changes(folder, other, allowed=[key]) == [f"{name}: {run[name]} -> other"]
    assert fixed == {*FIXED, "loss", "needed"}


def test_the_fix_can_be_typed_as_it_stands(saved):
    folder, run = saved
    other = run | {"learning_rate": 1.0, "data": "other", "examples": 1, "total_steps": 9}
    with pytest.raises(UserError) as refusal:
        refuse_changes(folder, other, allowed=["seed"])
    typed = re.search(r"--resume_changes (\S+);", refusal.value.fix)[1].split(",")
    assert sorted(typed) == ["data_path", "learning_rate", "num_train_epochs", "seed"]
    assert len(refuse_changes(folder, other, allowed=typed)) == 4
    with pytest.raises(UserError) as refusal:
        refuse_changes(folder, other | {"lora_r": 3}, allowed=[])
    assert refusal.value.fix.startswith("give the checkpoint's lora_r, which cannot change")


def test_a_micro_batch_may_change_on_a_resume_where_the_batch_is_global():
    def batches(*given: tuple[str, str]) -> int | None:
        entries = [Setting(key, value, "test") for key, value in (("model", "m"), ("data_path", "d"), *given)]
        return batch_per_process(resolve(None, entries).config)

    assert batches(("per_device_train_batch_size", "16"), ("global_batch_size", "64")) is None
    assert batches(("per_device_train_batch_size", "16")) == 16


def test_a_name_that_is_no_key_is_told_by_its_keys(saved):
    folder, run = saved
    with pytest.raises(UserError, match="total_steps is nothing that a resume compares") as refusal:
        refuse_changes(folder, run | {"total_steps": 9}, allowed=["total_steps"])
    assert refusal.value.fix.endswith("num_train_epochs or max_steps")


def test_what_the_recipe_tells_before_the_start_has_its_keys(saved):
    folder, _ = saved
    given = {
        "model": "m",
        "data_path": "d",
        "per_device_train_batch_size": "1",
        "task": "grpo",
        "rewards": "{exact: 1}",
    }
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    told = [
        change for change in early_changes(folder, config, Precision.FLOAT32) if change.startswith("batch_per_process")
    ]
    assert len(told) == 1 and "per_device_train_batch_size or gradient_accumulation_steps" in told[0]
