"""Trackers and reports: of a real run that is stopped and goes on, and of folders in which much is missing."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Page, browse, look_at, needs_chromium
from launches import Run, launch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from manyrank import cli
from manyrank.config.resolve import Setting, resolve
from manyrank.errors import NonFiniteError, Preempted, UserError
from manyrank.runs import logs
from manyrank.tools.report import main as report
from manyrank.tools.report.run_record import read_run
from manyrank.training import record, trackers

STOPPER = """
import os, signal
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
"""
RATES = (
    "tokens_per_second",
    "supervised_tokens_per_second",
    "samples_per_second",
    "padding",
    "memory_gib",
    "step_seconds",
    "eta_seconds",
)
KEYS = {"step", "time", "loss", "grad_norm", "learning_rate", "epoch", *RATES}
GIVEN = (
    "--max_steps=6",
    "--report_to=wandb,tensorboard",
    "--wandb_project=tests",
    "--wandb_tags=first,second",
    "--run_name=<i>stopped</i>",
    "--eval_data_path=data/validation.jsonl",
    "--eval_steps=2",
    "--packing=none",
    "--sample_questions=What is 1 < 2 <b>?",
    "--sample_max_new_tokens=8",
)


@pytest.fixture(scope="module")
def stopped(embedded_model, tmp_path_factory) -> tuple[Run, Run, str]:
    """A run of two processes that is told to stop in its third step, and goes on as one; its report between the two."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "stopper.py").write_text(STOPPER)
    stop = launch(
        folder / "run", *GIVEN, "--strategy=ddp", "--nproc=2", "--callbacks=stopper:Stop", PYTHONPATH=str(folder)
    )
    assert stop.code == 75, stop.stderr
    between = (folder / "run" / "report.html").read_text()
    run = launch(folder / "run", *GIVEN, "--strategy=single", "--resume_from_checkpoint=auto")
    assert run.code == 0, run.stderr
    return stop, run, between


def wandb_records(folder: Path) -> list[list]:
    """The records of each W&B run file, oldest file first."""
    from wandb.proto.wandb_internal_pb2 import Record

    def parsed(data: bytes) -> Record:
        found = Record()
        found.ParseFromString(data)
        return found

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return [list(map(parsed, log_entries(file.read_bytes()))) for file in files]


def log_entries(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """What a log in LevelDB's format holds: parts with crc, length and kind, in blocks; W&B puts 7 bytes in front."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        entry += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


# Metrics and trackers


def test_every_line_says_how_fast_how_full_and_how_long(stopped, whole_run):
    lines = [line for line in logs.read_metrics(stopped[1].folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) == KEYS and all(math.isfinite(value) for value in line.values())  # no MFU on a CPU
        assert 0 < line["supervised_tokens_per_second"] < line["tokens_per_second"]
        assert 0.01 < line["padding"] < 0.6
        assert line["samples_per_second"] == pytest.approx(8 / line["step_seconds"], rel=0.01)
        assert line["eta_seconds"] == pytest.approx((6 - line["step"]) * line["step_seconds"], abs=0.06, rel=0.01)
    assert whole_run.metrics("padding") == [0.0] * 6
    log = (stopped[1].folder / "logs" / "training_log.txt").read_text()
    assert all(f"  {key} " in log for key in RATES)


def test_a_resumed_run_goes_on_as_the_same_wandb_run(stopped):
    folder = stopped[1].folder
    first, second = wandb_records(folder)  # one of each launch: rank 1 made none
    headers = []
    for records in (first, second):
        (header,) = [found.run for found in records if found.WhichOneof("record_type") == "run"]
        headers.append(header)
        assert (header.project, header.display_name) == ("tests", "<i>stopped</i>")
        assert sorted(header.tags) == ["first", "second"]
    assert headers[0].run_id == headers[1].run_id == (folder / "logs" / trackers.WANDB_ID).read_text().strip()
    logged = {}
    for records in (first, second):
        for entry in (found.history for found in records if found.WhichOneof("record_type") == "history"):
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.item}
            if "train/loss" in values:
                logged[values["train/global_step"]] = values
    lines = {line["step"]: line for line in logs.read_metrics(folder) if "loss" in line}
    assert sorted(logged) == sorted(lines) == [1, 2, 3, 4, 5, 6]
    for step, line in lines.items():
        assert {key: logged[step][f"train/{key}"] for key in ("loss", *RATES)} == {
            key: line[key] for key in ("loss", *RATES)
        }


def test_tensorboard_has_one_run_with_every_step(stopped):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = stopped[1].folder / "logs" / "tensorboard"
    assert len(list(folder.glob("events.out.tfevents*"))) == 2
    found = loading.EventAccumulator(str(folder))
    found.Reload()
    scalars = {event.step: event.value for event in found.Scalars("train/loss")}
    assert list(scalars.values()) == pytest.approx(stopped[1].metrics()) and list(scalars) == [1, 2, 3, 4, 5, 6]
    assert {f"train/{key}" for key in RATES} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("eval/loss")] == [2, 4, 6]


def test_the_summary_is_that_of_the_run(stopped):
    run = stopped[1]
    page = (run.folder / "report.html").read_text()
    texts = Page(page).texts
    adapter = load_file(run.folder / "final_model" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in adapter.values())
    assert run.facts()["trained_parameters"] == trained
    base = AutoModelForCausalLM.from_pretrained(
        PeftConfig.from_pretrained(run.folder / "final_model").base_model_name_or_path
    )
    assert f"{base.num_parameters() + trained:,} parameters, {trained:,} trained" in texts["summary"]
    assert " of 160 rows" in texts["summary"] and "on single, 1 process" in texts["summary"]
    assert f"best loss {min(run.metrics('eval_loss')):.4f} at step 6" in texts["summary"]
    assert '<p class="card" id="odd">Nothing odd.</p>' in page


def test_one_rank_talks(stopped):
    stop = stopped[0]
    assert (stop.stdout + stop.stderr).count("  loss ") == 3 and stop.stdout.count("\ntraining data ") == 1


needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")


@needs_mlflow
def test_mlflow_has_the_run_and_a_resumed_one_goes_on_with_it(embedded_model, tmp_path):
    import mlflow

    (tmp_path / "stopper.py").write_text(STOPPER)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    env = {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_EXPERIMENT_NAME": "tests",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    given = ("--max_steps=5", "--report_to=mlflow", "--run_name=mine")
    stop = launch(tmp_path / "run", *given, "--strategy=ddp", "--nproc=2", "--callbacks=stopper:Stop", **env)
    assert stop.code == 75, stop.stderr
    run = launch(tmp_path / "run", *given, "--strategy=single", "--resume_from_checkpoint=auto", **env)
    assert run.code == 0, run.stderr
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert found.info.run_id == (run.folder / "logs" / trackers.MLFLOW_ID).read_text().strip()
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(run.metrics(), 1)) and len(history) == 5
    assert set(RATES) <= found.data.metrics.keys() and float(found.data.params["learning_rate"]) == 1e-3
    # What it cannot go on with is told, and not replaced by another one.
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/other.db"
    lost = launch(
        tmp_path / "run", *given, "--strategy=single", f"--resume_from_checkpoint={run.folder / 'checkpoint-3'}", **env
    )
    assert lost.code == 2 and f"error: MLflow cannot resume run {found.info.run_id}" in lost.stderr, lost.stderr


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_every_step_in_a_database_of_this_machine(embedded_model, tmp_path):
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    given = ("--max_steps=2", "--report_to=trackio", "--run_name=mine", "--strategy=single")
    run = launch(tmp_path / "run", *given, cold=True, **env)
    assert run.code == 0, run.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "huggingface.db")) as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    assert {name for name, _ in rows} == {"mine"} and [line["train/global_step"] for line in logged] == [1, 2]
    assert [line["train/loss"] for line in logged] == pytest.approx(run.metrics())


@pytest.mark.parametrize(
    ("name", "package"), [("wandbb", None), ("comet_ml", "comet_ml"), ("mlflow", "mlflow"), ("clearml", "clearml")]
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_starts(name, package, tmp_path):
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    run = launch(tmp_path / "run", f"--report_to={name}")
    assert run.code == 2 and run.stdout == ""
    expected = (
        f"tracker {name} needs the package {package}, which is not installed" if package else "no tracker 'wandbb'"
    )
    assert expected in run.stderr and "Traceback" not in run.stderr and not run.folder.exists()


def test_a_folder_of_that_name_is_no_package(tmp_path):
    name = next(name for name in ("mlflow", "clearml") if importlib.util.find_spec(name) is None)
    (tmp_path / name).mkdir()
    run = launch(tmp_path / "run", f"--report_to={name}", PYTHONPATH=str(tmp_path))
    assert run.code == 2 and f"tracker {name} needs the package {name}" in run.stderr


@pytest.mark.parametrize("tags", [["x" * 65], ["a,b"], [""]])
def test_tags_that_wandb_would_refuse(tags):
    with pytest.raises(UserError, match="a tag has 1 to 64 characters"):
        resolve("verify", [Setting("wandb_tags", tags, "the test")])


def test_what_the_user_has_set_for_wandb_stands(tmp_path, monkeypatch):
    config = resolve("verify", [Setting("report_to", "wandb", "the test")]).config
    (tmp_path / "logs").mkdir()
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    trackers.continue_run(config, tmp_path)
    made = trackers.os.environ["WANDB_RUN_ID"]
    assert re.fullmatch("[0-9a-f]{8}", made) and trackers.os.environ["WANDB_RESUME"] == "allow"
    monkeypatch.delenv("WANDB_RUN_ID")
    trackers.continue_run(config, tmp_path)
    assert trackers.os.environ["WANDB_RUN_ID"] == made
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    trackers.continue_run(config, tmp_path)
    assert (trackers.os.environ["WANDB_RUN_ID"], trackers.os.environ["WANDB_RESUME"]) == ("mine", "must")
    assert (tmp_path / "logs" / trackers.WANDB_ID).read_text() == "mine\n"


# The report of a real run


def test_the_history_is_written_down(stopped):
    found = logs.read_history(stopped[1].folder)
    assert [(entry["event"], entry["step"]) for entry in found] == [
        ("started", 0),
        ("preempted", 3),
        ("resumed", 3),
        ("finished", 6),
    ]
    assert [entry["processes"] for entry in found if "processes" in entry] == [2, 1]
    assert "preempted at step 3, with a complete checkpoint" in stopped[2]
    assert "(not reached yet)" in stopped[2]


def test_the_answers_before_are_those_of_the_first_start(stopped):
    (entry,) = logs.read_samples(stopped[1].folder)
    assert entry["question"] == "What is 1 < 2 <b>?" and entry["before"] and entry["after"] is not None
    shown = stopped[1].stdout.split("  before  ")[1].split("\n")[0]
    assert shown.split() == " / ".join(line for line in entry["before"].splitlines() if line.strip()).split()


def test_data_and_versions_are_written_down(stopped, tokenizer):
    folder = stopped[1].folder / "logs"
    data, versions = (json.loads((folder / name).read_text()) for name in ("data.json", "versions.json"))
    training, validation = data["parts"]
    assert validation["examples"] == 16 and training["lengths"]["longest"] <= 256
    assert sum(bar["count"] for bar in training["lengths"]["bars"]) == training["examples"]
    assert training["supervised"] < training["tokens"] and training["out_of"] == 160
    assert versions["torch"] == importlib.import_module("torch").__version__


@needs_chromium
def test_figures_on_the_page_are_those_of_the_run(stopped, tmp_path):
    run = stopped[1]
    html = browse(run.folder / "report.html", tmp_path, "--dump-dom")
    dom = Page(html)
    losses, validation = run.metrics(), run.metrics("eval_loss")
    figures = dom.figures["figures"]
    assert figures[:3] == ["6", repr(losses[-1]), repr(validation[-1])] and repr(min(validation)) in figures
    assert repr(max(run.metrics("memory_gib"))) in figures and "finished; 6 of 6 steps" in dom.texts["summary"]
    assert dom.title == "Report of <i>stopped</i>" and not dom.tags & {"script", "img", "iframe", "link", "b"}
    training = json.loads((run.folder / "logs" / "data.json").read_text())["parts"][0]
    assert dom.figures["training-examples"][:2] == [repr(training["examples"]), repr(training["tokens"])]
    (entry,) = logs.read_samples(run.folder)
    assert dom.samples[:2] == [entry["before"], entry["after"]] and entry["question"] in dom.texts["sample"]
    assert all(event in dom.texts["history"] for event in ("started", "preempted", "resumed", "finished"))
    assert "manyrank.train verify" in dom.texts["launch"] and "single.yaml" in "".join(dom.samples)
    assert "command line, --max_steps" in dom.texts["config"] and "default" in dom.texts["defaults"]
    points = re.findall(
        r"<title>(\d+): ([\d.]+)</title>", re.search('id="chart-loss".*?</section>', html, re.DOTALL)[0]
    )
    drawn = [*enumerate(losses, 1), *zip((2, 4, 6), validation)]
    assert points == [(str(step), f"{loss:.6g}") for step, loss in drawn]
    assert "chart-mfu" not in dom.texts and "memory" not in dom.texts  # a CPU has neither


@needs_chromium
@pytest.mark.parametrize(("width", "scheme", "blue"), [(500, 0, (0x6A, 0xA7, 0xDE)), (1100, 1, (0x2F, 0x74, 0xB5))])
def test_the_page_can_be_looked_at(stopped, tmp_path, width, scheme, blue):
    picture = look_at(stopped[1].folder / "report.html", tmp_path, width=width, scheme=scheme)
    grey = picture.mean(axis=2)
    assert (grey.mean() > 200) if scheme else (grey.mean() < 60)
    assert all(np.ptp(band) > 100 for band in np.array_split(grey, 7)) and np.ptp(grey[:, -4:]) == 0
    drawn = (np.abs(picture - blue).sum(axis=2) < 12).sum()
    assert drawn > 200  # the curves


def test_the_page_needs_nothing_else_and_is_made_anew(stopped, tmp_path, capsys):
    folder = stopped[1].folder
    text = (folder / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)|https?:|url\(|@import", text) and len(text) < 80_000
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "again.html")]) == 0
    *summary, last = capsys.readouterr().out.splitlines()
    assert last == f"written to {tmp_path / 'again.html'}" and summary[0] == "Report of <i>stopped</i>"
    losses = stopped[1].metrics()
    assert f"  loss        {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step 6" in summary
    assert (tmp_path / "again.html").read_text() == text


def test_runs_are_compared(stopped, whole_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(stopped[1].folder), str(whole_run.folder)]) == 0
    dom = Page((tmp_path / "comparison.html").read_text())
    figures = dom.figures["figures"]
    assert figures[:4] == ["6", "6", repr(stopped[1].metrics()[-1]), repr(whole_run.metrics()[-1])]
    assert "oddnothingnothing" in re.sub(r"\s", "", dom.texts["figures"])
    assert dom.title == "2 runs" and "<i>stopped</i>" in dom.texts["figures"]
    differing = dom.texts["differing"]
    assert "packing" in differing and "report_to" in differing and "learning_rate" not in differing
    page = (tmp_path / "comparison.html").read_text()
    charts = re.findall(r'<section class="card" id="chart-(\w+)">(.*?)</section>', page, re.DOTALL)
    curves = {name: len(re.findall(r"L [^>]*stroke: var\(--c", inner)) for name, inner in charts}
    assert curves["loss"] == curves["memory_gib"] == 2 and curves["eval_loss"] == 1  # one of them has no validation


def test_a_run_without_samples_and_validation_has_its_report(whole_run):
    dom = Page((whole_run.folder / "report.html").read_text())
    assert dom.figures["figures"][:2] == ["6", repr(whole_run.metrics()[-1])]
    assert (
        "sample" not in dom.texts and "validation loss" not in dom.texts["figures"] and "training-examples" in dom.texts
    )
    assert whole_run.stdout.count(f"report: {whole_run.folder / 'report.html'}\n") == 1


# Folders in which much is missing


def made_run(folder: Path, lines: str = "", **files: str) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "metrics.jsonl").write_text(lines)
    for name, text in files.items():
        (folder / "logs" / f"{name}.json").write_text(text)
    return folder


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, "time": 1.7e9 + step, **values}) + "\n"


def test_what_a_killed_run_left_of_a_line_is_left_out(tmp_path):
    text = line(1, loss=2.0) + line(2, loss=math.nan) + line(3, loss=1.5) + '{"step": 4, "lo'
    folder = made_run(tmp_path / "run", text, samples='[{"question": "a"', data="[]")
    page = report.write_report([folder]).read_text()
    dom = Page(page)
    assert dom.figures["figures"] == ["3", "1.5"] and "runs still, or was killed" in dom.texts["summary"]
    assert page.count("is damaged, and not shown") == 2  # neither ends the report
    assert read_run(folder).unread == ("logs/data.json", "logs/samples.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data", '{"parts": [{}]}'),
        ("data", '{"parts": 3}'),
        ("data", '{"readings": [{"sources": [1]}]}'),
        ("data", '{"parts": [{"name": "training", "lengths": {}, "examples": "many"}]}'),
        ("samples", "[1]"),
        ("memory", '{"parts": [1]}'),
    ],
)
def test_json_that_is_not_what_a_training_writes(name, text, tmp_path):
    folder = made_run(tmp_path / "run", line(1, loss=2.0), **{name: text})
    page = report.write_report([folder]).read_text()
    assert page.count(f"logs/{name}.json is damaged, and not shown") == page.count("is damaged") == 1
    assert Page(page).figures["figures"] == ["1", "2.0"] and "<h2>Data" not in page and "<h2>Samples" not in page


def test_a_history_and_a_launch_that_are_not_what_a_training_writes(tmp_path):
    folder = made_run(tmp_path / "run", line(1, loss=2.0))
    (folder / "launch.json").write_text('{"nodes": 3, "argv": "x", "env": []}')
    odd = [{"processes": "two"}, {"total_steps": "9"}, {"time": 1e300}]
    for entry in odd:
        (folder / "logs" / "history.jsonl").write_text(json.dumps({"event": "started", "step": 1, **entry}) + "\n")
        assert "2.0" in Page(report.write_report([folder]).read_text()).figures["figures"]
    assert "logs/history.jsonl is damaged" in (folder / "report.html").read_text()


def test_a_run_that_logged_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text('method: lora  # default\nrun_name: "a # b"  # recipe.yaml, run_name\n')
    page = report.write_report([tmp_path]).read_text()
    assert "No step has been logged." in page and "<title>Report of a # b</title>" in page
    assert [entry.folder for entry in [read_run(tmp_path)]] == [tmp_path]


def test_a_very_long_run_is_thinned_out_and_keeps_its_spike(tmp_path):
    values = (line(step, loss=9.0 if step == 70_001 else 1 + 1 / step, grad_norm=0.5) for step in range(1, 100_001))
    folder = made_run(tmp_path / "run", "".join(values))
    started = time.process_time()
    text = report.write_report([folder]).read_text()
    assert time.process_time() - started < 20 and len(text) < 60_000
    chart = re.search('id="chart-loss".*?</section>', text, re.DOTALL)[0]
    (faint,) = re.findall(r'd="([^"]*)" style="[^"]*opacity', chart)
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", faint)]
    (peak, _), first, last = min(points, key=lambda point: point[1]), points[0][0], points[-1][0]
    assert peak == pytest.approx(first + 0.7 * (last - first), abs=1)


def test_planned_memory_is_beside_the_measured(tmp_path):
    gib = 2**30
    facts = {
        "planned_bytes": 30 * gib,
        "parts": {"weights": 20 * gib, "slack": 0},
        "allocated_bytes": 24 * gib,
        "reserved_bytes": 26 * gib,
        "in_use_bytes": 28 * gib,
        "loading": {"planned_bytes": 60 * gib, "reserved_bytes": 61 * gib},
    }
    folder = made_run(tmp_path / "run", line(1, loss=1.0, memory_gib=24.0, mfu=0.4), memory=json.dumps(facts))
    text = report.write_report([folder]).read_text()
    dom = Page(text)
    assert dom.figures["memory"] == ["30.0", "24.0", "26.0", "28.0", "20.0", "60.0", "61.0"]
    assert (
        text.count("stroke: var(--ink)") == 1
        and "torch&#39;s peak on a GPU" in text
        and "40.0%" in dom.texts["figures"]
    )


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["{tmp}"], "not the folder of a run"),
        (["{tmp}/none"], "there is no such folder"),
        (["{run}", "{run}/../run"], "a run is named twice"),
        (["{run}", "--output", "page.txt"], "page.txt is not named as a page"),
        (["{run}", "--output", "{tmp}/none/page.html"], "a page cannot be written to"),
        (["{run}", "--outptu", "page.html"], "no option '--outptu'"),
        ([], "RUNS must be given"),
    ],
)
def test_wrong_use_is_the_users_error(tmp_path, capsys, args, what):
    run = made_run(tmp_path / "run", line(1, loss=1.0))
    assert cli.main(["report", *(arg.format(tmp=tmp_path, run=run) for arg in args)]) == 2
    told = capsys.readouterr().err
    assert what in told and [part.split(":")[0] for part in told.splitlines()] == ["error", "where", "fix"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "metrics.jsonl", "run"]


def test_help_needs_no_torch():
    program = "import sys; from manyrank import cli; cli.main(['report', '--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: manyrank report" in done.stdout and "torch" not in done.stderr


# The report never costs a run


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path, capsys, monkeypatch):
    folder = made_run(tmp_path / "run", line(1, loss=1.0))
    (folder / "report.html").mkdir()
    with record.history(folder, step=lambda: 7, event="started", failed=report.make_report):
        pass
    assert report.make_report(folder) is None
    assert f"WARNING: the report could not be made: a page cannot be written to {folder}" in capsys.readouterr().err
    monkeypatch.setattr(report, "write_report", lambda folders: 1 / 0)
    assert report.make_report(folder) is None
    assert "ZeroDivisionError: division by zero. `manyrank report" in capsys.readouterr().err
    assert [entry["event"] for entry in logs.read_history(folder)] == ["started", "finished"]


def test_a_history_that_cannot_be_written_costs_nothing_else(tmp_path, capsys):
    folder = made_run(tmp_path / "run", line(1, loss=1.0))
    (folder / "logs" / "history.jsonl").mkdir()
    with pytest.raises(Preempted), record.history(folder, step=lambda: 4, event="started", failed=report.make_report):
        raise Preempted
    assert capsys.readouterr().err.count("WARNING: the report will lack something: ") == 2
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("error", "event", "status"),
    [
        (NonFiniteError("the loss is nan\nand more"), "failed", "failed at step 4: NonFiniteError: the loss is nan"),
        (ValueError(""), "failed", "failed at step 4: ValueError"),
        (Preempted(), "preempted", "preempted at step 4, with a complete checkpoint"),
    ],
)
def test_how_a_run_ends_is_written_down_and_raised_again(tmp_path, error, event, status):
    folder = made_run(tmp_path / "run", line(1, loss=1.0))
    (folder / "logs" / "history.jsonl").write_text('{"event": "star')  # torn by a kill
    with (
        pytest.raises(type(error)) as caught,
        record.history(folder, step=lambda: 4, event="resumed", failed=report.make_report, processes=2),
    ):
        raise error
    assert caught.value is error
    assert [entry["event"] for entry in logs.read_history(folder)] == ["resumed", event]
    assert status in Page((folder / "report.html").read_text()).texts["summary"]
