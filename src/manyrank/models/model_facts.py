"""Facts from a base model's small files, before it is loaded: JSON only, no torch, no network.

    config.json             architecture, layers, vocabulary, positions, quantisation
    generation_config.json  which tokens end an answer         tokenizer_config.json, chat_template.*, tokenizer.json
    *.safetensors           names of the weights, from their headers

A hub name that is not in the local cache has no facts, and what depends on them is found by the run.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..project_files import EMBEDDED
from ..runs.mapping_files import read_json_object
from .spec import ConfigReader
from .tiny import default_folder

# Layers in which the bounds of documents hold: attention looks at them, and nothing else mixes tokens.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HEADER_LIMIT = 100 << 20  # bytes; safetensors allows no longer header


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """The files of one base model.

    Attributes:
        name: as the recipe has it.
        find: a file's path by its name; None where it is not here.
    """

    name: str
    find: Callable[[str], Path | None]

    def place(self, file: str) -> str:
        return f"{self.name}, {file}"

    @cached_property
    def whole(self) -> dict[str, Any]:
        """config.json."""
        return self._json("config.json")

    @cached_property
    def get(self) -> ConfigReader:
        return ConfigReader(self.whole, self.place("config.json"))

    @property
    def config(self) -> dict[str, Any]:
        """config.json, for a model of several parts that of its text."""
        return self.get.config

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self._json("generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self._json("tokenizer_config.json")

    @property
    def model_type(self) -> str:
        return str(self.whole.get("model_type", ""))

    @property
    def dtype(self) -> str:
        """Type of the weights, as config.json has it: bfloat16, float16, float32; empty where it does not say."""
        return str(self.get("dtype", "torch_dtype", default="")).removeprefix("torch.")

    @property
    def layers(self) -> int | None:
        return self.get("num_hidden_layers", "n_layer")

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for, stretched as its rope says."""
        most = self.get("max_position_embeddings", "n_positions")
        rope = _mapping(self.get("rope_parameters", "rope_scaling"))
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if isinstance(factor, int | float) and (original or rope.get("type", rope.get("rope_type")) != "default"):
            # Some write the stretched number into max_position_embeddings, some the original one.
            most = max(most or 0, int((original or most or 0) * factor))
        return most

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Sizes of query heads, value heads, and heads that some layers have instead; empty where the files do not say."""
        get = self.get
        if get("kv_lora_rank") and get("v_head_dim"):  # latent attention
            return (get("qk_nope_head_dim") or 0) + (get("qk_rope_head_dim") or 0), get("v_head_dim")
        heads = get("num_attention_heads", "n_head")
        width = get("head_dim") or (heads and (get("hidden_size", "n_embd") or 0) // heads)
        others = [get("global_head_dim")] if get("global_head_dim") else []
        return (width, get("v_head_dim") or width, *others) if width else ()

    @property
    def experts(self) -> int:
        return max(int(self.config.get(key) or 0) for key in EXPERTS)

    @property
    def quantisation(self) -> dict[str, Any]:
        """Quantisation of the weights in the files; empty for 16 or 32 bits."""
        return _mapping(self.whole.get("quantization_config"))

    @property
    def ties_embeddings(self) -> bool:
        if (tied := self.whole.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))) is not None:
            return bool(tied)
        return bool(self.weights) and not any(weight.endswith("lm_head.weight") for weight in self.weights)

    @property
    def template(self) -> str | None:
        """The tokenizer's own chat template; of several the one called default."""
        if file := self.find("chat_template.jinja"):
            return file.read_text(encoding="utf-8")
        own = self._json("chat_template.json").get("chat_template") or self.tokenizer.get("chat_template")
        if isinstance(own, list):
            return next((entry["template"] for entry in own if entry.get("name") == "default"), None)
        return own

    @property
    def has_template(self) -> bool:
        return any(map(self.find, ("chat_template.jinja", "chat_template.json"))) or bool(
            self.tokenizer.get("chat_template")
        )

    def has_template_named(self, name: str) -> bool:
        """Return whether a recipe may choose a template by this name, beside the one that is used."""
        stored = self.tokenizer.get("chat_template")
        named = [entry.get("name") for entry in stored] if isinstance(stored, list) else []
        return name in named or self.find(f"additional_chat_templates/{name}.jinja") is not None

    # Tokens

    @cached_property
    def _tokens(self) -> dict[str, int]:
        """Every token with its id; empty without a tokenizer.json."""
        vocabulary = _mapping(self._tokenizer_file.get("model")).get("vocab") or {}
        if isinstance(vocabulary, list):
            vocabulary = {token[0]: number for number, token in enumerate(vocabulary)}
        return {**vocabulary, **self.added_tokens}

    def has_token(self, text: str) -> bool:
        """Return whether the tokenizer has a token of this very text."""
        return text in self._tokens

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens are known here."""
        return bool(self._tokens)

    @property
    def next_id(self) -> int:
        """The id that a token gets which the files do not number."""
        return max(self._tokens.values()) + 1

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        return {token["content"]: token["id"] for token in self._tokenizer_file.get("added_tokens") or []}

    def special(self, name: str) -> str | None:
        """A special token's text: eos_token, bos_token, pad_token."""
        token = self.tokenizer.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def beyond_vocabulary(self, template: str | None) -> list[str]:
        """Tokens that a run uses, and that the model has no embedding for."""
        size = self.config.get("vocab_size")
        if not self._tokens or not size:
            return []
        used = {self.special(name) for name in ("bos_token", "eos_token", "pad_token")} - {None}
        used |= {token for token in self.added_tokens if token in (template or "")}
        return sorted(token for token in used if self._tokens.get(token, self.next_id) >= size)

    def stops(self) -> set[str]:
        """The texts of the tokens that end an answer: for the tokenizer, and for whatever generates."""
        ids = self.generation.get("eos_token_id", self.config.get("eos_token_id"))
        numbers = set(ids if isinstance(ids, list) else [ids])
        texts = {text for text, number in self._tokens.items() if number in numbers}
        return texts | ({self.special("eos_token")} - {None})

    # Weights

    @cached_property
    def weights(self) -> frozenset[str]:
        """The names of the weights; empty where no safetensors file is here."""
        if self.find("model.safetensors.index.json"):
            return frozenset(self._json("model.safetensors.index.json").get("weight_map") or {})
        file = self.find("model.safetensors")
        return frozenset(read_header(file)) - {"__metadata__"} if file else frozenset()

    def headers(self) -> dict[str, list[int]]:
        """The shapes of the weights, by name; empty where not all files are here."""
        index = self._json("model.safetensors.index.json").get("weight_map") or {}
        files = [self.find(name) for name in sorted(set(index.values()) or {"model.safetensors"})]
        heads = [read_header(file) for file in files if file]
        if len(heads) != len(files):
            return {}
        return {name: entry["shape"] for head in heads for name, entry in head.items() if "shape" in entry}

    def has_module(self, target: str) -> bool:
        """Return whether an adapter's target is a module that has weights; peft compares the end of the whole name."""
        modules = (weight.rpartition(".")[0] for weight in self.weights)
        return any(module == target or module.endswith(f".{target}") for module in modules)

    def mixing(self) -> Iterator[str]:
        """Name what mixes tokens in a way that packing cannot hold apart, as far as the files tell."""
        kinds = {str(kind) for kind in self.config.get("layer_types") or []} - ATTENTION_LAYERS
        yield from (f"{kind} layers" for kind in sorted(kinds))
        if "auto_map" not in self.whole and not _takes_attention(self.model_type):
            yield "no pluggable attention"

    @cached_property
    def _tokenizer_file(self) -> dict[str, Any]:
        return self._json("tokenizer.json")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.find(name)
        return read_json_object(file, fix="give the files of a whole model") if file else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def find_facts(name: str) -> ModelFacts | None:
    """The facts of a folder, of a hub name in the cache, or of the embedded model once it is made."""
    folder = default_folder() if name == EMBEDDED else Path(name).expanduser()
    if folder.is_dir():
        facts = ModelFacts(name, lambda file: folder / file if (folder / file).is_file() else None)
    elif name == EMBEDDED or name.startswith((".", "/", "~")):
        return None
    else:
        facts = ModelFacts(name, lambda file: _cached(name, file))
    return facts if facts.find("config.json") else None


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file_path = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(file_path) if isinstance(file_path, str) else None


def read_header(file: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file; empty where it is none."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            return json.loads(stream.read(length)) if length < HEADER_LIMIT else {}
        except ValueError:
            return {}


@lru_cache
def _takes_attention(model_type: str) -> bool:
    """Return whether the installed transformers takes other attention functions for this kind of model.

    The class says so in its source, which is read and not imported: that would take seconds. True where there is none
    of that name; the run looks at the class itself.
    """
    package = importlib.util.find_spec("transformers")
    name = model_type.replace("-", "_")
    if not package or not re.fullmatch(r"\w+", name):
        return True
    file = Path(package.origin).parent / "models" / name / f"modeling_{name}.py"
    return not file.is_file() or bool(
        re.search(r"_supports_attention_backend\s*=\s*True", file.read_text(encoding="utf-8"))
    )
