"""How adapters start: from the base's weights, from a saved adapter, or on top of one.

    init_lora_weights: pissa, olora   A and B from W; the same A and -B frozen below, so that nothing changes at first
                       loftq          B A is what 4 bits have lost of W
                       eva            A from the inputs of W, once the model can run: `input_directions`
    use_dora                          the magnitudes are the norms of W's rows
    modules_to_save                   copies of the base's modules, in float32; trainable_token_indices: of its rows
    adapter                           the values of a saved one; with new_adapter it is frozen below a new one

W is read from the base's files, one matrix at a time: a model that is loaded in shards, or quantised, does not have it.
Ranks share the work. The base itself is never changed, so that what is saved fits it. A resumed run has the values in
its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import safe_open
from transformers import set_seed

from ..config.resolve import TrainConfig
from ..errors import UserError
from . import frozen_adapter
from .adapters import adapted_layers, load_adapter
from .model_facts import find_facts
from .new_tokens import NONE, NewTokens

WITHOUT_WEIGHTS = ("true", "gaussian", "eva")  # starts that the base's weights do not tell
Weights = Callable[[str], torch.Tensor]  # of the base, by name


def start_adapters(
    model: torch.nn.Module,
    config: TrainConfig,
    weights: Weights,
    *,
    adapter: Path | None,
    resumed: Path | None,
    new: NewTokens = NONE,
) -> None:
    """Give a model's new adapters their first values. All ranks together, before the strategy wraps it.

    Args:
        weights: reads a weight of the base, whole, on the CPU.
        new: tokens that the base has no rows for.
        adapter: the folder of the adapter that the training continues from.
        resumed: the checkpoint that follows, which has the values of what is trained.

    Raises:
        UserError: the adapter does not fit, or a weight cannot be read.
    """
    _copy_modules(model, weights, new)  # for a resumed run, too: they are float32 only from here on
    if resumed:
        if config.subtracts_start or config.new_adapter:
            frozen_adapter.put_below(model, frozen_adapter.saved_below(model, resumed))
        return
    # peft has taken the magnitudes from a quantised base, which is whole here; what is in shards may be no more than shapes.
    magnitudes = config.use_dora and config.method == "lora"
    if config.init_lora_weights not in WITHOUT_WEIGHTS or magnitudes:
        _from_base(model, config, weights, magnitudes=magnitudes)
    if config.init_lora_weights == "gaussian":
        set_seed(config.seed)
        for layer in adapted_layers(model).values():
            layer.reset_lora_parameters("default", "gaussian")
    if config.subtracts_start:
        frozen_adapter.put_below(model, frozen_adapter.opposite(model))
    if adapter and config.new_adapter:
        frozen_adapter.put_below(model, frozen_adapter.saved(model, adapter))
    elif adapter:
        load_adapter(model, adapter)


def weights_of(name: str, model: torch.nn.Module | None) -> Weights:
    """Return what reads the weights of a base, from its files or from a model that a script has brought."""
    if model is not None:
        return partial(weight_in_memory, model)
    files: dict[str, Path] = {}

    def read(key: str) -> torch.Tensor:
        files.update(files or dict(files_of(name)))
        if key not in files:
            fix = "set init_lora_weights: true, and leave use_dora and modules_to_save out; or give a base with safetensors"
            raise UserError(f"the files of the base have no {key}", where=f"model_name_or_path {name}", fix=fix)
        with safe_open(files[key], "pt") as file:
            return file.get_tensor(key)

    return read


def weight_in_memory(model: torch.nn.Module, key: str) -> torch.Tensor:
    """Read a weight of a base that has its adapters.

    Raises:
        UserError: it is quantised.
    """
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    weight = getattr(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, name)
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        what = f"init_lora_weights needs {key} as it was before it was quantised, and the model in memory is quantised"
        raise UserError(what, where="model", fix="name the model in model_name_or_path alone; or leave the option out")
    return weight.detach().cpu()


def files_of(name: str) -> Iterator[tuple[str, Path]]:
    """The tensors in a base's files, with the file of each."""
    facts = find_facts(name)
    index = facts and facts.find("model.safetensors.index.json")
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index else ["model.safetensors"]
    for file in sorted(set(names)):
        if facts and (path := facts.find(file)):
            with safe_open(path, "pt") as opened:
                yield from ((key, path) for key in opened.keys())


@torch.no_grad()
def _copy_modules(model: torch.nn.Module, weights: Weights, new: NewTokens) -> None:
    """Give the copies of modules, and of rows, that are trained beside adapters their values, in float32."""
    for path, module in model.named_modules():
        own = path.removeprefix("base_model.model.")
        if isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.modules_to_save["default"].named_parameters():
                is_vocabulary = module in (model.get_input_embeddings(), model.get_output_embeddings())
                value = weights(f"{own}.{name}")
                value = new.grown(value, name) if is_vocabulary else value
                parameter.data = value.to(parameter.device, torch.float32)
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            rows, ids = module.token_adapter.trainable_tokens_delta["default"], module.token_adapter.token_indices
            rows.data = new.grown(weights(f"{own}.weight"), "weight")[ids["default"]].to(rows.device, torch.float32)


@torch.no_grad()
def _from_base(model: torch.nn.Module, config: TrainConfig, weights: Weights, *, magnitudes: bool) -> None:
    """Set the adapters' values that depend on the base's weights; each rank works on some layers."""
    state = PartialState()
    for at, (name, layer) in enumerate(adapted_layers(model).items()):
        if type(layer.get_base_layer()).__name__ == "Embedding" or getattr(layer, "parameter_name", None):
            what = f"init_lora_weights {config.init_lora_weights} on {name}, which is no linear layer"
            raise UserError(what, where="init_lora_weights", fix="set init_lora_weights: true")
        owner = at % state.num_processes
        targets = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        targets += [layer.lora_magnitude_vector["default"].weight] if magnitudes else []
        if owner == state.process_index:
            set_seed(config.seed + at)
            values = _values(layer, config, weights(f"{name}.weight").to(state.device, torch.float32))
        else:
            values = [torch.empty(target.shape, device=state.device) for target in targets]
        for target, value in zip(targets, values):
            target.data = broadcast(value.contiguous(), from_process=owner).to(target.device)
    set_seed(config.seed)


def _values(layer: LoraLayer, config: TrainConfig, weight: torch.Tensor) -> list[torch.Tensor]:
    """A and B of a layer, and the magnitudes of DoRA; `weight` is (out, in), float32."""
    kind, rank, alpha = config.init_lora_weights, layer.r["default"], layer.lora_alpha["default"]
    if layer.fan_in_fan_out:
        weight = weight.T.contiguous()
    if kind == "loftq":  # the largest part of what quantising loses, which is PiSSA's decomposition of it
        weight, kind = weight - _quantised(layer, weight), "pissa"
    start = kind if kind not in WITHOUT_WEIGHTS else True
    own = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=config.use_rslora, init_lora_weights=start)
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    adapted = Linear(plain, "default", own, r=rank, lora_alpha=alpha)
    down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    return [down, up, torch.linalg.norm(weight, dim=1)]


def _quantised(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """A weight as the base's 4 bits have it."""
    from bitsandbytes import functional

    stored = layer.get_base_layer().weight
    options = {"quant_type": stored.quant_type, "compress_statistics": stored.compress_statistics}
    packed, state = functional.quantize_4bit(weight.to(layer.get_base_layer().compute_dtype), **options)
    return functional.dequantize_4bit(packed, state).float()
