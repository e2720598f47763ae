"""A packed LoRA step of two layers of each architecture: the argument checks of torch's CUDA kernels, and the host's waits."""

import numpy as np
import pytest
from transformers import AutoConfig, PreTrainedConfig

from manyrank.models.catalog import known
from manyrank.models.spec import FAMILIES, from_config

SMALL = dict(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,  # of 128, where no head_dim is given
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
# Heads are as wide as the published models of each kind have them; a second word tells several of one kind apart.
KINDS = {
    "llama": {},
    "llama 64": {"head_dim": 64},
    "llama 72": {"head_dim": 72},
    "llama 100": {"head_dim": 100},
    "llama 320": {"head_dim": 320},
    "qwen2": {},
    "qwen2 64": {"hidden_size": 256},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {**EXPERTS, "head_dim": 128},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "mistral": {"sliding_window": 64},
    "ministral": {"head_dim": 128, "sliding_window": 64},
    "mixtral": {"num_local_experts": 4},
    "phi": {"hidden_size": 320, "num_key_value_heads": 4},
    "phi3": {"hidden_size": 384},
    "phi3 128": {},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "sliding_window": 64},
    "gemma2 128": {"head_dim": 128, "sliding_window": 64},
    "gemma3_text": {"head_dim": 256, "sliding_window": 64},
    "gemma3_text 128": {"head_dim": 128, "sliding_window": 64},
    "gemma4_text": {"head_dim": 256, "global_head_dim": 512, "sliding_window": 64},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1},
    "deepseek_v3": {**LATENT, "q_lora_rank": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": {"head_dim": 128},
    "glm4": {"head_dim": 128},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 128},
    "gpt_neox": {"hidden_size": 320},
    "starcoder2": {},
    "granite": {},
    "granite 64": {"hidden_size": 256},
    "cohere": {},
    "cohere2": {},
    "smollm3": {},
    "ernie4_5": {},
    "seed_oss": {"attention_dropout": 0.0},
    "helium": {"head_dim": 128},
    "exaone4": {"sliding_window": 64},
    "gpt_oss": {"head_dim": 64},
}
ALONE = {  # the reason why the kernel for packed rows does not take them; a document at a time then
    "llama 100": "no multiple of 8",
    "llama 320": "above 256",
    "gemma2": "soft-cap",
    "gemma2 128": "soft-cap",
    "gemma4_text": "above 256",
    "deepseek_v2": "values of 128",
    "deepseek_v3": "values of 128",
    "gpt_oss": "sinks",
}


def rows() -> list[dict]:
    random, made = np.random.default_rng(0), []
    for number, length in enumerate((100, 37, 80)):
        ids = random.integers(1, 500, length)
        made.append(
            {"input_ids": ids, "labels": np.where(np.arange(length) < 5, -100, ids), "source": "x", "row": number}
        )
    return made


def config_of(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(name.split()[0], **SMALL | KINDS[name])


def head_sizes(config: dict) -> set[tuple[str, int, int]]:
    """Kinds of heads: the model's type, and the widths of queries and keys, and of values."""
    spec = from_config(config, name="x")
    widths = [layer.attention for layer in spec.layers]
    return {(spec.model_type, each.query // each.heads, each.output // each.heads) for each in widths}


def test_every_architecture_of_the_planner_is_there():
    """With the heads that its models of the catalog have."""
    assert set(FAMILIES) <= {name.split()[0] for name in KINDS}
    tried = set().union(*(head_sizes(config_of(name).to_dict()) for name in KINDS))
    untried = {name: heads for name, config in known().items() if (heads := head_sizes(config) - tried)}
    assert not untried


@pytest.mark.cuda
@pytest.mark.parametrize("name", KINDS)
def test_a_packed_step(name, monkeypatch):
    import cuda_counters as counters
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from manyrank.config.resolve import Setting, resolve
    from manyrank.data.loader import side_by_side
    from manyrank.models import attention
    from manyrank.models.load import with_adapters
    from manyrank.parallel.sharded_engines import prepare_engine
    from manyrank.training.loss import TokenLoss
    from manyrank.training.optim import build_optimizer

    said = []
    monkeypatch.setattr(attention.logger, "warning_once", said.append)
    given = {"model_name_or_path": "x", "data_path": "y", "method": "lora"}
    config = resolve(None, [Setting(key, value, "test") for key, value in given.items()]).config
    base = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16).cuda()
    accelerator = Accelerator(mixed_precision="bf16")
    model = with_adapters(base, config)
    engine = prepare_engine(accelerator, model, build_optimizer(model, config))
    token_loss = TokenLoss(engine.wrapped, engine.model)
    micro = side_by_side(rows()).to(accelerator.device)
    for _ in range(2):  # in the first one kernels and norms are tried
        counters.reset()
        with engine.forward_backward(last=True):
            loss = token_loss(micro.inputs, micro.positions, micro.targets)
            engine.backward(loss, last=True)
        micro_batch = counters.read()
        engine.step(learning_rate=1e-4, max_grad_norm=1.0, sums=loss.detach()[None])
    counted = counters.read()
    assert counters.waits(micro_batch) == 0 and counters.waits(counted) == 1
    assert counted["refused_launches"] == 0 and counted["products"] > 0
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert len(set(said)) == (name in ALONE) and ALONE.get(name, "") in "".join(said)
