"""The stories of docs/stories.md, run as a user runs them."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from launches import ROOT
from transformers import AutoModelForCausalLM

from manyrank import cli
from manyrank.runs.logs import read_metrics

MAKE = runpy.run_path(str(ROOT / "data" / "stories" / "make.py"))
NO_SLURM = slurm_cluster.available()


def story(name: str, folder: Path, *argv: str, **variables: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch" / "stories" / f"{name}.sh", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PATH": path, "OUT": str(folder), **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_raw_data_is_what_its_script_makes():
    written = [json.loads(line) for line in (ROOT / "data" / "stories" / "traces.jsonl").read_text().splitlines()]
    assert written == MAKE["traces"]()
    right = [row["175b_verification"]["is_correct"] for row in written]
    for row, is_right in zip(written, right):
        answers = [text.rsplit("#### ", 1)[1] for text in (row["ground_truth"], row["175b_verification"]["solution"])]
        assert (answers[0] == answers[1]) == is_right
    assert 0.6 < sum(right) / len(right) < 0.9


def interrupted(name: str, folder: Path) -> int:
    """Send a story and all it has started SIGUSR1 once the training logs, as SLURM does before the time limit."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", f"trap : USR1; bash launch/stories/{name}.sh", "story"]
    env = {**os.environ, "PATH": path, "OUT": str(folder)}
    metrics = folder / "run" / "logs" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL) as job:
        end = time.monotonic() + 200
        while job.poll() is None and not metrics.exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        os.killpg(job.pid, signal.SIGUSR1)
    return job.returncode


@pytest.mark.nightly
def test_traces(tmp_path, embedded_model):
    assert interrupted("traces", tmp_path) == 75 and not (tmp_path / "run" / "final_model").exists()
    said = story("traces", tmp_path)
    assert "resumed from" in said
    kept = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    wrong = {
        row["question"] + row["175b_verification"]["solution"]
        for row in MAKE["traces"]()
        if not row["175b_verification"]["is_correct"]
    }
    assert kept and not wrong & {row["question"] + row["answer"] for row in kept}
    assert "method: qlora" in (tmp_path / "run" / "config.yaml").read_text()
    base, tuned = json.loads((tmp_path / "evaluation" / "eval_results.json").read_text())["models"].values()
    assert tuned["metrics"]["loss"]["mean"] < 0.5 * base["metrics"]["loss"]["mean"]
    again = story("traces", tmp_path)  # nothing is left to do
    assert "final model" not in again


@pytest.mark.nightly
def test_pairs(tmp_path, embedded_model):
    said = story("pairs", tmp_path / "run", "--max_steps=4")
    assert said.index("training sample 1") < said.index("nothing was saved") < said.index("final model")
    assert (tmp_path / "run" / "report.html").is_file() and len(read_metrics(tmp_path / "run")) >= 1


@pytest.mark.nightly
def test_code(tmp_path, embedded_model):
    story("code", tmp_path)
    rows = [
        json.loads(line)
        for name in ("train", "validation")
        for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
    ]
    right = {row["prompt"] for number, row in enumerate(MAKE["code"]()) if number % 4 != number // 4 % 4}
    assert {row["prompt"] for row in rows} == right
    losses = [line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert any("answers" in row for row in answers)
    assert all(row["answers"][0]["finish"] in ("stop", "length") for row in answers if "answers" in row)


@pytest.mark.nightly
def test_chat(tmp_path, embedded_model):
    said = story("chat", tmp_path / "run")
    assert "stopped with 75; going on" in said and "resumed from" in said
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 30
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")


@pytest.mark.nightly
def test_grpo_learns_what_is_rewarded(tmp_path, embedded_model):
    """From answers of which a third is right to nearly all, near the SFT model."""
    for name, mistakes in (("sums", 0), ("sums_with_mistakes", 2)):
        written = (ROOT / "data" / "stories" / f"{name}.jsonl").read_text().splitlines()
        assert list(map(json.loads, written)) == MAKE["sums"](mistakes)
    story("grpo", tmp_path)
    lines = read_metrics(tmp_path / "grpo")
    assert lines[0]["reward"] < 0.35 and lines[-1]["reward"] > 0.7
    assert max(line["kl"] for line in lines) < 0.5
    models = json.loads((tmp_path / "evaluation" / "eval_results.json").read_text())["models"]
    base, sft, grpo = (model["metrics"]["numeric"]["mean"] for model in models.values())
    assert base < 0.2 and grpo > 0.8 and grpo > sft + 0.2
    assert 'id="chart-reward"' in (tmp_path / "grpo" / "report.html").read_text()


RETRIEVAL = runpy.run_path(str(ROOT / "launch" / "stories" / "retrieval.py"))
BERNOULLI = "What is the variance of a Bernoulli variable with p = 0.3?"


def test_a_search_finds_the_passage_of_a_question():
    passages = (ROOT / "data" / "stories" / "passages.txt").read_text().splitlines()
    index = RETRIEVAL["Index"](passages)
    questions = {
        BERNOULLI: 0,
        "How is the t statistic computed?": 1,
        "What is the median of an even number of values?": 2,
        "What does the central limit theorem say?": 4,
        "What is the expected value of a fair die?": 7,
        "What does Bayes' theorem do?": 9,
    }
    assert {question: passages.index(index.search(question)[0]) for question in questions} == questions
    assert all(index.search(passage, 1) == [passage] for passage in passages)
    assert len(index.search("zzz")) == 3  # a word that no passage has


def test_an_answer_from_passages_is_the_completion_of_their_prompt(whole_run, tmp_path, capsys):
    passages = ROOT / "data" / "stories" / "passages.txt"
    RETRIEVAL["main"](str(whole_run.folder), str(passages), BERNOULLI)
    prompt, answer = capsys.readouterr().out.split("\n  ")
    lines = prompt.splitlines()
    assert (
        lines[1] == passages.read_text().splitlines()[0] and lines[-1] == f"Question: {BERNOULLI}" and len(lines) == 5
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"question": prompt}))
    argv = ["generate", str(whole_run.folder), str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.jsonl")]
    assert cli.main([*argv, "--max-new-tokens", "64"]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["answers"][0]["text"] == answer.strip() != ""


@pytest.mark.nightly
def test_retrieval(tmp_path, embedded_model):
    said = story("retrieval", tmp_path / "run", "--max_steps=4")
    assert "final model" in said and "Answer from these passages.\nThe variance of a Bernoulli variable" in said


@pytest.mark.skipif(bool(NO_SLURM), reason=str(NO_SLURM))
@pytest.mark.nightly
def test_traces_as_a_job(tmp_path, embedded_model):
    log = tmp_path / "job.log"
    with slurm_cluster.cluster() as env:
        env |= {"OUT": str(tmp_path / "out"), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        job = [
            "sbatch",
            "--wait",
            "--gpus-per-node=0",
            "--time=10",
            f"--output={log}",
            "launch/stories/traces.sbatch",
            "--max_steps=2",
        ]
        done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr + log.read_text()
    assert (
        re.search(r"numeric +21", log.read_text()) and (tmp_path / "out" / "evaluation" / "eval_results.json").is_file()
    )
