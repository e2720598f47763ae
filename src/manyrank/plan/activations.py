"""Bytes that autograd keeps of a micro-batch, operation by operation as transformers' eager modules save them.

For each token of a decoder layer, in the type of computation unless it says float32:

    norm            its input in float32 (and the normalised one, where norms are trained)
    q k v           the norm's output, once for all matrices that are trained or adapted
    attention       q and k after the rotary embedding, v, the output; float32 log-sum-exp of each head
    gate up down    the norm's output, gate, act(gate) (of a SwiGLU that is not fused), up, their product
    adapters        the thin product of each
    experts         rows for each of a token's experts, and the merged weights of adapted ones

A checkpointed layer keeps its input alone. `tests/plan/test_activations.py` counts what autograd really saves.
"""

from __future__ import annotations

from ..models.spec import Layer
from .planned_run import PlannedRun

FLOAT, INDEX = 4, 8  # bytes
GATES = ("gate_proj", "up_proj", "gate_up_proj")


def saved(run: PlannedRun) -> int:
    """Bytes between forward and backward of a micro-batch, head and loss not counted."""
    tokens, size, recomputed = run.tokens, 0, run.checkpointed
    sizes = {id(layer): of_layer(run, layer) for layer in run.shape.layers}
    for index, layer in enumerate(run.shape.each()):
        if index < run.first_learned:
            continue
        if index < recomputed:
            size += tokens * (stream(run) + _out_of_reach(run, layer))
        else:
            # The first layer's input needs no gradient where the embedding is frozen, so its norm keeps nothing.
            first = 0 if index or run.full else tokens * FLOAT * run.shape.hidden
            size += sizes[id(layer)] - first
    outside = tokens * (_norm(run, run.shape.hidden) + (INDEX if run.full else 0)) + _rotary(run)
    return size + outside + _cast_weights(run, checkpointed=False)


def again(run: PlannedRun, layer: Layer) -> int:
    """Bytes of a checkpointed layer while it is recomputed, its cast weights included."""
    casts = sum(linear.weights for linear in layer.linears.values()) * run.compute if run.autocast else 0
    return of_layer(run, layer) + casts


def cached_casts(run: PlannedRun) -> int:
    """Bytes of cast weights of checkpointed layers, which autocast keeps until the forward has ended."""
    return _cast_weights(run, checkpointed=True)


def _out_of_reach(run: PlannedRun, layer: Layer) -> int:
    """Bytes of a token that checkpointing does not give back: bitsandbytes 0.50 keeps the inputs of 8-bit matrices as
    attributes (MatMul8bitLt), where the hooks of checkpointing do not see them."""
    if run.config.method != "int8":
        return 0
    inner = layer.linears["down_proj"].inputs if "down_proj" in layer.linears else 0
    return run.compute * (2 * run.shape.hidden + layer.attention.output + inner)


def of_layer(run: PlannedRun, layer: Layer) -> int:
    """Bytes that a layer keeps that is not checkpointed."""
    experts = _experts(run, layer) if layer.experts else 0
    each = _norms(run, layer) + _attention(run, layer) + _dense(run, layer) + _thin(run, layer)
    return run.tokens * each + experts


def stream(run: PlannedRun) -> int:
    """Bytes of a token's hidden state between layers."""
    return run.shape.hidden * (FLOAT if run.autocast else run.compute)


def _norm(run: PlannedRun, width: int) -> int:
    kind = run.shape.norm
    if kind == "layer":  # one operation of torch: its input, mean and inverse deviation
        return width * (FLOAT if run.autocast else run.compute) + 2 * FLOAT
    if kind == "rms" and _fuses_norms(run):  # its input, and the inverse root
        return width * run.compute + FLOAT
    size = FLOAT * width * (2 if kind == "centred" else 1) + FLOAT  # the same in float32
    if not run.full:
        return size
    wide = run.autocast or kind != "rms"
    return size + width * (FLOAT if wide else run.compute)


def _fuses_norms(run: PlannedRun) -> bool:
    """Whether torch's kernel computes the norms, see `models.fused_norm`."""
    parts = run.config.disable_fused
    return run.gpu and run.half and not run.autocast and "norm" not in parts and not run.config.torch_compile


def _norms(run: PlannedRun, layer: Layer) -> int:
    size = layer.norms * _norm(run, run.shape.hidden) + sum(_norm(run, width) for width in layer.attention.latent)
    return size + (_norm(run, layer.attention.normed) if layer.attention.normed else 0)


def _learns(run: PlannedRun, layer: Layer, *names: str) -> int:
    """Count the matrices that keep their input."""
    trained = layer.linears if run.full else run.adapted(layer)
    return sum(name in trained for name in names)


def _inputs(run: PlannedRun, layer: Layer, width: int, *names: str) -> int:
    """Bytes of an input that these matrices share."""
    learn = _learns(run, layer, *names)
    if "lora" in run.config.disable_fused and not run.full:  # peft casts the input of each adapter for itself
        mask = 1 if run.config.lora_dropout else 0
        return learn * width * (run.compute + mask)
    if run.config.lora_dropout and not run.full:  # each adapter has dropped inputs of its own, and their mask
        return learn * width * (run.compute + (1 if run.gpu else run.compute))
    return width * run.compute * (learn if run.autocast else min(learn, 1))


def _attention(run: PlannedRun, layer: Layer) -> int:
    width, compute = layer.attention, run.compute
    names = [
        name
        for name in layer.linears
        if name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa")
    ]
    entries = _inputs(run, layer, run.shape.hidden, *names)
    for rank, name in zip(width.latent[::-1], ("kv_b_proj", "q_b_proj")):
        entries += _inputs(run, layer, rank, name)
    # Values are a part of what one matrix gives, and keep all of it.
    fused = next((layer.linears[name] for name in ("kv_b_proj", "qkv_proj") if name in layer.linears), None)
    value = fused.outputs if fused else width.value
    size = compute * (width.query + width.key + value)
    if run.config.attn_implementation != "eager":  # which keeps its scores instead
        size += compute * width.output + FLOAT * width.heads
    size += _scores(run, layer)
    # By flash attention all documents are one call, whose output o_proj takes as it is; else those of each are joined.
    joined = not run.flash or run.shape.soft_capped or bool(run.config.lora_dropout)
    joined = joined or run.config.attn_implementation == "sdpa"
    joined = joined or "lora" in run.config.disable_fused
    return entries + size + (_inputs(run, layer, width.output, "o_proj") if joined else 0)


def _scores(run: PlannedRun, layer: Layer) -> int:
    """Bytes of a token's scores where there is no flash attention, the document taken to be max_length long."""
    row = layer.attention.heads * run.config.max_length
    if run.shape.soft_capped:  # the capped ones, and their softmax
        return 2 * row * run.compute
    if run.config.attn_implementation == "eager":  # their softmax; padded, in float32 and in the compute type
        return row * (run.compute + FLOAT * (run.half and run.config.packing == "none"))
    return row * FLOAT if run.gpu and not run.flash else 0  # torch's plain kernel


def _dense(run: PlannedRun, layer: Layer) -> int:
    if "down_proj" in layer.linears:
        inner = layer.linears["down_proj"].inputs
        product = _inputs(run, layer, inner, "down_proj")
        factors = 2 if _fuses_mlps(run) else 3
        return _inputs(run, layer, run.shape.hidden, *GATES) + run.compute * factors * inner + product
    if not layer.linears.keys() & {"c_fc"}:
        return 0
    inner = layer.linears["c_fc"].outputs
    return _inputs(run, layer, run.shape.hidden, "c_fc") + run.compute * inner + _inputs(run, layer, inner, "c_proj")


def _fuses_mlps(run: PlannedRun) -> bool:
    """Whether act(gate) is recomputed, see `models.fused_mlp`."""
    return run.shape.swiglu and "mlp" not in run.config.disable_fused and not run.config.torch_compile


def _thin(run: PlannedRun, layer: Layer) -> int:
    """Bytes of x A' of a token; under DoRA also of both products, which it keeps to scale them."""
    adapted = run.adapted(layer)
    products = 2 * sum(linear.outputs for linear in adapted.values()) if run.config.use_dora else 0
    return (sum(map(run.rank, adapted)) + products) * run.compute


def _experts(run: PlannedRun, layer: Layer) -> int:
    """Bytes of the routed experts of one layer."""
    experts, compute, tokens = layer.experts, run.compute, run.tokens
    if experts is None:
        return 0
    adapted = run.adapted_experts(layer)
    # Gate and up, act(gate), what comes out; also the chosen rows and the product, where something learns from them.
    row = experts.hidden + 3 * experts.intermediate
    row += experts.hidden + experts.intermediate if adapted or run.full else 0
    size = tokens * experts.per_token * (row * compute + 3 * INDEX)
    size += tokens * (FLOAT * experts.number + INDEX * experts.per_token)
    if run.autocast or adapted:  # peft 0.21 adds adapters to the weights themselves (ParamWrapper)
        size += experts.weights * compute
    if adapted and compute < FLOAT:
        size += sum(run.expert_adapters(layer)) * compute
    return size


def _rotary(run: PlannedRun) -> int:
    if run.checkpointed >= run.shape.depth:
        return 0
    return run.tokens * 2 * run.shape.rope * (FLOAT if run.autocast else run.compute)


def _cast_weights(run: PlannedRun, *, checkpointed: bool) -> int:
    """Copies of the weights in 16 bits that autocast makes, of the layers that are checkpointed or of the others."""
    if not run.autocast:
        return 0
    layers = list(run.shape.each())
    chosen = layers[: run.checkpointed] if checkpointed else layers[run.checkpointed :]
    return run.compute * sum(sum(linear.weights for linear in layer.linears.values()) for layer in chosen)
