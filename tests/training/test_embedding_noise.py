"""NEFTune: how large its noise is, and that it belongs to a document, not to the place where it lies."""

import pytest
import torch
from launches import Run, launch, nightly

from manyrank.models.embedding_noise import EmbeddingNoise


def test_noise_of_each_document():
    embedding, width = torch.nn.Embedding(9, 64), 64
    noise, ids = EmbeddingNoise(embedding, alpha=5.0), torch.zeros(1, 50, dtype=torch.long)
    plain = embedding(ids)
    with noise.on([(0, 10, 1), (10, 40, 2)]):
        first, second = (embedding(ids) - plain)[0].split([10, 40])
    for added, length in ((first, 10), (second, 40)):
        most = 5 / (length * width) ** 0.5
        assert 0.98 * most < added.abs().max() <= most * (1 + 1e-5) and added.mean().abs() < 0.1 * most
    with noise.on([(2, 40, 2), (45, 5, 3)]):
        moved = (embedding(ids) - plain)[0]
    assert torch.allclose(moved[2:42], second, atol=1e-6)
    assert not moved[:2].any() and not moved[42:45].any(), "padding has none"
    assert torch.equal(embedding(ids), plain)
    noise.release()
    assert not embedding._forward_hooks


ARGS = ("--neftune_noise_alpha=50", "--max_steps=4")


@pytest.fixture(scope="module")
def noisy(embedded_model, tmp_path_factory) -> Run:
    more = ("--save_steps=2", "--eval_split=8", "--eval_on_start")
    run = launch(tmp_path_factory.mktemp("noisy") / "run", *ARGS, *more, "--strategy=single")
    assert run.code == 0, run.stderr
    return run


def test_the_validation_and_plain_runs_have_no_noise(noisy, tmp_path):
    plain = launch(tmp_path / "plain", "--max_steps=4", "--eval_split=8", "--eval_on_start", "--strategy=single")
    assert noisy.metrics()[0] != pytest.approx(plain.metrics()[0], abs=1e-3)
    assert noisy.metrics("eval_loss")[0] == plain.metrics("eval_loss")[0]


@pytest.mark.parametrize(
    "args",
    [
        ("fsdp",),
        ("zero3",),
        ("single", "--packing=none"),
        ("single", "--disable_fused=lm_head", "--gradient_checkpointing=full"),
        *nightly("ddp", "zero2"),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_strategy_and_layout(args, noisy, tmp_path):
    strategy, *more = [args] if isinstance(args, str) else args
    nproc = 1 if strategy == "single" else 2
    run = launch(tmp_path / "run", *ARGS, "--eval_split=8", f"--strategy={strategy}", f"--nproc={nproc}", *more)
    assert run.code == 0, run.stderr
    assert run.metrics() == pytest.approx(noisy.metrics(), abs=1e-5)


def test_a_resume_is_exact(noisy, tmp_path):
    resume = ("--eval_split=8", "--strategy=single", f"--resume_from_checkpoint={noisy.folder / 'checkpoint-2'}")
    run = launch(tmp_path / "run", *ARGS, *resume)
    assert run.code == 0, run.stderr
    assert run.metrics() == noisy.metrics()[2:]
    other = launch(tmp_path / "other", "--max_steps=4", *resume)
    assert other.code == 2 and "neftune_noise_alpha: 50.0 -> None" in other.stderr
