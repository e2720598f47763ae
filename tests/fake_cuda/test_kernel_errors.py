"""A kernel that the stand-in GPU refuses (FAKECUDA_REFUSE) ends a run: no trial takes it for a reason to be slower."""

import pytest
from launches import launch

pytestmark = pytest.mark.cuda
# Ranks agree by a sum that is read as 0 here, so the slower loss is never taken: a swallowed error ends a run later.
ERROR = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("kernel", "strategy", "place"),
    [
        ("flash_fwd_kernel", "single", "prove_packing(engine.wrapped"),
        ("index_fill_kernel", "single", "token_loss.prove("),
        ("index_fill_kernel", "fsdp", "token_loss.prove("),
        ("index_copy_kernel", "single", "task.forward_backward("),  # of gradients, after the trials
    ],
)
def test_it_ends_the_run(kernel, strategy, place, embedded_model, tmp_path):
    args = [f"--strategy={strategy}", f"--nproc={1 if strategy == 'single' else 2}", "--max_steps=1", "--bf16=true"]
    run = launch(tmp_path / "run", *args, FAKECUDA_REFUSE=kernel)
    said = run.stdout + run.stderr
    assert run.code == 1 and ERROR in run.stderr and kernel in run.stderr, said
    assert place in run.stderr and "slower" not in said
    assert not list(run.folder.glob("final_model*")) and not list(run.folder.glob("checkpoint-*"))
