"""What the optimizer is given of a recipe; that it does the same on every strategy is shown by `verify`'s recipe."""

import inspect

import pytest
import torch
from small_models import recipe
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, Adafactor

from manyrank.errors import UserError
from manyrank.rules.arguments import OPTIMIZERS, SCHEDULES
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


# Optimizers


def trained(steps: int, *args: str, matrix: torch.Tensor) -> torch.Tensor:
    """The matrix after steps along its own values as gradients."""
    layer = torch.nn.Linear(*matrix.shape[::-1], bias=False)
    layer.weight.data = matrix.clone()
    optimizer = build_optimizer(layer, recipe("--lr=0.01", *args))
    for _ in range(steps):
        layer.weight.grad = layer.weight.detach().clone()
        optimizer.step()
    return layer.weight.detach()


def test_lion_is_that_of_bitsandbytes():
    """Elements of 0 have no sign; those of tensors below min_8bit_size have moments in float32 there."""
    matrix, args = torch.randn(6, 4), ("--weight_decay=0.3", "--adam_beta1=0.8", "--adam_beta2=0.95")
    found = [trained(5, f"--optim={name}", *args, matrix=matrix) for name in ("lion_32bit", "paged_lion_32bit")]
    assert torch.allclose(*found, atol=1e-7)
    assert torch.allclose(trained(1, "--optim=lion", matrix=matrix), matrix - 0.01 * matrix.sign())


def test_muon_changes_a_matrix_by_as_much_as_adamw_in_every_direction():
    matrix = torch.randn(64, 16)
    change = trained(1, "--optim=muon", matrix=matrix) - matrix
    assert change.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)
    values = torch.linalg.svdvals(change)
    assert values.max() / values.min() < 2 < torch.linalg.cond(matrix)


def test_muon_leaves_embeddings_lm_head_and_vectors_to_adamw():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    muon, adam = build_optimizer(model, recipe("--optim=muon", "--method=full")).parts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = [{names[id(p)] for group in part.param_groups for p in group["params"]} for part in (muon, adam)]
    assert of[0] | of[1] == set(names.values()) and all("proj" in name for name in of[0]) and len(of[0]) == 7


def test_adafactor_keeps_a_row_and_a_column_and_the_rate_of_the_recipe():
    matrix = torch.randn(6, 4)
    layer = torch.nn.Linear(4, 6, bias=False)
    optimizer = build_optimizer(layer, recipe("--optim=adafactor", "--lr=0.01"))
    layer.weight.data, layer.weight.grad = matrix.clone(), torch.ones(6, 4)
    optimizer.step()
    (state,) = optimizer.state.values()
    assert (state["exp_avg_sq_row"].shape, state["exp_avg_sq_col"].shape) == ((6,), (4,))
    assert torch.allclose(layer.weight, matrix - 0.01, atol=1e-6)  # neither the step nor the weights scale it


@pytest.mark.parametrize("text", ["momentum=0.9,nesterov=true", "{momentum: 0.9, nesterov: true}"])
def test_optim_args_reach_the_optimizer(text):
    (group, *_) = build_optimizer(model(), recipe("--optim=sgd", f"--optim_args={text}")).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_values_that_an_optimizer_does_not_take():
    with pytest.raises(UserError, match="optim sgd takes no such arguments: Invalid momentum value: -1"):
        build_optimizer(model(), recipe("--optim=sgd", "--optim_args=momentum=-1"))
    with pytest.raises(UserError, match="optim muon takes no such arguments"):
        build_optimizer(model(), recipe("--optim=muon", "--optim_args=adjust_lr_fn=mine"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rules_know_the_arguments_of_each_optimizer(name):
    kinds = {"sgd": torch.optim.SGD, "adafactor": Adafactor, "muon": torch.optim.Muon}
    if name in kinds:
        assert set(OPTIMIZERS[name]) <= set(inspect.signature(kinds[name]).parameters)
    else:
        assert (
            build_optimizer(model(), recipe(f"--optim={name}", "--optim_args=min_8bit_size=9")).args.min_8bit_size == 9
        )
