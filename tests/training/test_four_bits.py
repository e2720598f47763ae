"""A base of 4 bits with other numbers and constants: another base, and the same one on every strategy."""

import pytest
from launches import Run, launch, nightly

QLORA = ("--method=qlora", "--max_steps=3", "--sample_questions=[]", "--quantized_cache=off")
FP4 = ("--bnb_4bit_quant_type=fp4", "--use_nested_quant=false")


@pytest.fixture(scope="module")
def fp4(embedded_model, tmp_path_factory) -> Run:
    run = launch(tmp_path_factory.mktemp("fp4") / "run", *QLORA, *FP4, "--strategy=single", "--save_steps=2")
    assert run.code == 0, run.stderr
    return run


def test_each_key_makes_another_base(fp4, tmp_path):
    losses = [fp4.metrics()]
    for number, args in enumerate(((), FP4[:1], FP4[1:])):
        run = launch(tmp_path / str(number), *QLORA, *args, "--strategy=single")
        assert run.code == 0, run.stderr
        losses.append(run.metrics())
    assert len({tuple(each) for each in losses}) == 4
    assert all(each == pytest.approx(losses[0], abs=0.1) for each in losses)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3", *nightly("ddp", "zero2")])
def test_the_losses_are_those_of_one_process(strategy, fp4, tmp_path):
    run = launch(tmp_path / "run", *QLORA, *FP4, f"--strategy={strategy}", "--nproc=2")
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(fp4.metrics(), abs=1e-5)


def test_a_resume_does_not_change_the_base_unasked(fp4, tmp_path):
    resume = (*QLORA, "--strategy=single", f"--resume_from_checkpoint={fp4.folder / 'checkpoint-2'}")
    other = launch(tmp_path / "other", *resume, "--bnb_4bit_quant_type=nf4")
    assert other.code == 2 and "bnb_4bit_quant_type: fp4 -> None" in other.stderr, other.stderr
    assert "bnb_4bit_use_double_quant: False -> None" in other.stderr
    same = launch(tmp_path / "same", *resume, *FP4)
    assert same.metrics() == fp4.metrics()[2:]
