"""Final models on the hub, byte for byte, with a server of this machine in its place; and what is not published."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import Hub
from huggingface_hub import ModelCard
from launches import launch

BASE = "Qwen/Qwen3-tiny"


@pytest.fixture
def hub():
    hub = Hub(lfs=(".safetensors",))
    with hub.serving():
        yield hub


@pytest.fixture
def push(hub, tmp_path):
    def push(*argv, **env) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **hub.environment, **env}
        command = [sys.executable, "-m", "manyrank.cli", "push", *map(str, argv)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return push


def test_a_run_is_pushed_without_anything_of_this_machine(whole_run, hub, push, tmp_path):
    done = push(whole_run.folder, "me/my", "--base", BASE)
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/me/my\n"), done.stderr
    sent, final = hub.files["me/my"], whole_run.folder / "final_model"
    assert set(sent) == {path.name for path in final.iterdir()}
    own = {"README.md", "adapter_config.json"}
    assert {name: content for name, content in sent.items() if name not in own} == {
        path.name: path.read_bytes() for path in final.iterdir() if path.name not in own
    }
    config = json.loads(sent["adapter_config.json"])
    assert config == json.loads((final / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    card = ModelCard(sent["README.md"].decode())
    assert card.data.base_model == BASE and 'from_pretrained("me/my")' in card.text
    assert not any(str(whole_run.folder).encode() in content or b"/root/" in content for content in sent.values())


def test_a_merged_model_is_pushed_private_and_without_the_report_of_the_merge(embedded_model, hub, push, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(embedded_model, merged)
    (merged / "merge.json").write_text('{"base": "/home/me/base"}')
    (merged / "optimizer.pt").write_text("states")
    hub.lfs = ("nothing",)  # so that the client's way of uploading with Xet sends all in a commit
    assert push("merged", "my", "--private", HF_HUB_DISABLE_XET="0").returncode == 0
    assert hub.repos == {"me/my": True} and not {"merge.json", "optimizer.pt"} & set(hub.files["me/my"])
    assert hub.files["me/my"]["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    hub.repos["me/open"] = False
    refused = push("merged", "me/open", "--private")
    assert refused.returncode == 2 and "public" in refused.stderr and "me/open" not in hub.files


def test_what_is_not_published(whole_run, hub, push, tmp_path):
    final = whole_run.folder / "final_model"
    shutil.copytree(final, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("Trained on /scratch/me/secret.jsonl.")
    cases = {
        (whole_run.folder, "me/my"): "base is a folder of this machine",
        (whole_run.folder / "checkpoint-3", "me/my"): "a checkpoint is not published",
        ("adapter", "me/my", "--base", BASE): "names a folder of this machine: /scratch/me/secret.jsonl",
        (BASE, "me/my"): "there is no such folder",
    }
    for argv, what in cases.items():
        done = push(*argv)
        assert done.returncode == 2 and what in done.stderr and len(done.stderr.splitlines()) == 3, done.stderr
    for token, what in (("", "nobody is logged in"), ("hf_reads", "Invalid user token")):
        done = push(final, "me/my", "--base", BASE, HF_TOKEN=token)
        assert done.returncode == 2 and what in done.stderr and "hf auth login" in done.stderr
    done = push(final, "me/my", "--base", BASE, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and "check the name and the connection" in done.stderr
    assert hub.files == {}


def test_a_folder_with_a_name_like_the_hubs_is_no_base_wherever_one_stands(whole_run, hub, push, tmp_path):
    work = tmp_path / "work"
    final = shutil.copytree(whole_run.folder / "final_model", work / "output" / "my" / "final_model")
    (work / "output" / "my" / "config.yaml").write_text("output_dir: output/my\n")
    (work / BASE).mkdir(parents=True)
    (work / BASE / "config.json").write_text("{}")
    config = json.loads((final / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    (final / "adapter_config.json").write_text(json.dumps(config))
    done = push("work/output/my", "me/my")
    assert done.returncode == 2 and f"base is a folder of this machine: {work / BASE}" in done.stderr
    assert hub.files == {} and push("work/output/my", "me/my", "--base", BASE).returncode == 0


def test_a_run_pushes_at_its_end_and_does_not_fail_for_it(hub, embedded_model, tmp_path):
    """With the base under a name that could be the hub's."""
    (tmp_path / "Qwen").mkdir()
    shutil.copytree(embedded_model, tmp_path / BASE)
    args = [
        "--method=full",
        "--max_steps=1",
        "--save_steps=off",
        "--strategy=single",
        f"--model={BASE}",
        "--push_to_hub",
    ]
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "hf")}
    run = launch(tmp_path / "my", *args, cwd=tmp_path, cold=True, **environment)
    assert run.code == 0 and f"pushed to {hub.url}/me/my" in run.stdout, run.stderr
    final = run.folder / "final_model"
    assert hub.files["me/my"]["model.safetensors"] == (final / "model.safetensors").read_bytes()
    adapter = ["--method=lora", *args[1:], "--hub_model_id=me/other", "--hub_private_repo"]
    run = launch(tmp_path / "other", *adapter, cwd=tmp_path, cold=True, **environment)
    assert run.code == 0 and "warning: not pushed: the adapter's base is a folder" in run.stderr
    assert f"type: manyrank push {tmp_path}/other me/other --private" in run.stderr and "me/other" not in hub.files
    assert (run.folder / "final_model" / "adapter_model.safetensors").is_file()
