"""What the optimizer is given of a recipe; that it does the same on every strategy is shown by `verify`'s recipe."""

import inspect

import pytest
import torch
from small_models import recipe
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from manyrank.errors import UserError
from manyrank.rules.recipe import SCHEDULES
from manyrank.training.optim import advance, build_optimizer, build_schedule


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


# Schedules


def rates(total: int, *args: str) -> list[float]:
    """The learning rate of each step."""
    schedule, found = build_schedule(recipe("--lr=1.0", *args), total), []
    for _ in range(total):
        found += schedule.get_last_lr()
        advance(schedule)
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rules_know_the_arguments_of_each_schedule(name):
    own = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters)
    own -= {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    own -= {"warmup_lr_rate"} if name == "cosine_with_min_lr" else set()
    assert set(SCHEDULES[name][0]) == own and set(SCHEDULES[name][1]) <= own


def test_a_cosine_that_ends_above_zero():
    given = ("--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs={min_lr_rate: 0.25}", "--warmup_steps=4")
    found = rates(104, *given)
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1.0] and min(found[4:]) == pytest.approx(0.25, abs=1e-3)
    assert found[54] == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize("decay", [20, 0.2])
def test_warmup_stable_decay(decay):
    given = ("--lr_scheduler_type=warmup_stable_decay", f"--lr_scheduler_kwargs={{num_decay_steps: {decay}}}")
    found = rates(100, *given, "--warmup_ratio=0.1")
    assert found[:10] == pytest.approx([step / 10 for step in range(10)])
    assert set(found[10:81]) == {1.0} and found[81] < 1 and found[-1] < 0.01


@pytest.mark.parametrize("total, warmup", [(100, 3), (101, 4), (10, 1)])
def test_a_warmup_that_is_a_share_of_the_run(total, warmup):
    found = rates(total, "--warmup_ratio=0.03", "--lr_scheduler_type=constant_with_warmup")
    assert found.index(1.0) == warmup and found[:warmup] == [step / warmup for step in range(warmup)]


def test_values_that_a_schedule_does_not_take():
    with pytest.raises(UserError, match="takes no such arguments"):
        rates(5, "--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs={min_lr: 0.1, min_lr_rate: 0.1}")
