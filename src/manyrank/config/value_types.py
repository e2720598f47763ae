"""Types of a recipe's values: what pydantic reads a value of YAML or of the command line as."""

from __future__ import annotations

import difflib
import re
from datetime import date
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from ..topology.strategies import STRATEGIES

Role = Literal["system", "user", "assistant", "tool"]
Task = Literal["sft", "grpo"]
Method = Literal["full", "lora", "qlora", "int8", "fp8"]
FORMATS = (
    "auto",
    "question_answer",
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "text",
    "tokens",
)
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
Optimizer = Literal[
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "muon",
    "sgd",
]


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a yes/no value is not a number")
    if str(value).strip().lower().lstrip("+-") in ("inf", "infinity", "nan", ".inf", ".nan"):
        raise ValueError("not a finite number")
    return value


def _role(value: Any) -> Any:
    """Read a role as ShareGPT calls it."""
    return {"human": "user", "gpt": "assistant", "observation": "tool"}.get(str(value), value)


def listed(value: Any) -> Any:
    """Read a string as a list: YAML in brackets, or items between commas."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [item for item in value.split(",") if item]
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError("not a list like [a, b]") from None


def _mapped(value: Any) -> Any:
    """Read YAML text, as on the command line, as a mapping."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError("not a mapping like {a: b}") from None


def _arguments(value: Any) -> Any:
    """Read transformers' text "a=b,c=d" as a mapping, too."""
    if isinstance(value, str) and "=" in value and not value.startswith("{"):
        pairs = [item.partition("=")[::2] for item in value.split(",")]
        value = {name.strip(): _mapped(text) for name, text in pairs}
    value = _mapped(value)
    return {key: _figure(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _figure(value: Any) -> Any:
    """Read 1e-3, which is text in YAML, as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _parts(value: Any) -> Any:
    """The lm_head was called head; old recipes still say so."""
    items = listed(value)
    return ["lm_head" if item == "head" else item for item in items] if isinstance(items, list) else items


def _dates_as_text(value: Any) -> Any:
    """Turn the dates that YAML makes back into text."""
    if isinstance(value, dict):
        return {key: _dates_as_text(inner) for key, inner in value.items()}
    return value.isoformat() if isinstance(value, date) else value


def as_sources(value: Any) -> Any:
    """Read one path, or text in brackets as a YAML list of paths and sources."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        value = _mapped(value)
    return [value] if isinstance(value, str | dict) else value


def _steps(value: float) -> float | int:
    """Read a number of steps, or a share of the run's."""
    if value >= 1 and value != int(value):
        raise ValueError("it is neither a number of steps nor a share of them below 1")
    return int(value) if value >= 1 else value


def _part(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("it is neither a share below 1 nor a number of examples")
    return value


def _layers(value: Any) -> Any:
    """Read a yes/no value as all layers or none."""
    text = str(value).strip().lower()
    return {"true": "full", "yes": "full", "on": "full", "false": "off", "no": "off"}.get(text, text)


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


def _format(value: str) -> str:
    if value not in FORMATS and not (":" in value and all(part for part in value.split(":", 1))):
        own = (
            "rows of another shape: columns: {question: NAME, answer: NAME}, or module:function, which returns messages"
        )
        raise ValueError(f"it is none of {', '.join(FORMATS)}, nor module:function ({own})")
    return value


def _strategy(value: str) -> str:
    if value not in STRATEGIES:
        close = difflib.get_close_matches(value, STRATEGIES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"it is none of auto, {', '.join(STRATEGIES)}{hint}")
    return value


def _vllm(value: Any) -> Any:
    """Read a yes/no value as a vLLM on the training's GPUs, or none."""
    text = str(value).strip().lower()
    return {"true": "colocate", "yes": "colocate", "on": "colocate", "false": "off", "no": "off"}.get(text, text)


def _cache(value: Any) -> Any:
    """Read a yes/no value as auto or off; a folder in the working directory is written as ./NAME."""
    text = str(value).strip()
    known = {"auto": "auto", "true": "auto", "yes": "auto", "on": "auto", "off": "off", "false": "off", "no": "off"}
    if text.lower() not in known and "/" not in text and text != "~":
        raise ValueError(f"a folder in the working directory is written as ./{text or 'NAME'}")
    return known.get(text.lower(), text)


def _off(value: Any) -> Any:
    """Read no and false as off."""
    return "off" if str(value).strip().lower() in ("off", "no", "false") else value


def _saves(value: Any) -> Any:
    """Read a number of steps, and none or no as off."""
    text = str(value).strip().lower()
    return {"auto": "auto", **dict.fromkeys(("off", "no", "none", "null", "false", "0"), "off")}.get(text) or _number(
        value
    )


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


def _tag(value: str) -> str:
    if not 1 <= len(value) <= 64 or "," in value:
        raise ValueError("a tag has 1 to 64 characters, and no comma")
    return value


def _initial(value: Any) -> str:
    """Read peft's name of how adapters start; as text, also for true."""
    text = str(value).strip().lower()
    if not re.fullmatch(r"true|gaussian|orthogonal|eva|pissa(_niter_[1-9]\d*)?|olora|loftq", text):
        raise ValueError("it is none of true, gaussian, orthogonal, eva, pissa, pissa_niter_N, olora, loftq")
    return text


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, int) else listed(value)


def _metric(value: str) -> str:
    """Read the name of a metric of the validation, as transformers does, also without its prefix."""
    return value if value.startswith("eval_") else f"eval_{value}"


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Part = Annotated[Float, AfterValidator(_part)]
Strings = Annotated[list[str], BeforeValidator(listed)]
Tags = Annotated[list[Annotated[str, AfterValidator(_tag)]], BeforeValidator(listed)]
Layers = Annotated[Literal["auto", "off", "full"] | Annotated[int, Field(ge=0)], BeforeValidator(_layers)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Patterns = Annotated[list[Pattern], BeforeValidator(listed)]
Numbers = Annotated[list[Annotated[Int, Field(ge=0)]], BeforeValidator(_one_as_list)]
Tokens = Annotated[
    Numbers | dict[str, Numbers], BeforeValidator(lambda value: _mapped(value) if "{" in str(value) else value)
]
Ranks = Annotated[dict[Pattern, Annotated[Int, Field(gt=0)]], BeforeValidator(_mapped)]
Alphas = Annotated[dict[Pattern, Annotated[Float, Field(gt=0)]], BeforeValidator(_mapped)]
InitialWeights = Annotated[str, BeforeValidator(_initial)]
Steps = Annotated[Int | Float, Field(gt=0), AfterValidator(_steps)]
Warmup = Annotated[Int | Float, Field(ge=0), AfterValidator(_steps)]
EachEpoch = Literal["epoch"] | Steps
EvalSteps = Annotated[Literal["epoch", "off"] | Steps | None, BeforeValidator(_off)]
SaveSteps = Annotated[Literal["auto", "off", "epoch"] | Steps, BeforeValidator(_saves)]
MicroBatch = Literal["auto"] | Annotated[Int, Field(gt=0)]
Roles = Annotated[list[Annotated[Role, BeforeValidator(_role)]], Field(min_length=1), BeforeValidator(listed)]
Cache = Annotated[str, BeforeValidator(_cache)]
Vllm = Annotated[Literal["off", "colocate", "server"], BeforeValidator(_vllm)]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Parts = Annotated[list[Literal["lm_head", "lora", "attention", "norm", "mlp", "rope"]], BeforeValidator(_parts)]
Mapping = Annotated[dict[str, Any], BeforeValidator(lambda value: _dates_as_text(_mapped(value)))]
Arguments = Annotated[dict[str, Any], BeforeValidator(_arguments)]
Columns = Annotated[dict[str, str], BeforeValidator(_mapped)]
Format = Annotated[str, AfterValidator(_format)]
Strategy = Annotated[str, AfterValidator(_strategy)]
StrategyOrAuto = Annotated[Strategy | None, BeforeValidator(_auto)]
Metric = Annotated[str, AfterValidator(_metric)]
