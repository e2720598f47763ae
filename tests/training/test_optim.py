"""What the optimizer is given of a recipe; that it does the same on every strategy is shown by `verify`'s recipe."""

import pytest
import torch
from small_models import recipe

from manyrank.training.optim import build_optimizer


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_matrices_are_decayed_and_biases_and_norms_are_not():
    linear, norm = parts = model()
    found = decays(build_optimizer(parts, recipe("--weight_decay=0.3")))
    assert found == {id(linear.weight): 0.3, **{id(p): 0.0 for p in (linear.bias, norm.weight, norm.bias)}}


def test_a_sharded_matrix_is_decayed_by_its_whole_shape():
    linear, _ = parts = model()
    linear.weight.ds_shape, linear.weight.data = linear.weight.shape, torch.empty(0)  # as ZeRO-3 leaves it
    assert decays(build_optimizer(parts, recipe("--weight_decay=0.3")))[id(linear.weight)] == 0.3


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_adam_takes_its_figures_from_the_recipe(optim):
    given = recipe(f"--optim={optim}", "--lr=0.02", "--adam_beta1=0.8", "--adam_beta2=0.7", "--adam_epsilon=1e-5")
    for group in build_optimizer(model(), given).param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.8, 0.7), 1e-5)
