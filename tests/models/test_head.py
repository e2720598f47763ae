"""Head and loss in one against plain cross-entropy in float64: values, gradients, and the models that are left alone."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from manyrank.models import fused_head
from manyrank.models.fused_head import HeadLoss, fuse
from manyrank.training.loss import TokenLoss

SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=0,
)


@pytest.fixture(params=["confident", "unsure"])
def case(request):
    """hidden, weight, bias, targets in float64; half of the confident tokens have a loss near 0."""
    random = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((70, 32), (300, 32)))
    bias, targets = (
        torch.randn(300, generator=random, dtype=torch.float64),
        torch.randint(0, 300, (70,), generator=random),
    )
    if request.param == "confident":
        hidden[:35] = weight[targets[:35]] * 0.7
    return hidden, weight, bias, targets


def gradients(function, tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*tensors)
    (loss * (1 / 1027)).backward()  # a scale that 16 bits cannot hold
    return loss.detach(), [tensor.grad for tensor in tensors]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("cross_entropy", [fused_head.in_blocks, fused_head.by_shares])
@pytest.mark.parametrize("chunk", [300 * 8 * 7, 2**20], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_value_and_gradients_are_those_of_cross_entropy(case, dtype, close, chunk, cross_entropy, monkeypatch):
    monkeypatch.setitem(fused_head.CHUNK, "cpu", chunk)
    monkeypatch.setattr(fused_head, "BLOCK", 300 * 8 * 3 // torch.get_num_threads())  # a few tokens
    monkeypatch.setitem(fused_head.CROSS_ENTROPY, "cpu", cross_entropy)
    *tensors, targets = case
    tensors = [tensor.to(dtype) for tensor in tensors]
    wanted, wanted_grads = gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, reduction="sum"), [tensor.double() for tensor in tensors]
    )
    loss, grads = gradients(lambda h, w, b: HeadLoss.apply(h, w, b, targets), tensors)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert apart(loss, wanted) < close and [grad.dtype for grad in grads] == [dtype] * 3
    assert max(apart(found, want) for found, want in zip(grads, wanted_grads)) < close
    assert HeadLoss.apply(*tensors, targets).item() == loss.item()  # without gradients


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("cross_entropy", [fused_head.in_blocks, fused_head.by_shares])
def test_smoothed_targets(case, dtype, close, cross_entropy, monkeypatch):
    monkeypatch.setattr(fused_head, "BLOCK", 300 * 8 * 3 // torch.get_num_threads())
    monkeypatch.setitem(fused_head.CROSS_ENTROPY, "cpu", cross_entropy)
    *tensors, targets = case
    tensors = [tensor.to(dtype) for tensor in tensors]
    options = {"reduction": "sum", "label_smoothing": 0.2}
    exact = [tensor.double() for tensor in tensors]
    wanted, wanted_grads = gradients(lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, **options), exact)
    loss, grads = gradients(lambda h, w, b: HeadLoss.apply(h, w, b, targets, 0.2), tensors)
    assert apart(loss, wanted) < close
    assert max(apart(found, want) for found, want in zip(grads, wanted_grads)) < close
    _, plain = gradients(lambda h, w, b: HeadLoss.apply(h, w, b, targets), tensors)
    assert apart(plain[0], wanted_grads[0]) > 0.02


def dynamic(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dynamic Fine-Tuning as the paper writes it: the sum of -sg(p) log p."""
    log = torch.log_softmax(logits, -1).gather(1, targets[:, None])
    return -(log.detach().exp() * log).sum()


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 5e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("cross_entropy", [fused_head.in_blocks, fused_head.by_shares])
def test_losses_scaled_by_probabilities(case, dtype, close, cross_entropy, monkeypatch):
    monkeypatch.setitem(fused_head.CHUNK, "cpu", 300 * 8 * 7)
    monkeypatch.setattr(fused_head, "BLOCK", 300 * 8 * 3 // torch.get_num_threads())
    monkeypatch.setitem(fused_head.CROSS_ENTROPY, "cpu", cross_entropy)
    *tensors, targets = case
    tensors = [tensor.to(dtype) for tensor in tensors]
    exact = [tensor.double() for tensor in tensors]
    wanted, wanted_grads = gradients(lambda h, w, b: dynamic(h @ w.T + b, targets), exact)
    loss, grads = gradients(lambda h, w, b: HeadLoss.apply(h, w, b, targets, 0.0, True), tensors)
    assert apart(loss, wanted) < close
    assert max(apart(found, want) for found, want in zip(grads, wanted_grads)) < close
    _, plain = gradients(lambda h, w, b: HeadLoss.apply(h, w, b, targets), tensors)
    assert apart(plain[0], wanted_grads[0]) > 0.5


@pytest.mark.parametrize("cross_entropy", [fused_head.in_blocks, fused_head.by_shares])
def test_small_losses_in_16_bits_are_not_rounded_away(cross_entropy, monkeypatch):
    """Of tokens that are all but known, loss and gradient come out as well as of others."""
    monkeypatch.setitem(fused_head.CROSS_ENTROPY, "cpu", cross_entropy)
    weight = torch.eye(64).bfloat16()
    hidden, targets = torch.eye(64)[:20].bfloat16() * 12, torch.arange(20)
    exact, (wanted, _) = gradients(
        lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"), [hidden.double(), weight.double()]
    )
    assert exact.item() / 20 < 1e-3  # a share of 0.9996, which is 1.0 in bf16
    loss, (found, _) = gradients(lambda h, w: HeadLoss.apply(h, w, None, targets), [hidden, weight])
    assert apart(loss, exact) < 0.01 and apart(found, wanted) < 0.01


def test_a_frozen_head_gets_no_gradient_and_the_loss_of_nothing_keeps_the_graph():
    weight, hidden = torch.randn(300, 32), torch.randn(0, 32, requires_grad=True)
    loss = HeadLoss.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 32) and weight.grad is None


def micro_batch():
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([3, 4, 5, 19, 25, 38])
    return {"input_ids": ids}, positions, ids.flatten().roll(-1)[positions]


def loss_and_gradients(model, *, fused):
    model.zero_grad()
    token_loss = TokenLoss(model, fused=fused)
    token_loss.prove(*micro_batch())
    model.zero_grad()
    loss = token_loss(*micro_batch())
    loss.backward()
    return token_loss, loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [True, False])
def test_targets_are_smoothed_in_training_alone(fused):
    torch.manual_seed(0)
    model, (inputs, positions, targets) = LlamaForCausalLM(LlamaConfig(**SMALL)), micro_batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    wanted = [F.cross_entropy(logits, targets, reduction="sum", label_smoothing=part).item() for part in (0.1, 0.0)]
    token_loss = TokenLoss(model, fused=fused, smoothing=0.1)
    found = []
    for training in (True, False):
        model.train(training)
        found.append(token_loss(inputs, positions, targets).item())
    assert found == pytest.approx(wanted, rel=1e-5) and wanted[0] != pytest.approx(wanted[1], rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_probabilities_scale_losses_in_training_alone(fused):
    torch.manual_seed(0)
    model, (inputs, positions, targets) = LlamaForCausalLM(LlamaConfig(**SMALL)), micro_batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    wanted, found = [dynamic(logits, targets).item(), F.cross_entropy(logits, targets, reduction="sum").item()], []
    token_loss = TokenLoss(model, fused=fused, dynamic=True)
    for training in (True, False):
        model.train(training)
        found.append(token_loss(inputs, positions, targets).item())
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_head_is_trained(tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    _, plain, wanted = loss_and_gradients(model, fused=False)
    token_loss, loss, found = loss_and_gradients(model, fused=True)
    assert token_loss.head is not None
    assert loss == pytest.approx(plain, rel=1e-6) and set(found) == set(wanted)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert model(**micro_batch()[0]).logits.shape == (2, 20, 300)  # the head is itself again


class Halved(LlamaForCausalLM):
    """A model of somebody that does more to its logits than its config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


class Cut(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., :300]
        return out


class Functional(LlamaForCausalLM):
    """Its head is not called."""

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=F.linear(hidden, self.lm_head.weight))


class Hidden(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), "final_logit_softcapping 30.0"),
        (
            lambda: CohereForCausalLM(CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
            "logit_scale 0.0625",
        ),
        (lambda: Halved(LlamaConfig(**SMALL)), "the model changes them"),
        (
            lambda: Cut(LlamaConfig(**{**SMALL, "vocab_size": 301})),
            "the model takes no loss in their place (IndexError",
        ),
        (lambda: Functional(LlamaConfig(**SMALL)), "the model changes them"),
        (lambda: Hidden(LlamaConfig(**SMALL)), "no head is known"),
    ],
)
def test_logits_that_are_no_plain_product_are_computed_whole(model, reason, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    torch.manual_seed(0)
    model = model()
    _, plain, wanted = loss_and_gradients(model, fused=False)
    token_loss, loss, found = loss_and_gradients(model, fused=True)
    assert token_loss.head is None and reason in caplog.text
    assert loss == plain and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Broken(LlamaForCausalLM):
    """Its kernels fail: in a layer, in the head, or in what comes after it."""

    place = ""

    def forward(self, input_ids, **inputs):
        if self.place == "layer":
            raise RuntimeError("varlen_attn() got an unexpected keyword argument")
        out = super().forward(input_ids, **inputs)
        if self.place == "after":
            raise RuntimeError("an illegal memory access was encountered")
        return out


@pytest.mark.parametrize("place", ["layer", "head", "after"])
def test_a_kernel_that_fails_is_told_as_what_it_is(place, monkeypatch):
    """It is no reason to compute whole logits, which would hide it or fail again later."""
    model = Broken(LlamaConfig(**SMALL))
    model.place = place
    told = {"layer": "unexpected keyword", "head": "no kernel image", "after": "illegal memory access"}[place]
    if place == "head":
        monkeypatch.setattr(fused_head, "_loss_and_gradients", lambda *args: (_ for _ in ()).throw(RuntimeError(told)))
    token_loss = TokenLoss(model)
    with pytest.raises(RuntimeError, match=told):
        token_loss.prove(*micro_batch())
    assert token_loss.head is not None


def test_a_loss_that_is_not_a_number_is_no_reason():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    token_loss, loss, _ = loss_and_gradients(model, fused=True)
    assert token_loss.head is not None and loss != loss


def test_without_gradients_none_are_computed(monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    seen = []
    inner = fused_head._loss_and_gradients
    monkeypatch.setattr(fused_head, "_loss_and_gradients", lambda *args: seen.append(args[-2]) or inner(*args))
    token_loss = TokenLoss(model)
    with torch.no_grad():
        token_loss(*micro_batch())
    token_loss(*micro_batch())
    assert [list(wanted) for wanted in seen] == [[False] * 4, [True, True, False, False]]


def test_rows_of_a_frozen_head_that_are_trained():
    torch.manual_seed(0)
    hidden, weight, rows = (
        torch.randn(9, 8, requires_grad=True),
        torch.randn(20, 8),
        torch.randn(2, 8, requires_grad=True),
    )
    ids, targets = torch.tensor([19, 3]), torch.tensor([3, 19, 0, 5, 3, 7, 19, 1, 2])
    inputs = (hidden, rows)
    fused = HeadLoss.apply(hidden, weight, None, targets, 0.0, False, rows, ids)
    plain = F.cross_entropy(hidden @ weight.index_copy(0, ids, rows).T, targets, reduction="sum")
    assert fused.item() == pytest.approx(plain.item(), abs=1e-5)
    for ours, theirs in zip(torch.autograd.grad(3 * fused, inputs), torch.autograd.grad(3 * plain, inputs)):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_quantised_head_is_left_alone(caplog):
    import bitsandbytes as bnb

    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    model.lm_head = bnb.nn.Linear4bit(32, 300, bias=False)
    assert fuse(model) is None
