"""Decide how to load a model, then load it: a `LoadPlan` is a plain value, made from the recipe and the strategy."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import SafetensorError
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.resolve import TrainConfig
from ..errors import UserError
from ..project_files import EMBEDDED, template_file, template_names
from ..runs import hub
from ..topology.precision import Precision
from . import coverage, flash
from .adapters import Say, freeze_unreached, with_lora
from .attention import use_packed_attention
from .float8 import to_float8
from .fused_mlp import fuse_mlps
from .fused_norm import fuse_norms
from .fused_rope import fuse_ropes
from .new_tokens import NONE, NewTokens, add_new_tokens, growing
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
        # What is trained whole keeps float32 weights; the forward runs in the compute type all the same.
        dtype=torch.float32 if config.method == "full" else compute,
        compute_dtype=compute,
        quantization=quantization,
        # transformers takes no map where it partitions a model for ZeRO-3 itself.
        device_map={"": accelerator.device} if quantization and (share or not _is_zero3(accelerator)) else None,
        share=share,
        trust_remote_code=config.trust_remote_code,
        double_quant=config.bnb_4bit_use_double_quant is not False,
        new=new,
    )


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


def load_tokenizer(config: TrainConfig, own: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the recipe's chat template if it names one.

    Args:
        own: take this one instead.

    Raises:
        UserError: it cannot be loaded, is not a fast one, or there is no such template.
    """
    name = resolve_name(config.model_name_or_path)
    if own:
        tokenizer = copy.deepcopy(own)
    else:
        with loading(name):
            tokenizer = _stored_tokenizer(name, config.trust_remote_code)
    if config.chat_template:
        tokenizer.chat_template = _template(config.chat_template, tokenizer)
    add_new_tokens(tokenizer, config)
    _check_template(tokenizer, where=config.chat_template or name)
    _check_variables(config.chat_template_kwargs, tokenizer)
    if not tokenizer.is_fast:
        raise UserError("the tokenizer has no fast version", where=name, fix="convert it to a tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _stored_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, StrictDataclassError):
        raise  # told as what is wrong with the model
    except Exception as error:  # a damaged tokenizer.json: a KeyError, or an Exception of the tokenizers library
        what = f"cannot load the tokenizer: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(what, where=name, fix="give a folder with a whole tokenizer.json") from error


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a template given as a file, as one of the project's, or as one of the tokenizer's."""
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in own:
        return own[name]
    if file := template_file(name):
        return _text(file)
    known = sorted({*own, *template_names()})
    raise UserError(
        f"there is no chat template {name!r}", where="chat_template", fix=f"a file, or one of {', '.join(known)}"
    )


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("not text in UTF-8", where=str(file), fix="give a Jinja template") from None
    if not text.strip():
        raise UserError("an empty template", where=str(file), fix="give a Jinja template")
    return text


def _check_template(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """A template that is no Jinja would make every row a bad one."""
    if not tokenizer.chat_template:
        return
    with contextlib.suppress(TemplateError, ValueError, TypeError):  # it may well refuse this conversation
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateSyntaxError as error:
            place = f"{where}, line {error.lineno}"
            raise UserError(
                f"the chat template is not valid Jinja: {error}", where=place, fix="fix the template"
            ) from None


def _check_variables(variables: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A template ignores a variable that it does not know, and so would a misspelt one be."""
    own = tokenizer.chat_template or ""
    text = "\n".join(own.values()) if isinstance(own, dict) else own
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in variables:
        if name in taken:
            what = f"{name!r} is not the recipe's to set"
            raise UserError(what, where="chat_template_kwargs", fix="leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            what = f"the chat template knows no variable {name!r}"
            raise UserError(what, where="chat_template_kwargs", fix="give one that the template uses")


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
    return model.to(torch.float32 if config.method == "full" else getattr(torch, precision.dtype))


def with_adapters(
    model: torch.nn.Module, config: TrainConfig, *, say: Say = silent, new: NewTokens = NONE
) -> torch.nn.Module:
    """A base with everything on it that the recipe asks for: packed attention, checkpointing, adapters.

    What a text does not reach has no adapters and is not trained; `say` takes a line on it.
    """
    reached = reach(model)
    if config.packing != "none":
        use_packed_attention(model, plain="attention" in config.disable_fused)
        if name := flash.active():
            say(f"packed attention in 16 bits runs by {name}")
    else:
        flash.restore()
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
        freeze_unreached(model, reached, say)
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
