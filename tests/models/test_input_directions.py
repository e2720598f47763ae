"""EVA's start against exact principal components, and against peft's own, of the inputs of plain layers."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from small_models import SHAPE, recipe
from transformers import AutoConfig, AutoModelForCausalLM

from manyrank.errors import UserError
from manyrank.models.input_directions import input_directions
from manyrank.models.load import with_adapters

RANK, ROWS, LENGTH = 6, 4, 64


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE | {"num_hidden_layers": 2}))
    with torch.no_grad():  # embeddings of a trained model are no even cloud
        model.get_input_embeddings().weight.mul_(torch.linspace(2, 0.1, SHAPE["hidden_size"]) ** 3)
    return model.eval()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def learned(length: int) -> torch.Tensor:
    """The second half of a row."""
    return torch.arange(length // 2, length)


def plain_inputs(base, rows) -> dict[str, torch.Tensor]:
    """The inputs (tokens, in) of each linear layer for the learned tokens, by hooks on the base as it is."""
    kept = {}

    def keep(name, given):
        kept.setdefault(name, []).append(given[0][0, learned(LENGTH)])

    layers = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
    hooks = [m.register_forward_pre_hook(lambda _, given, n=n: keep(n, given)) for n, m in layers.items()]
    with torch.no_grad():
        for row in rows:
            base(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in kept.items()}


def explained(x: torch.Tensor, components: torch.Tensor) -> float:
    """The share of the variance of x along orthonormal components."""
    centred = x - x.mean(0)
    return float((centred @ components.double().T).square().sum() / centred.square().sum())


def directions(base, rows, *options: str) -> dict[str, torch.Tensor]:
    config = recipe("--method=lora", f"--lora_r={RANK}", "--packing=none", *options)
    model = with_adapters(AutoModelForCausalLM.from_config(base.config), config)
    model.load_state_dict({f"base_model.model.{n}": v for n, v in base.state_dict().items()}, strict=False)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            model.get_submodule(f"base_model.model.{name}.base_layer").load_state_dict(module.state_dict())
    batches = [learned(LENGTH)] * ROWS
    with torch.no_grad():
        return input_directions(model.eval(), batches, lambda at: model(input_ids=rows[at][None]), seed=3)


def test_components_are_the_principal_ones_as_good_as_those_of_peft(base, rows):
    inputs, ours = plain_inputs(base, rows), directions(base, rows)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_config(base.config),
        LoraConfig(r=RANK, init_lora_weights="eva", eva_config=EvaConfig(rho=1), target_modules="all-linear"),
    )
    theirs.load_state_dict(state_with(theirs, base))
    labels = torch.where(torch.arange(LENGTH) >= LENGTH // 2, rows, -100)
    data = [{"input_ids": rows, "labels": labels, "attention_mask": torch.ones_like(rows)}]
    peft = get_eva_state_dict(theirs, data, show_progress_bar=False)
    assert ours.keys() == inputs.keys()
    for name, components in ours.items():
        x = inputs[name]
        exact = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:RANK]
        assert torch.allclose(components @ components.T, torch.eye(RANK), atol=1e-5)
        assert explained(x, components) >= 0.998 * explained(x, exact)
        assert explained(x, components) >= 0.998 * explained(x, peft[f"base_model.model.{name}"])
        assert (components[0].double() @ exact[0]).abs() > 0.999  # the largest one


def state_with(model, base) -> dict[str, torch.Tensor]:
    """The state of a peft model with the weights of a base."""
    state, plain = model.state_dict(), base.state_dict()
    own = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in state}
    return {name: plain.get(own[name], value) for name, value in state.items()}


def test_ranks_of_their_own_and_too_few_tokens(base, rows):
    some = directions(base, rows, "--rank_pattern={q_proj: 3, down_proj: 9}")
    assert {len(value) for name, value in some.items() if "q_proj" in name} == {3}
    assert {len(value) for name, value in some.items() if "down_proj" in name} == {9}
    with pytest.raises(UserError, match="has seen 128 learned tokens"):
        directions(base, rows, "--rank_pattern={q_proj: 128}")
