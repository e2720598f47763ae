"""Options that the commands for trained models share: how a model is loaded, and how its completions are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .args import Options, arg
from .value_types import Float, Int

Count = Annotated[Int, Field(gt=0)]
OptionalCount = Annotated[Int | None, Field(gt=0)]


class ModelOptions(Options):
    """How the model is loaded."""

    quantization: Literal["4bit", "8bit"] | None = arg(None, "load the base in 4bit or 8bit")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = arg("auto", "type of the computation")
    chat_template: str | None = arg(None, "a Jinja file, or a name such as chatml (default: the model's own)")
    trust_remote_code: bool = arg(False, "run code that comes with the model")

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `models.inference.load_model`."""
        return self.model_dump(include=set(ModelOptions.model_fields))


class SamplingOptions(Options):
    """How completions are sampled."""

    max_new_tokens: Count = arg(256, "most tokens of a completion")
    temperature: Float = arg(0.0, "0 (default): always the most likely token", ge=0)
    top_p: Float = arg(1.0, "draw from the tokens that have this much probability", gt=0, le=1)
    top_k: Int = arg(0, "draw from the K most likely tokens (default: 0, from all)", ge=0)
    seed: Int = arg(0, "seed of the draws (default: 0)", ge=0, lt=2**32)

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `models.generation.Sampling`."""
        return self.model_dump(include=set(SamplingOptions.model_fields))
