"""The benchmark really runs its contenders, on the same rows, and its figures are consistent. No figure is judged here."""

import json

import pytest

from manyrank.cli import main
from manyrank.tools.bench import gpu_bench
from manyrank.tools.bench import main as bench


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One short round of some contenders on the project's own sample."""
    folder = tmp_path_factory.mktemp("bench")
    names = "step fp32,dataset,trl fp32,bare padded fp32"
    argv = ["bench", "--rounds=1", "--steps=3", f"--only={names}", f"--data={folder}", f"--output={folder / 'out'}"]
    assert main(argv) == 0
    return folder / "out"


@pytest.mark.nightly
def test_contenders_train_the_same_rows_to_the_same_losses(report):
    lines = {line["name"]: line for line in json.loads((report / "bench.json").read_text())}
    assert list(lines) == ["step fp32", "dataset", "trl fp32", "bare padded fp32"]
    reference = lines["bare padded fp32"]
    assert len(reference["losses"]) == 3 and reference["losses"][0] > reference["losses"][-1] > 1
    assert lines["step fp32"]["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert lines["trl fp32"]["losses"] == pytest.approx(reference["losses"], abs=2e-3)  # logged with four digits
    assert lines["step fp32"]["tokens"] == reference["tokens"] == lines["trl fp32"]["tokens"]
    assert lines["dataset"]["tokens"] > reference["tokens"]


@pytest.mark.nightly
def test_figures_are_of_this_run(report):
    for line in json.loads((report / "bench.json").read_text()):
        assert line["start_up"] > 0.5 and line["peak"] > 2**28
        # One core cannot do more in a second than in a CPU second; the reading thread and the clock's grain apart.
        assert 0 < line["per_second"] < 1.5 * line["per_cpu_second"]
    text, picture = (report / "bench.txt").read_text(), (report / "bench.svg").read_text()
    assert len(text.splitlines()) == 5 and picture.count("<rect") == 5 and "bare padded fp32" in picture


@pytest.mark.nightly
def test_two_processes_share_the_work(tmp_path):
    entry = bench.Entry("ddp", "step fp32", ("strategy=ddp",), nproc=2)
    single = bench.Entry("single", "step fp32")
    bench.workload.build(tmp_path, data=tmp_path)
    two, one = (bench.measured(e.name, [bench.one_round(e, tmp_path, 3)]) for e in (entry, single))
    assert two.losses == pytest.approx(one.losses, abs=1e-5) and two.tokens == one.tokens


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps=2"],
        ["--rounds=0"],
        ["--only=nobody"],
        ["--gpu"],
        ["--toy"],
        ["--growth", "--only=step"],
        ["--gpu", "--toy", "--output=x"],
        ["--gpu", "--toy", "--growth"],
    ],
)
def test_wrong_options_are_the_users(argv, capsys, monkeypatch):
    from manyrank.topology import gpus as hardware

    monkeypatch.setattr(hardware, "probe", lambda: hardware.Hardware((), 2, False))
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def losses(case: gpu_bench.Case) -> list[float]:
    return gpu_bench.Bench(case, toy=True).measure().losses


def test_gpu_cases_run_at_toy_size():
    """The same script that measures a GPU: its tricks change no loss beyond bf16's rounding."""
    fast = losses(gpu_bench.CASES[0])
    plain = losses(gpu_bench.Case("Llama-3.1-8B", "lora", 2, 4096, plain=("head", "lora", "attention")))
    again = losses(gpu_bench.Case("Llama-3.1-8B", "lora", 2, 4096, "full"))
    assert fast[0] > fast[-1]
    assert fast == pytest.approx(plain, abs=0.02) and fast == pytest.approx(again, abs=1e-5)


def test_gpu_case_in_four_bits_is_in_four_bits():
    import bitsandbytes as bnb

    made = gpu_bench.Bench(gpu_bench.Case("Qwen2.5-7B", "qlora", 4, 1024), toy=True)
    layers = [module for module in made._base().modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and all(layer.weight.quant_state.quant_type == "nf4" for layer in layers)
    found = made.measure().losses
    assert found[0] > found[-1]


def test_each_gpu_case_is_a_line(capfd):
    assert gpu_bench.run(gpu_bench.CASES[5:6], toy=True) == 0
    head, line = capfd.readouterr().out.splitlines()
    assert head.split()[0] == "case" and line.startswith("Qwen2.5-7B qlora 4x1024") and "%" in line
    assert head.split()[-1] == "planned" and float(line.split()[-1]) >= 0


def test_the_peak_of_a_gpu_case_is_planned():
    case = next(case for case in gpu_bench.CASES if case.model == "Llama-3.1-8B" and case.method == "lora")
    planned = gpu_bench.Bench(case, toy=False)._planned()
    assert 55 * 2**30 < planned < 70 * 2**30  # 15 GiB of weights, 45 of activations
