"""The benchmarks run, and the loops that they compare train the same rows to the same losses. Their speeds are not judged here."""

import importlib.util
import json
import subprocess

import gpu
import gpu_check
import pytest
import speed
from launches import ROOT


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
    page = make_gpu.page({"nf4": {"state": "done", "result": {"right": True}}, "trl": {"state": "out of time"}})
    assert "| NF4 | right: True |" in page and "documents | out of time |" in page


def test_a_part_of_the_gpu_check_that_is_done_is_not_run_again(tmp_path, capsys):
    argv = ["--toy", "--only=versions", f"--output={tmp_path / 'found.json'}"]
    assert gpu_check.main(argv) == 0
    first = json.loads((tmp_path / "found.json").read_text())
    assert first["versions"]["state"] == "done" and first["versions"]["result"]["transformers"]
    assert gpu_check.main(argv) == 0
    assert json.loads((tmp_path / "found.json").read_text()) == first
    assert capsys.readouterr().out.count("versions (at most") == 1


def test_what_is_wrong_in_a_part_of_the_gpu_check_is_seen():
    right = {"state": "done", "result": {"nf4": {"right": True}}}
    assert not gpu_check._is_wrong(right)
    assert gpu_check._is_wrong({"state": "done", "result": {"lora": {"right": True}, "full": {"right": False}}})
    assert gpu_check._is_wrong({"state": "out of time"})
    with pytest.raises(RuntimeError, match="boom"):
        gpu_check._result(subprocess.CompletedProcess([], 1, "", "boom"))


@pytest.mark.nightly
def test_every_part_of_the_gpu_check_runs_at_toy_size(tmp_path):
    assert gpu_check.main(["--toy", f"--output={tmp_path / 'found.json'}"]) == 0
