"""The benchmarks run, and the loops that they compare train the same rows to the same losses. Their speeds are not judged here."""

import importlib.util
import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import gpu
import gpu_check
import own_process
import psutil
import pytest
import speed
from launches import ROOT
from processes import is_running, wait_until


@pytest.mark.nightly
def test_the_loops_train_the_same_rows_to_the_same_losses(tmp_path, capsys):
    """One short round on the project's own sample, in one process and in two."""
    names = "step fp32,trl fp32,bare padded fp32"
    argv = ["--rounds=1", "--steps=3", f"--only={names}", f"--data={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert speed.main(argv) == 0
    table = (tmp_path / "out" / "bench.txt").read_text()
    assert len(table.splitlines()) == 4 and table in capsys.readouterr().out
    lines = {line["name"]: line for line in json.loads((tmp_path / "out" / "bench.json").read_text())}
    reference = lines["bare padded fp32"]
    assert list(lines) == names.split(",")
    assert len(reference["losses"]) == 3 and reference["losses"][0] > reference["losses"][-1] > 1
    assert lines["step fp32"]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert lines["trl fp32"]["losses"] == pytest.approx(reference["losses"], abs=2e-3)  # logged with four digits
    assert lines["step fp32"]["tokens"] == reference["tokens"] == lines["trl fp32"]["tokens"]
    for line in lines.values():
        assert line["start_up"] > 0.5 and line["peak"] > 2**28
        # One core cannot do more in a second than in a CPU second; the reading thread and the clock's grain apart.
        assert 0 < line["per_second"] < 1.5 * line["per_cpu_second"]

    entry = speed.Setting("ddp", "step fp32", ("strategy=ddp",), nproc=2)
    speed.workload.build(tmp_path, data=tmp_path)
    two = speed.measured("ddp", [speed.one_round(entry, tmp_path, 3)])
    assert two.losses == pytest.approx(lines["step fp32"]["losses"], abs=1e-5)
    assert two.tokens == lines["step fp32"]["tokens"]


@pytest.mark.parametrize("argv", [["--steps=2"], ["--rounds=0"], ["--only=nobody"], ["--growth", "--only=step"]])
def test_wrong_options(argv):
    with pytest.raises(SystemExit) as raised:
        speed.main(argv)
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        ("prepare_data.py", ["none.jsonl"], "there is no file none.jsonl"),
        ("save_checkpoint.py", ["none"], "there is no folder none"),
        ("load_model.py", ["--folder=none"], "there is no folder none"),
    ],
)
def test_paths_that_are_not_there(script, argv, said, tmp_path):
    argv = [sys.executable, str(ROOT / "benchmarks" / script), *argv]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith(f"{said}\n") and not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_gpu_cases_run_at_toy_size():
    """The script that measures a GPU: its optimizations change no loss beyond bf16's rounding, and NF4 is NF4."""
    import bitsandbytes as bnb

    def losses(case: gpu.Case) -> list[float]:
        return gpu.Bench(case, toy=True).measure().losses

    fast = losses(gpu.CASES[0])
    plain = losses(gpu.Case("Llama-3.1-8B", "lora", 2, 4096, plain=("lm_head", "lora", "attention")))
    recomputed = losses(gpu.Case("Llama-3.1-8B", "lora", 2, 4096, "full"))
    assert fast[0] > fast[-1]
    assert fast == pytest.approx(plain, abs=0.02) and fast == pytest.approx(recomputed, abs=1e-5)
    base = gpu.Bench(gpu.Case("Qwen2.5-7B", "qlora", 4, 1024), toy=True)._base()
    layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)


@pytest.mark.nightly
def test_each_gpu_case_is_a_line(capfd):
    assert gpu.run(gpu.CASES[5:6], toy=True) == 0
    head, line = capfd.readouterr().out.splitlines()
    assert head.split()[0] == "case" and line.startswith("Qwen2.5-7B qlora 4x1024") and "%" in line
    assert head.split()[-1] == "planned" and float(line.split()[-1]) >= 0


def test_the_peak_of_a_gpu_case_is_planned():
    case = next(case for case in gpu.CASES if case.model == "Llama-3.1-8B" and case.method == "lora")
    planned = gpu.Bench(case, toy=False)._planned()
    assert 48 * 2**30 < planned < 60 * 2**30  # 15 GiB of weights, 35 of activations


def test_the_page_of_gpus_is_made_from_the_results():
    spec = importlib.util.spec_from_file_location("make_gpu", ROOT / "docs" / "make_gpu.py")
    make_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_gpu)
    results = json.loads(gpu_check.FILE.read_text()) if gpu_check.FILE.exists() else None
    assert (ROOT / "docs" / "gpu.md").read_text() == make_gpu.page(results)
    assert make_gpu.page(None).count("| not measured |") == len(gpu_check.PARTS)
    late, failed = {"state": "out of time", "result": {"lora": 1}}, {"state": "failed", "error": "a\nb", "result": {}}
    page = make_gpu.page({"nf4": {"state": "done", "result": {"right": True}}, "trl": late, "qlora": failed})
    assert "| NF4 | right: True |" in page
    assert "are installed | out of time: lora: 1 |" in page and "tokens | failed: a b |" in page


def unhurried(*names: str) -> tuple[gpu_check.Part, ...]:
    """Parts of the GPU check whose limits hold on a busy machine, too."""
    return tuple(replace(part, seconds=1200) for part in gpu_check.PARTS if part.name in names)


def test_cheap_parts_of_the_gpu_check_are_right_and_not_run_again(tmp_path, capsys):
    file, parts = tmp_path / "results.json", unhurried("versions", "float8")
    assert gpu_check.check(file, parts, toy=True, again=False) == 0
    first = json.loads(file.read_text())
    assert {part["state"] for part in first.values()} == {"done"}
    assert first["versions"]["result"]["transformers"] and first["float8"]["result"]["equal bytes"] == 1
    assert all(error < 0.005 for error in first["float8"]["result"]["errors of y, dx"])
    assert all(0.01 < error < 0.06 for error in first["float8"]["result"]["from bf16"])
    assert gpu_check.main(["--toy", "--only=versions,float8", f"--output={file}"]) == 0
    assert json.loads(file.read_text()) == first
    assert capsys.readouterr().out.count("(at most") == 2


def test_a_part_of_the_gpu_check_that_runs_out_of_time_is_run_again(tmp_path):
    file, parts = tmp_path / "results.json", unhurried("float8")
    assert gpu_check.check(file, (replace(parts[0], seconds=0),), toy=True, again=False) == 1
    first = json.loads(file.read_text())["float8"]
    assert first["state"] == "out of time" and first["result"] == {}
    assert gpu_check.check(file, parts, toy=True, again=False) == 0


def test_what_is_wrong_in_a_part_of_the_gpu_check_is_seen():
    right = {"state": "done", "result": {"nf4": {"right": True}}}
    assert not gpu_check._is_wrong(right)
    assert gpu_check._is_wrong({"state": "done", "result": {"lora": {"right": True}, "full": {"right": False}}})
    assert gpu_check._is_wrong({"state": "out of time", "result": {"lora": {"right": True}}})


def test_the_first_parts_of_the_gpu_check_fit_a_quarter_of_an_hour():
    first, all_parts = (sum(part.seconds for part in parts) for parts in (gpu_check.FIRST, gpu_check.PARTS))
    assert first < 15 * 60 and gpu_check.PARTS[: len(gpu_check.FIRST)] == gpu_check.FIRST
    minutes, seconds = divmod(first, 60)
    assert f"{minutes} minutes and {seconds} s together, those of all {all_parts // 60} minutes" in gpu_check.__doc__


def test_cases_before_a_crash_and_beside_a_failure_are_kept():
    """A case that fails says so, and the next is measured; what was printed before the process ended is read."""
    cases = "{'one': lambda: {'x': 1}, 'two': lambda: {'x': 1 / 0}, 'three': lambda: os._exit(3)}"
    done = own_process.run(python(f"import os, own_process; own_process.each({cases})"))
    assert done.returncode == 3
    results = own_process.last_result(done.stdout + own_process.MARK + '{"half": ')
    assert results["one"] == {"x": 1} and list(results) == ["one", "two"]
    assert results["two"] == {"error": "ZeroDivisionError: division by zero", "right": False}


def test_a_training_that_fails_under_torchrun_says_all_lines():
    with pytest.raises(RuntimeError) as caught:
        own_process.train("--method=int8", "--strategy=fsdp", hidden=True, launcher=own_process.TORCHRUN)
    first, what, where, *_, fix = str(caught.value).splitlines()
    assert first == "manyrank.train verify --method=int8 --strategy=fsdp: exit code 1"
    assert what == "error: method int8 under fsdp" and where.startswith("where: method (command line")
    assert fix == "fix:   use method qlora, or strategy ddp or zero2"


def test_a_process_that_crashes_says_its_last_lines():
    done = own_process.run(python("import sys; sys.exit('first' + 20 * '\\nline' + '\\nlast')"))
    with pytest.raises(RuntimeError, match=r"^exit code 1\n(line\n){11}last$"):
        own_process.result(done)


def python(text: str, *args: str) -> list[str]:
    """A command that runs a text with the benchmarks at hand."""
    folder = str(ROOT / "benchmarks")
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{text}", *args]


def test_what_a_part_has_started_dies_with_it(tmp_path):
    """A part that runs out of time is killed, and cannot end anything itself."""
    sleeper = "import os, pathlib, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    file = tmp_path / "pid"
    part = subprocess.Popen(python(f"import own_process; own_process.run({python(sleeper, str(file))!r})"))
    wait_until(lambda: file.exists() and file.read_text())
    pid = int(file.read_text())
    assert is_running(pid)
    part.kill()
    part.wait()
    wait_until(lambda: not is_running(pid), seconds=10)


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_gpu_check_that_is_stopped(number, tmp_path):
    """Neither torchrun nor its worker, which is in a session of its own."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"versions": {"state": "done", "result": {}}}))
    argv = [sys.executable, gpu_check.__file__, "--toy", "--only=versions,sharded", f"--output={file}"]
    process = subprocess.Popen(argv)
    started: dict[int, list[str]] = {}

    def trains_under_torchrun() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                started[child.pid] = child.cmdline()
        torchrun = any("torch.distributed.run" in line for line in started.values())
        return torchrun and any("-u" in line and "manyrank.train" in line for line in started.values())

    try:
        wait_until(trains_under_torchrun)
        process.send_signal(number)
        assert process.wait(timeout=60) == (gpu_check.INTERRUPTED if number == signal.SIGINT else -number)
    finally:
        process.kill()
    wait_until(lambda: not any(map(is_running, started)), seconds=10)
    assert list(json.loads(file.read_text())) == ["versions"]


@pytest.mark.nightly
def test_every_part_of_the_gpu_check_runs_at_toy_size(tmp_path):
    file = tmp_path / "results.json"
    names = [part.name for part in gpu_check.PARTS]
    assert gpu_check.check(file, unhurried(*names), toy=True, again=False) == 0
    parts = json.loads(file.read_text())
    assert list(parts) == names and {part["state"] for part in parts.values()} == {"done"}
    results = {name: part["result"] for name, part in parts.items()}
    losses = results["losses"]
    assert list(losses) == [*gpu_check.METHODS, "lora in bf16"]
    for method in gpu_check.METHODS:
        assert len(losses[method]["gpu"]) == 4 and losses[method]["gpu"][0] > losses[method]["gpu"][-1] > 1
    assert losses["lora in bf16"]["from fp8"]["difference"] > 0 and results["fp8"]["losses"]["difference"] > 0
    assert len(results["without_parts"]) == 5 and len(results["fragments"]) == 2
