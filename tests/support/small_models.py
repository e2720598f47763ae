"""Small shapes of many architectures, and models of them with the adapters of a recipe."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyrank.config.args import parse
from manyrank.config.resolve import Setting, resolve
from manyrank.models import spec
from manyrank.models.float8 import to_float8
from manyrank.models.load import with_adapters

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
}
# For a model that is launched with the tokenizer of the embedded one.
LAUNCHED = dict(
    vocab_size=1536,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
TOKENS, DOCUMENTS = 256, 4
SHAPE = {**SMALL, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 32}
MODELS = {
    "llama": {},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {},
    "phi3": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "granite": {"head_dim": None},
    "starcoder2": {"head_dim": None},
    "qwen3_moe": {**MOE, "moe_intermediate_size": 160},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**MOE, "moe_intermediate_size": 160, "shared_expert_intermediate_size": 320, "head_dim": None},
    "deepseek_v3": {
        **LATENT,
        "q_lora_rank": 64,
        "kv_lora_rank": 48,
        "v_head_dim": 32,
        "head_dim": None,
        "moe_intermediate_size": 160,
    },
}
LORA, FULL = ("--method=lora",), ("--method=full",)
CHECKPOINTED = ("--gradient_checkpointing=full",)


def adapted(model, **options):
    """A model with peft's adapters of rank 4, whose values are not zero."""
    torch.manual_seed(0)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(model, lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def save_for_launch(model: PreTrainedModel, folder: Path, embedded_model: Path) -> None:
    """Save a model of LAUNCHED's vocabulary, with the tokenizer and template of the embedded one."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((embedded_model / name).read_bytes())


def recipe(*argv: str):
    # sdpa alone, as on a GPU: the plain products of short documents in bf16 are the CPU's.
    common = [
        "--model=x",
        "--data_path=x",
        "--disable_fused=attention",
        "--per_device_train_batch_size=4",
        f"--max_length={TOKENS // 4}",
    ]
    line = parse([*common, *argv], prog="test", launch=False)
    return resolve(line.recipe, line.overrides).config


def made(kind: str, config, dtype: torch.dtype):
    values = {key: value for key, value in {**SHAPE, **MODELS[kind]}.items() if value is not None}
    plain = AutoConfig.for_model(kind, **values)
    base = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    if config.method == "fp8":
        to_float8(base, torch.device("cpu"))
    model = with_adapters(base, config)
    return model.train(), spec.from_config(plain.to_dict(), name=kind)


def packs() -> dict[str, torch.Tensor]:
    each = TOKENS // DOCUMENTS
    bounds = torch.arange(0, TOKENS + 1, each, dtype=torch.int32)
    return {
        "input_ids": torch.arange(TOKENS)[None] % 300,
        "position_ids": torch.arange(TOKENS)[None] % each,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": each,
        "max_length_k": each,
    }


def plain_loss(model, tokenizer, path, config=None) -> float:
    """Mean loss of supervised tokens with nothing but transformers: row by row, all logits; learned as a recipe says."""
    from manyrank.data.dataset import prepare

    given = {"model_name_or_path": "embedded", "data_path": path, "max_length": 256}
    usual = resolve(None, [Setting(k, v, "test") for k, v in given.items()]).config
    examples = prepare(usual.data_path, tokenizer, config or usual)
    total = count = 0
    for row in map(examples.__getitem__, range(len(examples))):
        ids, labels = torch.as_tensor(row["input_ids"])[None].long(), torch.as_tensor(row["labels"])[None].long()
        supervised = int((labels != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * supervised
        count += supervised
    return total / count
