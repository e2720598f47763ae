"""Bytes that autograd keeps of a micro-batch, operation by operation as transformers' eager modules save them.

For each token of a decoder layer, in the type of computation unless it says float32:

    norm            its input in float32 (and the normalised one, where norms are trained)
    q k v           the norm's output, once for all matrices that are trained or adapted
    attention       q and k after the rotary embedding, v, the output; float32 log-sum-exp of each head
    gate up down    the norm's output, gate, act(gate), up, their product
    adapters        the thin product of each
    experts         rows for each of a token's experts, and the merged weights of adapted ones

A checkpointed layer keeps its input alone. `tests/test_activations.py` counts what autograd really saves.
"""

from __future__ import annotations

from ..models.spec import Layer
from .planned_run import Setup

FLOAT, INDEX = 4, 8  # bytes
GATES = ("gate_proj", "up_proj", "gate_up_proj")


def saved(setup: Setup) -> int:
    """Bytes between forward and backward of a micro-batch, head and loss not counted."""
    tokens, kept, computed_again = setup.tokens, 0, setup.checkpointed
    sizes = {id(layer): of_layer(setup, layer) for layer in setup.shape.layers}
    for index, layer in enumerate(setup.shape.each()):
        if index < computed_again:
            kept += tokens * (stream(setup) + _out_of_reach(setup, layer))
        else:
            # The first layer's input needs no gradient where the embedding is frozen, so its norm keeps nothing.
            first = 0 if index or setup.full else tokens * FLOAT * setup.shape.hidden
            kept += sizes[id(layer)] - first
    outside = tokens * (_norm(setup, setup.shape.hidden) + (INDEX if setup.full else 0)) + _rotary(setup)
    return kept + outside + _cast_weights(setup, checkpointed=False)


def again(setup: Setup, layer: Layer) -> int:
    """Bytes of a checkpointed layer while it is computed again, its cast weights included."""
    casts = sum(linear.weights for linear in layer.linears.values()) * setup.compute if setup.autocast else 0
    return of_layer(setup, layer) + casts


def cached_casts(setup: Setup) -> int:
    """Bytes of cast weights of checkpointed layers, which autocast keeps until the forward has ended."""
    return _cast_weights(setup, checkpointed=True)


def _out_of_reach(setup: Setup, layer: Layer) -> int:
    """Bytes of a token that checkpointing does not give back: bitsandbytes 0.50 keeps the inputs of 8-bit matrices as
    attributes (MatMul8bitLt), where the hooks of checkpointing do not see them."""
    if setup.config.method != "int8":
        return 0
    inner = layer.linears["down_proj"].inputs if "down_proj" in layer.linears else 0
    return setup.compute * (2 * setup.shape.hidden + layer.attention.output + inner)


def of_layer(setup: Setup, layer: Layer) -> int:
    """Bytes that a layer keeps that is not checkpointed."""
    experts = _experts(setup, layer) if layer.experts else 0
    each = _norms(setup, layer) + _attention(setup, layer) + _dense(setup, layer) + _thin(setup, layer)
    return setup.tokens * each + experts


def stream(setup: Setup) -> int:
    """Bytes of a token's hidden state between layers."""
    return setup.shape.hidden * (FLOAT if setup.autocast else setup.compute)


def _norm(setup: Setup, width: int) -> int:
    kind = setup.shape.norm
    if kind == "layer":  # one operation of torch: its input, mean and inverse deviation
        return width * (FLOAT if setup.autocast else setup.compute) + 2 * FLOAT
    kept = FLOAT * width * (2 if kind == "centred" else 1) + FLOAT  # its input, and the inverse root
    if not setup.full:
        return kept
    wide = setup.autocast or kind != "rms"
    return kept + width * (FLOAT if wide else setup.compute)


def _norms(setup: Setup, layer: Layer) -> int:
    kept = layer.norms * _norm(setup, setup.shape.hidden) + sum(_norm(setup, width) for width in layer.attention.latent)
    return kept + (_norm(setup, layer.attention.normed) if layer.attention.normed else 0)


def _learns(setup: Setup, layer: Layer, *names: str) -> int:
    """How many of these matrices keep their input."""
    mine = layer.linears if setup.full else setup.adapted(layer)
    return sum(name in mine for name in names)


def _inputs(setup: Setup, layer: Layer, width: int, *names: str) -> int:
    """Bytes of an input that these matrices share."""
    learn = _learns(setup, layer, *names)
    if "lora" in setup.config.plain_parts and not setup.full:  # peft casts the input of each adapter for itself
        mask = 1 if setup.config.lora_dropout else 0
        return learn * width * (setup.compute + mask)
    if setup.config.lora_dropout and not setup.full:  # each adapter has dropped inputs of its own, and their mask
        return learn * width * (setup.compute + (1 if setup.gpu else setup.compute))
    return width * setup.compute * (learn if setup.autocast else min(learn, 1))


def _attention(setup: Setup, layer: Layer) -> int:
    width, compute = layer.attention, setup.compute
    names = [
        name
        for name in layer.linears
        if name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
    ]
    entries = _inputs(setup, layer, setup.shape.hidden, *names)
    for rank, name in zip(width.latent[::-1], ("kv_b_proj", "q_b_proj")):
        entries += _inputs(setup, layer, rank, name)
    # Values are a part of what one matrix gives, and keep all of it.
    fused = next((layer.linears[name] for name in ("kv_b_proj", "qkv_proj") if name in layer.linears), None)
    value = fused.outputs if fused else width.value
    kept = compute * (width.query + width.key + value + width.output) + FLOAT * width.heads
    kept += _scores(setup, layer)
    # On a GPU in 16 bits all documents are one call, whose output o_proj takes as it is; else those of each are joined.
    joined = not (setup.gpu and setup.bf16) or setup.shape.soft_capped or bool(setup.config.lora_dropout)
    joined = joined or "lora" in setup.config.plain_parts
    return entries + kept + (_inputs(setup, layer, width.output, "o_proj") if joined else 0)


def _scores(setup: Setup, layer: Layer) -> int:
    """Bytes of a token's scores where there is no flash attention, the document taken to be max_length long."""
    row = layer.attention.heads * setup.config.max_length
    if setup.shape.soft_capped:  # the capped ones, and their softmax
        return 2 * row * setup.compute
    return row * FLOAT if setup.gpu and not setup.bf16 else 0  # torch's plain kernel


def _dense(setup: Setup, layer: Layer) -> int:
    if "down_proj" in layer.linears:
        inner = layer.linears["down_proj"].inputs
        product = _inputs(setup, layer, inner, "down_proj")
        return _inputs(setup, layer, setup.shape.hidden, *GATES) + setup.compute * 3 * inner + product
    if not layer.linears.keys() & {"c_fc"}:
        return 0
    inner = layer.linears["c_fc"].outputs
    return (
        _inputs(setup, layer, setup.shape.hidden, "c_fc")
        + setup.compute * inner
        + _inputs(setup, layer, inner, "c_proj")
    )


def _thin(setup: Setup, layer: Layer) -> int:
    return len(setup.adapted(layer)) * setup.config.lora_r * setup.compute


def _experts(setup: Setup, layer: Layer) -> int:
    """Bytes of the routed experts of one layer."""
    experts, compute, tokens = layer.experts, setup.compute, setup.tokens
    adapted = setup.adapted_experts(layer)
    # Gate and up, act(gate), what comes out; also the chosen rows and the product, where something learns from them.
    row = experts.hidden + 3 * experts.intermediate
    row += experts.hidden + experts.intermediate if adapted or setup.full else 0
    kept = tokens * experts.per_token * (row * compute + 3 * INDEX)
    kept += tokens * (FLOAT * experts.number + INDEX * experts.per_token)
    if setup.autocast or adapted:  # peft 0.21 adds adapters to the weights themselves (ParamWrapper)
        kept += experts.weights * compute
    if adapted and compute < FLOAT:
        kept += sum(setup.expert_adapters(layer)) * compute
    return kept


def _rotary(setup: Setup) -> int:
    if setup.checkpointed >= setup.shape.depth:
        return 0
    return setup.tokens * 2 * setup.shape.rope * (FLOAT if setup.autocast else setup.compute)


def _cast_weights(setup: Setup, *, checkpointed: bool) -> int:
    """Copies of the weights in 16 bits that autocast makes, of the layers that are checkpointed or of the others."""
    if not setup.autocast:
        return 0
    layers = list(setup.shape.each())
    chosen = layers[: setup.checkpointed] if checkpointed else layers[setup.checkpointed :]
    return setup.compute * sum(sum(linear.weights for linear in layer.linears.values()) for layer in chosen)
