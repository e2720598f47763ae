"""Decide how to load a model, then load it: a `LoadPlan` is a plain value, made from the recipe and the strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..project_files import EMBEDDED
from ..runs import hub
from ..topology.precision import Precision
from . import coverage
from .adapters import Say, with_lora
from .attention import set_attention
from .float8 import to_float8
from .freezing import freeze
from .fused_mlp import fuse_mlps
from .fused_norm import fuse_norms
from .fused_rope import fuse_ropes
from .new_tokens import NONE, NewTokens, growing
from .reach import reach
from .shards import Share, is_read, loading_in_shards
from .tiny import ensure


@dataclass(frozen=True)
class LoadPlan:
    """Plan how this rank gets the base model.

    Attributes:
        name: a folder or a hub name.
        dtype: of the weights that are not quantised; "auto": the one that they are stored in.
        quantization: None, "nf4", "fp4", "int8" or "float8"; a base that is stored in 4 bits keeps its own.
        double_quant: whether the constants of 4-bit weights are quantised, too.
        device_map: where quantised weights go; None leaves placing to accelerate.
        share: this rank's share, where the strategy shards the base; None: all of it.
        new: tokens that its tokenizer has gained.
    """

    name: str
    dtype: torch.dtype | Literal["auto"]
    compute_dtype: torch.dtype
    quantization: str | None = None
    device_map: dict | None = None
    share: Share | None = None
    trust_remote_code: bool = False
    double_quant: bool = True
    new: NewTokens = NONE

    @property
    def in_4_bits(self) -> bool:
        return self.quantization in ("nf4", "fp4")


def plan_load(
    config: TrainConfig, accelerator: Accelerator, *, precision: Precision, new: NewTokens = NONE
) -> LoadPlan:
    """Decide from the recipe and from what came up."""
    compute = getattr(torch, precision.dtype)
    of_4_bits = config.bnb_4bit_quant_type or "nf4"
    quantization = {"qlora": of_4_bits, "int8": "int8", "fp8": "float8"}.get(config.method)
    share = _share(config, accelerator, compute)
    return LoadPlan(
        name=resolve_name(config.model_name_or_path),
        dtype=_kept_in(config, precision),
        compute_dtype=compute,
        quantization=quantization,
        # transformers takes no map where it partitions a model for ZeRO-3 itself.
        device_map={"": accelerator.device} if quantization and (share or not _is_zero3(accelerator)) else None,
        share=share,
        trust_remote_code=config.trust_remote_code,
        double_quant=config.bnb_4bit_use_double_quant is not False,
        new=new,
    )


def _kept_in(config: TrainConfig, precision: Precision) -> torch.dtype:
    """The type of a base that is not quantised: one that is trained has float32 weights, whatever it computes in."""
    return torch.float32 if config.method == "full" and not config.pure_bf16 else getattr(torch, precision.dtype)


def _share(config: TrainConfig, accelerator: Accelerator, storage: torch.dtype) -> Share | None:
    rank, count = accelerator.process_index, accelerator.num_processes
    trained, host = config.method == "full", torch.device("cpu")
    if accelerator.distributed_type == DistributedType.FSDP:
        mesh, offload = accelerator.torch_device_mesh, accelerator.state.fsdp_plugin.cpu_offload
        count = mesh.shape[-1] if mesh is not None else count
        device = host if trained or isinstance(offload, CPUOffloadPolicy) else accelerator.device
        return Share(rank % count, count, flat=False, device=device, trained=trained, storage=storage)
    if _is_zero3(accelerator) and _partitions_plainly(accelerator.deepspeed_plugin):
        device = accelerator.device if accelerator.deepspeed_plugin.offload_param_device == "none" else host
        return Share(rank, count, flat=True, device=device, trained=trained, storage=storage)
    return None


def _is_zero3(accelerator: Accelerator) -> bool:
    return accelerator.deepspeed_plugin is not None and accelerator.deepspeed_plugin.zero_stage == 3


def _partitions_plainly(plugin: DeepSpeedPlugin) -> bool:
    """Return whether ranks of ZeRO-3 hold equal parts of each weight, as they are, and nothing more (ZeRO++, NVMe)."""
    zero = plugin.deepspeed_config["zero_optimization"]
    quantised = zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights")
    return zero.get("zero_hpz_partition_size", 1) == 1 and not quantised and plugin.offload_param_device != "nvme"


def resolve_name(name: str) -> str:
    """A folder by its whole path, so that an adapter on it is found from any folder; a hub name as it is."""
    if name == EMBEDDED:
        return str(ensure())
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def silent(line: str) -> None:
    """Say nothing."""


def load_model(
    plan: LoadPlan,
    config: TrainConfig,
    *,
    say: Say = silent,
    read: Callable[[LoadPlan], torch.nn.Module] | None = None,
) -> torch.nn.Module:
    """Load the base and put adapters on it; the same start on every rank and strategy for a seed.

    Args:
        read: loads the base; None for `base_model`.
        say: takes a line on what is not quantised, not trained or has no adapters.

    Raises:
        UserError: the model cannot be loaded, quantised, packed or given these adapters.
    """
    base = (read or base_model)(plan)
    if plan.quantization:
        _check_quantised(base, config, say)
    return with_adapters(base, config, say=say, new=plan.new)


def _check_quantised(model: torch.nn.Module, config: TrainConfig, say: Say) -> None:
    where, fix = (
        f"method, with {config.model_name_or_path}",
        "use method: lora, or full; fsdp and zero3 shard what does not fit",
    )
    coverage.check_quantised(model, method=f"method {config.method}", where=where, fix=fix, say=say)


def fitted(model: torch.nn.Module, config: TrainConfig, *, precision: Precision, say: Say = silent) -> torch.nn.Module:
    """A base that a script brings, in the type that this project would load it in.

    Raises:
        UserError: it has adapters, or it is quantised and the method is not, or the other way round, or in name only.
    """
    if config.add_tokens or config.add_special_tokens:
        fix = "add them to its tokenizer, resize its embeddings, and pass both"
        raise UserError("add_tokens with a model in memory", where="model", fix=fix)
    if hasattr(model, "peft_config"):
        raise UserError("the model has adapters", where="model", fix="give its base: the method puts adapters on it")
    if config.method == "fp8":
        fix = "name the model in model_name_or_path alone, or use method: lora"
        raise UserError("method fp8 with a model in memory, whose weights it would replace", where="model", fix=fix)
    quantised = bool(getattr(model, "is_quantized", False))
    if quantised != (config.method in ("qlora", "int8")):
        what = f"method {config.method} with a model that is {'' if quantised else 'not '}quantised"
        raise UserError(what, where="model", fix="load it with that method's quantization_config, or change the method")
    if quantised:
        _check_quantised(model, config, say)
        return model
    return model.to(_kept_in(config, precision))


def with_adapters(
    model: torch.nn.Module, config: TrainConfig, *, say: Say = silent, new: NewTokens = NONE
) -> torch.nn.Module:
    """A base with everything on it that the recipe asks for: packed attention, checkpointing, adapters.

    What a text does not reach has no adapters and is not trained; `say` takes a line on it.
    """
    reached = reach(model)
    set_attention(model, config, say)
    _checkpoint_layers(model, config.gradient_checkpointing)
    if not config.torch_compile:  # which fuses these by itself
        for part, fuse in {"norm": fuse_norms, "mlp": fuse_mlps, "rope": fuse_ropes}.items():
            if part not in config.disable_fused:
                fuse(model)
    if config.uses_lora:
        model = with_lora(model, config, reached, say, new)
        for own in model.peft_config.values():  # of a base that a script has loaded by a relative path
            own.base_model_name_or_path = own.base_model_name_or_path and resolve_name(own.base_model_name_or_path)
    else:
        freeze(model, config, reached, say)
    if config.torch_compile:
        layers = _layers(model)
        if not layers:
            raise UserError("the model's layers are not known", where="torch_compile", fix="leave it out")
        for layer in layers:
            layer.compile(dynamic=True)  # packs differ in length
    return model


def _checkpoint_layers(model: torch.nn.Module, checkpointing: int | str) -> None:
    if checkpointing in ("auto", "off", 0):  # auto was settled before, where there is a plan (see `training.memory`)
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = _layers(model)
    if isinstance(checkpointing, int):
        if checkpointing > len(layers):
            fix = f"the model has {len(layers)} layers"
            raise UserError(f"{checkpointing} layers to recompute", where="gradient_checkpointing", fix=fix)
        for layer in layers[checkpointing:]:
            layer.gradient_checkpointing = False


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def base_model(plan: LoadPlan, config: PreTrainedConfig | None = None) -> torch.nn.Module:
    """The base model as a plan has it, with rows for new tokens.

    Args:
        config: the model's; it is read where nobody has read it.
    """
    if not plan.new.ids:
        return _read_base(plan, config)
    config = config or load_config(plan.name, trust_remote_code=plan.trust_remote_code)
    with growing(config.get_text_config().vocab_size, plan.new):
        model = _read_base(plan, config)
    text = model.config.get_text_config()
    text.vocab_size = max(text.vocab_size, *(number + 1 for number in plan.new.ids))
    return model


def _read_base(plan: LoadPlan, config: PreTrainedConfig | None) -> torch.nn.Module:
    if plan.in_4_bits:
        config = config or load_config(plan.name, trust_remote_code=plan.trust_remote_code)
    options = {"config": config, "dtype": plan.dtype, "trust_remote_code": plan.trust_remote_code}
    stored = plan.in_4_bits and is_stored_in_4_bits(config)
    if (plan.in_4_bits or plan.quantization == "int8") and not stored:
        options["quantization_config"] = _quantization(plan)
    if stored:  # the recipe says in which type to compute
        config.quantization_config["bnb_4bit_compute_dtype"] = str(plan.compute_dtype).removeprefix("torch.")
    if plan.device_map and plan.quantization != "float8":  # a matrix at a time goes there
        options["device_map"] = plan.device_map
    shards = loading_in_shards(plan.share) if plan.share else contextlib.nullcontext()
    with loading(plan.name), _casting() if stored else contextlib.nullcontext(), shards:
        if not (stored and plan.share):
            model = AutoModelForCausalLM.from_pretrained(plan.name, **options)
            if plan.quantization == "float8":
                to_float8(model, plan.device_map[""])
            return model
        # On the CPU the files stay mapped, so that a rank reads no more than it keeps. accelerate looks at the map.
        model = AutoModelForCausalLM.from_pretrained(plan.name, **options | {"device_map": {"": "cpu"}})
        model.hf_device_map = plan.device_map
        for module in model.modules():
            if getattr(module, "quant_state", None) is not None:
                module.quant_state.to(plan.device_map[""])
        return model


@contextlib.contextmanager
def _casting() -> Iterator[None]:
    """Cast what is stored beside 4-bit weights to the types of the model, as transformers 5.23 does with all other files."""

    def cast(module: torch.nn.Module, name: str, read: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        own = module._parameters.get(name)
        if read is None or own is None or not is_read(read) or hasattr(read, "quant_state") or own.dtype == read.dtype:
            return None
        parameter = torch.nn.Parameter(read.data.to(own.dtype), requires_grad=read.requires_grad)
        parameter._is_hf_initialized = True
        return parameter

    hook = register_module_parameter_registration_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def _quantization(plan: LoadPlan) -> BitsAndBytesConfig:
    if plan.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.quantization,
        bnb_4bit_use_double_quant=plan.double_quant,
        bnb_4bit_compute_dtype=plan.compute_dtype,
        # Packed into the compute type, the 4-bit base can be sharded; as bytes FSDP2 would copy it to every rank.
        bnb_4bit_quant_storage=plan.compute_dtype,
    )


def is_stored_in_4_bits(config: PreTrainedConfig) -> bool:
    """Return whether a base has been quantised already, by bitsandbytes."""
    quantised = getattr(config, "quantization_config", None)
    return bool(quantised) and bool(quantised.get("load_in_4bit"))


def load_config(name: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model's folder or hub name.

    Raises:
        UserError: it cannot be loaded.
    """
    with loading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def read_config(config: TrainConfig) -> dict:
    """The content of the model's config.json, with what its type adds."""
    name = resolve_name(config.model_name_or_path)
    return load_config(name, trust_remote_code=config.trust_remote_code).to_dict()


@contextlib.contextmanager
def loading(name: str):
    """Tell what libraries raise as what is wrong with a model; ask for one of the hub before they do."""
    hub.check_model(name)
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        if needs_its_code(error):
            raise untrusted(name, where=f"model_name_or_path {name}") from None
        problem, there = " ".join(str(error).split())[:300], Path(name).is_dir()
        what = f"cannot load the model: {'' if there else f'there is no folder {name} here, and of the hub: '}{problem}"
        if Path(name).is_absolute() and not there:  # transformers takes it for a name on the hub
            what = f"there is no folder {name}"
        raise UserError(
            what,
            where=f"model_name_or_path {name}",
            fix="give a folder with config.json, weights and tokenizer, or a hub name that can be reached",
        ) from None


def needs_its_code(error: Exception) -> bool:
    """Return whether transformers has refused to run code that comes with a model."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def untrusted(name: str, *, where: str) -> UserError:
    what = f"{name} needs Python code that comes with it, and this command does not say to run it"
    return UserError(what, where=where, fix="read that code, and if you trust it, add --trust-remote-code")


@contextlib.contextmanager
def evaluation_mode(wrapped: torch.nn.Module):
    """No dropout, no gradients; training mode afterwards.

    bitsandbytes 0.50 repacks 4-bit weights for AVX512-BF16 at the first eval-mode forward of a Linear4bit on a CPU, in
    place; sharding, saving and merging then read garbage. Those layers, which have no dropout of their own, stay as they
    are. It can go when Linear4bit.forward repacks a copy.
    """
    wrapped.eval()
    for module in wrapped.modules():
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        wrapped.train()
