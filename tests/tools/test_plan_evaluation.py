"""Which models stand in the table, in which order, and against which; from folders alone."""

import json

import pytest

from manyrank.errors import UserError
from manyrank.models.tiny import default_folder
from manyrank.tools.evaluate.plan import plan_evaluation, resolve_data

RECIPE = "model_name_or_path: {base}\ndata_path: train.jsonl\nmax_length: {length}\nformat_type: text\n"


@pytest.fixture
def folders(tmp_path):
    """An adapter run on A, one on B, a run that trained all of A, and A itself."""

    def write(name: str, **files: object) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file.replace("_json", ".json").replace("_yaml", ".yaml")).write_text(text)
        return str(folder)

    found = {name: write(name, config_json={}) for name in ("A", "B")}
    for name, base in (("on-a", "A"), ("on-b", "B")):
        found[name] = write(name, config_yaml=RECIPE.format(base=found[base], length=64))
        write(f"{name}/final_model", adapter_config_json={"base_model_name_or_path": found[base]})
    found["whole"] = write("whole", config_yaml=RECIPE.format(base=found["A"], length=64))
    write("whole/final_model", config_json={})
    found["adapter"] = write("adapter", adapter_config_json={"base_model_name_or_path": found["A"]})
    return found


def table(plan) -> list[tuple]:
    return [
        (len(weights.models), model.label, model.against, model.adapter) for weights in plan for model in weights.models
    ]


def test_an_adapter_brings_its_base_which_is_loaded_with_it(folders):
    a, run = folders["A"], folders["on-a"]
    assert table(plan_evaluation([run], bases=True)) == [(2, a, None, False), (2, run, a, True)]
    assert table(plan_evaluation([run], bases=False)) == [(1, run, None, True)]


def test_two_of_one_base_bring_it_once(folders):
    a, run, adapter = folders["A"], folders["on-a"], folders["adapter"]
    wanted = [(2, a, None, False), (2, run, a, True), (1, adapter, a, True)]
    assert table(plan_evaluation([run, adapter], bases=True)) == wanted


def test_a_base_that_is_named_is_not_loaded_again(folders):
    a, run = folders["A"], folders["on-a"]
    assert table(plan_evaluation([run, a], bases=True)) == [(1, run, a, True), (1, a, None, False)]


def test_a_run_that_trained_everything_is_compared_with_what_it_began_with(folders):
    a, whole = folders["A"], folders["whole"]
    plan = plan_evaluation([whole], bases=True)
    assert table(plan) == [(1, a, None, False), (1, whole, a, False)]
    assert [weights.artifact.base for weights in plan] == [a, f"{whole}/final_model"]


def test_each_is_compared_with_its_own_base_and_bases_with_the_first(folders):
    a, b = folders["A"], folders["B"]
    assert [model[1:3] for model in table(plan_evaluation([folders["on-a"], folders["on-b"]], bases=True))] == [
        (a, None),
        (folders["on-a"], a),
        (b, a),
        (folders["on-b"], b),
    ]
    assert [model[1:3] for model in table(plan_evaluation([b, a], bases=True))] == [(b, None), (a, b)]


def test_the_embedded_model_has_one_name(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYRANK_CACHE", str(tmp_path / "cache"))
    default_folder().mkdir(parents=True)
    config = {"base_model_name_or_path": str(default_folder())}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = table(plan_evaluation([folders["adapter"]], bases=True))
    assert found == [(2, "embedded", None, False), (2, folders["adapter"], "embedded", True)]


def test_rows_are_read_as_the_run_was_trained_but_new_data_has_its_own_format(folders):
    plan = plan_evaluation([folders["on-a"]], bases=True)
    found = resolve_data(plan, "new.jsonl", {}, max_rows=7).config
    assert (found.max_length, found.format_type, found.columns) == (64, "auto", None)
    assert [(source.path, source.max_rows) for source in found.data_path] == [("new.jsonl", 7)]
    given = resolve_data(plan, "new.jsonl", {"max_length": "32", "format_type": "alpaca"}, max_rows=None).config
    assert (given.max_length, given.format_type) == (32, "alpaca")
    with pytest.raises(UserError, match="no data"):
        resolve_data(plan, None, {}, max_rows=None)


def test_the_runs_own_validation_data_is_read_as_it_was(folders, tmp_path):
    file = tmp_path / "on-a" / "config.yaml"
    file.write_text(file.read_text() + "eval_data_path: {path: own.jsonl, split: x}\n")
    found = resolve_data(plan_evaluation([folders["on-a"]], bases=True), None, {}, max_rows=None).config
    assert (found.format_type, found.data_path[0].path, found.data_path[0].split) == ("text", "own.jsonl", "x")
