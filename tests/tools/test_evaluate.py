"""`manyrank evaluate` on a real short run: the training's own loss, the same on two processes, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import warm
from launches import ROOT, launch

from manyrank.data import scores
from manyrank.errors import UserError
from manyrank.models.inference import load_model
from manyrank.tools.evaluate.main import main

FAST = ["--dtype", "float32", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def run(embedded_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    data = "--eval_data_path=data/validation.jsonl"
    done = launch(folder, "--max_steps=4", data, "--eval_steps=4", "--strategy=single", "--learning_rate=3e-3")
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The run on its own validation data, with everything as it comes."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    assert main([str(run.folder), *FAST, "--output", str(folder)]) == 0
    return folder


def read(folder) -> tuple[dict, list[dict]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return json.loads((folder / "eval_results.json").read_text()), list(map(json.loads, lines))


def test_the_loss_is_that_of_the_training(run, evaluated):
    content, _ = read(evaluated)
    found = content["models"][str(run.folder)]["metrics"]["loss"]
    assert found["mean"] == pytest.approx(run.metrics("eval_loss")[-1], abs=1e-5)
    assert found["perplexity"] == pytest.approx(run.metrics("eval_perplexity")[-1], rel=1e-5)
    assert found["n"] == 16 and found["low"] < found["mean"] < found["high"]


def test_the_tuned_model_beats_its_base(run, evaluated):
    content, rows = read(evaluated)
    base, tuned = content["models"]["embedded"], content["models"][str(run.folder)]
    assert list(content["models"]) == ["embedded", str(run.folder)] and base["against"] is None
    assert tuned["metrics"]["loss"]["mean"] < base["metrics"]["loss"]["mean"] - 0.1
    loss = next(one for one in content["comparisons"] if one["metric"] == "loss")
    assert (loss["wins"], loss["losses"], loss["ties"]) == (16, 0, 0) and loss["p"] < 0.001
    change = tuned["metrics"]["loss"]["mean"] - base["metrics"]["loss"]["mean"]
    assert loss["difference"]["mean"] == pytest.approx(change) and loss["against"] == "embedded"
    tokens = sum(row["models"]["embedded"]["tokens"] for row in rows)
    whole = sum(row["models"]["embedded"]["loss"] * row["models"]["embedded"]["tokens"] for row in rows)
    assert (
        base["metrics"]["loss"]["mean"] == pytest.approx(whole / tokens) and tokens == base["metrics"]["loss"]["tokens"]
    )


def test_a_rows_loss_is_plain_cross_entropy(evaluated, embedded_model, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from manyrank.chat_template.render import render

    row = read(evaluated)[1][3]
    rendered = render(tokenizer, [*row["prompt"], {"role": "assistant", "content": row["reference"]}])
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([rendered.input_ids]), labels=torch.tensor([rendered.labels])).loss.item()
    assert row["models"]["embedded"]["loss"] == pytest.approx(loss, abs=1e-5)


def test_predictions_have_the_answers_of_both_and_their_scores(run, evaluated):
    content, rows = read(evaluated)
    assert [row["row"] for row in rows] == list(range(1, 17))
    given = [json.loads(line) for line in (ROOT / "data" / "validation.jsonl").read_text().splitlines()]
    for row, line in zip(rows, given):
        assert row["prompt"][-1]["content"] == line["question"] and row["reference"].startswith(line["answer"])
        for model in row["models"].values():
            assert model["scores"] == {
                "normalised": scores.normalised(model["answer"], row["reference"]),
                "f1": scores.f1(model["answer"], row["reference"]),
            }
    assert any(row["models"]["embedded"]["answer"] != row["models"][str(run.folder)]["answer"] for row in rows)
    mean = sum(row["models"]["embedded"]["scores"]["f1"] for row in rows) / 16
    assert content["models"]["embedded"]["metrics"]["f1"]["mean"] == pytest.approx(mean) and mean > 0
    cut = sum(row["models"]["embedded"]["finish"] == "length" for row in rows)
    assert content["models"]["embedded"]["not_finished"] == cut > 0


def test_two_processes_find_the_same(run, evaluated, tmp_path):
    argv = [sys.executable, "-m", "manyrank.cli", "evaluate", str(run.folder), *FAST, "--nproc", "2", "--output"]
    done = warm.run([*argv, str(tmp_path / "two")], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (one, rows), (two, others) = read(evaluated), read(tmp_path / "two")
    assert others == rows
    assert {**two, "settings": None} == {**one, "settings": None} and two["settings"]["nproc"] == 2
    assert "embedded" in done.stdout and "better" in done.stdout


def test_what_is_wrong_on_two_processes_is_told_once(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n' * 2)
    argv = [sys.executable, "-m", "manyrank.cli", "evaluate", "embedded", "--data", str(tmp_path / "bad.jsonl")]
    argv += ["--nproc", "2", "--output", str(tmp_path / "out")]
    done = warm.run(argv, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_merged_folder_is_the_adapter_and_is_compared_with_its_base(run, tmp_path, capsys):
    merged, tokenizer = load_model(str(run.folder), dtype="float32", merge=True)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    names = ["embedded", str(run.folder), str(tmp_path / "merged")]
    data = ["--data", str(ROOT / "data" / "sample.jsonl"), "--max-rows", "20", "--metrics", "loss"]
    capsys.readouterr()
    assert main([*names, *data, *FAST, "--json", "--output", str(tmp_path / "out")]) == 0
    shown = json.loads(capsys.readouterr().out)
    means = [shown["models"][name]["metrics"]["loss"]["mean"] for name in names]
    assert means[1] == pytest.approx(means[2], abs=1e-5) and means[0] > means[1] + 0.1
    assert [model["metrics"].keys() for model in shown["models"].values()] == [{"loss"}] * 3
    assert (
        shown["models"][names[2]]["against"] == "embedded" and shown["models"][names[0]]["metrics"]["loss"]["n"] == 20
    )


def test_own_metrics_and_without_the_base(run, tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "def short(answer, reference, row):\n    return len(answer) < len(row['answer'])\n\n"
        "def strict(answer, reference, row):\n    assert '4 tosses' not in row['question']\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(ROOT / "data" / "validation.jsonl"), *FAST, "--no-base"]
    assert main([str(run.folder), *data, "--metrics", "own_metric:short,exact", "--output", "out"]) == 0
    content, rows = read(tmp_path / "out")
    assert list(content["models"]) == [str(run.folder)] and not content["comparisons"]
    assert set(content["models"][str(run.folder)]["metrics"]) == {"own_metric:short", "exact"}
    assert all(set(row["models"]) == {str(run.folder)} and "loss" not in row["models"][str(run.folder)] for row in rows)
    with pytest.raises(UserError, match="AssertionError") as wrong:
        main([str(run.folder), *data, "--metrics", "own_metric:strict", "--output", "other"])
    assert "validation.jsonl, line 3" in wrong.value.where and not (tmp_path / "other").exists()


def test_text_has_a_loss_and_no_answers(tmp_path, capsys):
    data = ["--data", str(ROOT / "data" / "formats" / "text.jsonl"), *FAST]
    assert main(["embedded", *data, "--output", str(tmp_path / "out")]) == 0
    content, rows = read(tmp_path / "out")
    assert set(content["models"]["embedded"]["metrics"]) == {"loss"} and "reference" not in rows[0]
    assert "no text answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has a text answer"):
        main(["embedded", *data, "--metrics", "exact", "--output", str(tmp_path / "other")])


WRONG = {
    "model": (["./nowhere", "--data", "data/sample.jsonl"], "no folder ./nowhere"),
    "no number": (
        ["embedded", "--data", "data/validation.jsonl", "--metrics", "numeric"],
        "the reference has no number",
    ),
    "metric": (["embedded", "--metrics", "bleu"], "no metric 'bleu'"),
    "metrics twice": (["embedded", "--metrics", "f1,f1"], "list of different names"),
    "names twice": (["embedded", "embedded"], "named twice"),
    "no data": (["embedded"], "no data"),
    "data": (["embedded", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "sources twice": (["embedded", "--data", "[data/sample.jsonl, data/sample.jsonl]"], "there twice"),
    "strategy": (["embedded", "--strategy", "fsdp"], "no option '--strategy'"),
    "top_p": (["embedded", "--data", "data/sample.jsonl", "--top-p", "0"], "top_p: '0' is invalid"),
    "rows": (["embedded", "--max-rows", "0"], "max_rows: '0' is invalid"),
    "shots": (["embedded", "--shots", "3"], "for --tasks"),
    "value": (["embedded", "--data", "data/sample.jsonl", "--max_length", "many"], "max_length"),
    "option": (["embedded", "--quantisation", "4bit"], "no option '--quantisation'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_and_leaves_nothing(case, tmp_path, monkeypatch):
    argv, what = WRONG[case]
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=what):
        main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="there is something"):
        main(["embedded", "--data", "data/sample.jsonl", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_adapters_of_4_bits_share_their_base(run, tmp_path):
    argv = [str(run.folder), "--metrics", "loss", "--quantization", "4bit", "--output", str(tmp_path / "out")]
    assert main([*argv, "--max-rows", "8"]) == 0
    content, _ = read(tmp_path / "out")
    base, tuned = (model["metrics"]["loss"]["mean"] for model in content["models"].values())
    assert base > tuned + 0.05 and content["settings"]["quantization"] == "4bit"


def test_help_needs_no_torch():
    program = "import sys; from manyrank.tools.evaluate.main import read\ntry: read(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--quantization" in done.stdout, done.stderr


@pytest.fixture
def task(tmp_path):
    """A task of the harness, with its data beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "What is 1 + 1?", "choices": ["2", "3"], "gold": 0},
        {"question": "And 2 + 1?", "choices": ["2", "3"], "gold": 1},
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'sums.jsonl'}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    return folder


def test_benchmarks_of_the_harness(task, run, tmp_path):
    pytest.importorskip("lm_eval")
    argv = [str(run.folder), "--tasks", "sums", "--tasks-folder", str(task), "--metrics", "loss", *FAST]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    content, _ = read(tmp_path / "out")
    for model in content["models"].values():
        assert model["tasks"]["sums"]["acc"] in (0.0, 0.5, 1.0) and model["metrics"]["loss"]["n"] == 16
    with pytest.raises(UserError, match="no task 'summs'"):
        main([str(run.folder), "--tasks", "summs", "--tasks-folder", str(task)])


def test_the_harness_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="not installed") as wrong:
        main(["embedded", "--tasks", "arc_easy"])
    assert "manyrank[eval]" in wrong.value.fix


def test_two_runs_that_read_rows_in_other_ways(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "other")
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("max_length: 256", "max_length: 128"))
    with pytest.raises(UserError, match="max_length 256"):
        main([str(run.folder), str(tmp_path / "other")])
