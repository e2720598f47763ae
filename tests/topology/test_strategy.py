"""One truth for the strategy: torchrun gets from the accelerate configs what accelerate launch gets."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import warm
from launches import ROOT

from manyrank.config.resolve import Setting, resolve
from manyrank.errors import UserError
from manyrank.parallel.accelerator import _parallelism, config_environment, copies
from manyrank.project_files import asset
from manyrank.topology import strategy_files
from manyrank.topology.ranks import Topology
from manyrank.topology.strategies import STRATEGIES

NAMES = list(STRATEGIES)
PRINT = "import json, os; print('ENV' + json.dumps({k: v for k, v in os.environ.items() if k.startswith(('ACCELERATE_', 'FSDP_', 'PARALLELISM_'))}))"


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}


@pytest.mark.parametrize("name", NAMES)
def test_environment_is_that_of_accelerate_launch(name, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(PRINT)
    argv = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file=accelerate_configs/{name}.yaml"]
    argv += ["--num_processes=1", "--num_machines=1", "--main_process_port=0", str(script)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=clean(), timeout=120)
    shown = json.loads(done.stdout.split("ENV")[1].splitlines()[0])
    ours = config_environment(STRATEGIES[name], 1)
    key = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    if key in ours:  # ours does not depend on the folder one is in
        assert ours.pop(key) == str(asset(shown.pop(key)))
    assert ours == shown


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=str)
def test_a_row_says_what_its_files_say(strategy):
    files = strategy_files.read(strategy.name)
    offload = files.offloads_parameters or files.offloads_optimizer
    assert (files.kind, files.zero_stage, offload) == (strategy.engine, strategy.zero_stage, strategy.offload)
    assert bool(files.section("parallelism_config")) == strategy.replicas
    assert files.sharded == ("parameters" in strategy.shards)


def test_every_config_has_a_row():
    assert {file.stem for file in asset("accelerate_configs").glob("*.yaml")} == set(STRATEGIES)


@pytest.mark.parametrize(
    ("nproc", "world_size", "shard_size", "expected"),
    [(8, 32, None, (4, 8)), (8, 32, 4, (8, 4)), (4, 4, 2, (2, 2)), (1, 2, None, (2, 1))],
)
def test_copies_of_the_model_under_hsdp(nproc, world_size, shard_size, expected):
    given = {"model_name_or_path": "embedded", "data_path": "x", "hsdp_shard_size": shard_size}
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items() if value]).config
    assert copies(config, Topology(world_size=world_size, local_world_size=nproc)) == expected


@pytest.mark.parametrize(("key", "size"), [("DP_SHARD", 4), ("DP_REPLICATE", 4), ("TP", 2)])
def test_sizes_that_accelerate_was_told_are_not_ignored(key, size, monkeypatch):
    config = resolve(None, [Setting("model", "embedded", "test"), Setting("data_path", "x", "test")]).config
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{key}_SIZE", str(size))
    with pytest.raises(UserError, match=f"{key.lower()}_size is {size}, not "):
        _parallelism(config, STRATEGIES["hsdp"], Topology(world_size=4, local_world_size=2))
    monkeypatch.delenv(f"PARALLELISM_CONFIG_{key}_SIZE")
    made = _parallelism(config, STRATEGIES["hsdp"], Topology(world_size=4, local_world_size=2))
    assert (made.dp_replicate_size, made.dp_shard_size, made.total_size) == (2, 2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_comment(name):
    lines = (ROOT / "accelerate_configs" / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if ":" in line.split("#")[0] and not line.startswith("#")]
    bare = [line for line in keys if "#" not in line]
    # Sections and what the first line of the file explains.
    assert {line.split(":")[0].strip() for line in bare} <= {
        "compute_environment",
        "distributed_type",
        "fsdp_config",
        "deepspeed_config",
        "parallelism_config",
    }


def test_the_cpu_adapter_is_still_needed():
    """The day accelerate makes FSDP of MULTI_CPU by itself, fsdp_on_cpu.py can go."""
    code = (
        "from accelerate import Accelerator\nfrom accelerate.utils import FullyShardedDataParallelPlugin\n"
        "print('TYPE', Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)).distributed_type.value)"
    )
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean(), **place}, timeout=120
    )
    assert "TYPE MULTI_CPU" in done.stdout, done.stderr


def test_a_new_strategy_is_a_yaml_and_a_row(tmp_path, embedded_model):
    """ZeRO-1, which the project does not have, in a copy of it: planned, trained and verified."""
    for name in ("src", "accelerate_configs", "ds_configs", "launch", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    configs, zero = tmp_path / "accelerate_configs", tmp_path / "ds_configs"
    (configs / "zero1.yaml").write_text((configs / "zero2.yaml").read_text().replace("zero2.json", "zero1.json"))
    (zero / "zero1.json").write_text((zero / "zero2.json").read_text().replace('"stage": 2', '"stage": 1'))
    table = tmp_path / "src" / "manyrank" / "topology" / "strategies.py"
    above = '        Strategy("zero2", '
    row = '        Strategy("zero1", EngineKind.DEEPSPEED, _OPTIMIZER),\n'
    assert table.read_text().count(above) == 1
    table.write_text(table.read_text().replace(above, row + above))

    def manyrank(*argv: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        argv = (sys.executable, "-m", "manyrank.cli", *argv)
        done = warm.run(argv, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    planned = json.loads(manyrank("plan", "--model=qwen2.5-7b", "--gpu=H100", "--nproc=8", "--json"))["strategies"]
    parts = {option["strategy"]: option["parts"] for option in planned}
    assert parts["ddp"]["optimizer"] > parts["zero1"]["optimizer"] == parts["zero2"]["optimizer"]
    told = manyrank(
        "verify", "--methods=lora", "--strategies=zero1", "--via=torchrun", "--nproc=2", f"--keep={tmp_path / 'runs'}"
    )
    assert "all the same" in told
    facts = json.loads((tmp_path / "runs" / "lora-zero1-torchrun" / "logs" / "strategy.json").read_text())
    assert (facts["wrapper"], facts["distributed_type"]) == ("DeepSpeedEngine", "DEEPSPEED")
