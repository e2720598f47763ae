"""Packed attention, the loss contract and the layout: packing changes the speed and never the result."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import Linear
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from manyrank.config.resolve import Setting, resolve
from manyrank.data.dataset import prepare
from manyrank.data.loader import MicroBatch, Prefetcher, StepLoader
from manyrank.models.attention import PACKED, PACKED_PLAIN, use_packed_attention
from manyrank.models.load import with_adapters
from manyrank.training.loss import TokenLoss


def config(**values):
    given = {"model_name_or_path": "embedded", "data_path": "data/sample.jsonl", "max_length": 128} | values
    return resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config


@pytest.fixture(scope="module")
def examples(tokenizer):
    return prepare(config().data_path, tokenizer, config())


def loader(examples, **changes):
    values = dict(
        examples=examples,
        batch_size=8,
        micro_batch_size=2,
        max_length=128,
        packing="step",
        pad_token=0,
        rank=0,
        ranks=1,
        seed=1,
    )
    return StepLoader(**(values | changes))


SMALL = dict(
    vocab_size=1600,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


NAMES = ["qwen3", "llama, grouped heads", "mistral, sliding window", "gemma2, soft caps"]


def models(embedded_model):
    torch.manual_seed(0)
    return {
        "qwen3": AutoModelForCausalLM.from_pretrained(embedded_model),
        "llama, grouped heads": LlamaForCausalLM(LlamaConfig(**SMALL)),
        "mistral, sliding window": MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
        "gemma2, soft caps": Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, sliding_window=8)),
    }


def loss_and_gradients(model, micro_batches):
    model.zero_grad()
    losses = [TokenLoss(model)(m.inputs, m.positions, m.targets) for m in micro_batches]
    sum(losses).backward()
    return torch.stack(losses).sum().item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded_equals_one_by_one(name, examples, embedded_model):
    model = models(embedded_model)[name]
    packed_model = copy.deepcopy(model)
    use_packed_attention(packed_model)
    padded, grads = loss_and_gradients(model, loader(examples, packing="none").step(0).micro_batches)
    packed, packed_grads = loss_and_gradients(packed_model, loader(examples).step(0).micro_batches)
    single, single_grads = loss_and_gradients(
        model, loader(examples, packing="none", micro_batch_size=1).step(0).micro_batches
    )
    assert packed == pytest.approx(padded, rel=1e-6) and single == pytest.approx(padded, rel=1e-6)
    for key, gradient in grads.items():
        scale = gradient.abs().max().item() + 1e-6
        assert torch.allclose(packed_grads[key] / scale, gradient / scale, atol=2e-5), key
        assert torch.allclose(single_grads[key] / scale, gradient / scale, atol=2e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_pack_do_not_see_each_other(name, examples, embedded_model):
    """The loss of every document, and the gradients of all, are those of the documents by themselves."""
    model = models(embedded_model)[name]
    use_packed_attention(model)
    one = loader(examples, packing="dataset", max_length=512, batch_size=1)
    (pack,) = one.step(0).micro_batches
    bounds = pack.inputs["cu_seq_lens_q"].tolist()
    assert len(bounds) > 4 and pack.inputs["position_ids"][0, bounds[1]] == 0
    _, together = loss_and_gradients(model, [pack])
    alone = []
    for start, end in pairwise(bounds):
        chosen = (pack.positions >= start) & (pack.positions < end)
        targets, positions = pack.targets[chosen], pack.positions[chosen]
        in_pack = TokenLoss(model)(pack.inputs, positions, targets).item()
        ids = pack.inputs["input_ids"][:, start:end]
        document = MicroBatch(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, positions - start, targets, []
        )
        alone.append(document)
        assert in_pack == pytest.approx(
            TokenLoss(model_unpacked(model))(document.inputs, positions - start, targets).item(), rel=1e-5
        )
    _, summed = loss_and_gradients(model_unpacked(model), alone)
    for key, gradient in summed.items():
        scale = gradient.abs().max().item() + 1e-6
        assert torch.allclose(together[key] / scale, gradient / scale, atol=1e-5), key


def model_unpacked(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def test_loss_is_plain_cross_entropy_in_float64(examples, embedded_model):
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float64)
    step = loader(examples, packing="none", micro_batch_size=8).step(0)
    (micro,) = step.micro_batches
    rows = [examples[int(i)] for i in np.random.default_rng([1, 0]).permutation(len(examples))[:8]]
    wanted = 0.0
    for row in rows:
        ids, labels = torch.as_tensor(row["input_ids"])[None].long(), torch.as_tensor(row["labels"]).long()
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        wanted -= sum(logp[i - 1, labels[i]].item() for i in range(1, len(labels)) if labels[i] != -100)
    assert step.supervised == sum(int((np.asarray(r["labels"]) != -100).sum()) for r in rows) == len(micro.targets)
    assert TokenLoss(model)(micro.inputs, micro.positions, micro.targets).item() == pytest.approx(wanted, rel=1e-6)


def test_nothing_to_learn_keeps_the_graph(examples, embedded_model):
    model = AutoModelForCausalLM.from_pretrained(embedded_model)
    micro = loader(examples, packing="none").step(0).micro_batches[0]
    loss = TokenLoss(model)(micro.inputs, micro.positions[:0], micro.targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("packing", ["step", "none", "dataset"])
@pytest.mark.parametrize(("batch", "ranks"), [(8, 1), (8, 2), (8, 4), (7, 3), (64, 2)])
def test_an_epoch_sees_every_row_once_on_any_number_of_ranks(examples, packing, batch, ranks):
    loaders = [loader(examples, packing=packing, batch_size=batch, ranks=ranks, rank=rank) for rank in range(ranks)]
    seen, tokens = [], 0
    for number in range(loaders[0].steps_per_epoch):
        steps = [one.step(number) for one in loaders]
        assert len({len(step.micro_batches) for step in steps}) == 1  # nobody waits in vain
        assert len({(step.supervised, step.tokens) for step in steps}) == 1
        assert sum(len(m.targets) for step in steps for m in step.micro_batches) == steps[0].supervised
        seen += [row for step in steps for m in step.micro_batches if len(m.targets) for row in m.rows]
        tokens += steps[0].tokens
    assert sorted(row for _, row in seen) == list(range(1, 161))
    assert tokens == examples.lengths.sum()


def test_epochs_differ_and_seeds_repeat(examples):
    one = loader(examples)
    rows = [[row for m in one.step(number).micro_batches for row in m.rows] for number in (0, one.steps_per_epoch)]
    assert sorted(rows[0]) != sorted(rows[1])
    assert rows[0] == [row for m in loader(examples).step(0).micro_batches for row in m.rows]


def test_steps_that_are_read_ahead_are_those_of_the_loader(examples):
    one = loader(examples)
    last = one.steps_per_epoch + 1
    ahead = Prefetcher(one)
    for number in [3, 4, 5, 2, *range(6, last + 1)]:  # a resumed run begins anywhere
        step = ahead.step(number, last=last)
        assert [m.rows for m in step.micro_batches] == [m.rows for m in one.step(number).micro_batches]
    assert ahead.coming is None


@pytest.mark.parametrize("name", NAMES[:3])
def test_plain_products_give_the_attention_of_sdpa(name, examples, embedded_model):
    """In bf16 on a CPU short documents are computed by products of matrices; with sdpa alone, within bf16's rounding."""
    model = models(embedded_model)[name].to(torch.bfloat16)
    micro_batches = loader(examples).step(0).micro_batches
    results = {}
    for plain in (False, True):
        other = copy.deepcopy(model)
        use_packed_attention(other, plain=plain)
        results[plain] = loss_and_gradients(other, micro_batches)
    exact_model = copy.deepcopy(model).float()
    use_packed_attention(exact_model)
    exact, exact_grads = loss_and_gradients(exact_model, micro_batches)
    assert results[False] != results[True]  # two ways, indeed
    for loss, _ in results.values():
        assert loss == pytest.approx(exact, rel=1e-2)
    apart = {
        plain: sum((grads[key].float() - exact_grads[key]).norm() ** 2 for key in grads) ** 0.5
        for plain, (_, grads) in results.items()
    }
    assert apart[False] < 1.5 * apart[True]


def test_layers_are_checkpointed_and_compiled_as_asked(embedded_model):
    made = with_adapters(
        AutoModelForCausalLM.from_pretrained(embedded_model), config(gradient_checkpointing=3, torch_compile=True)
    )
    layers = made.get_base_model().model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, True, False]
    assert all(layer._compiled_call_impl is not None for layer in layers)


def test_disabled_fused_parts_are_plain(embedded_model):
    def parts_of_attention(*parts):
        made = with_adapters(AutoModelForCausalLM.from_pretrained(embedded_model), config(disable_fused=list(parts)))
        layer = made.get_base_model().model.layers[0].self_attn
        return layer.config._attn_implementation, type(layer.q_proj) is not Linear, hasattr(layer, "plain_forward")

    assert parts_of_attention() == parts_of_attention("head") == (PACKED, True, True)
    assert parts_of_attention("lora") == (PACKED, False, True)
    assert parts_of_attention("attention") == (PACKED_PLAIN, True, True)
    assert parts_of_attention("rope") == (PACKED, True, False)
