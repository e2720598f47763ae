"""Options of `manyrank serve`."""

from __future__ import annotations

import os
from typing import Literal

from ...config.args import arg, word
from ...config.model_options import ModelOptions, OptionalCount
from ...config.value_types import Float, Int

API_KEY = "MANYRANK_API_KEY"


class ServeOptions(ModelOptions):
    """Serve a model to clients of OpenAI's API."""

    name: str = word(..., "a run's folder, a checkpoint, an adapter, a model's folder or a hub name")
    host: str = arg("127.0.0.1", "address to listen at; 0.0.0.0 for other machines")
    port: Int = arg(8000, "port; 0: a free one", ge=0, lt=2**16)
    api_key: str = arg("", f"key that requests must bear (default: the variable {API_KEY}, or none)")
    served_model_name: str = arg("", "name of the model in requests (default: that of the run or the folder)")
    backend: Literal["auto", "vllm", "transformers"] = arg("auto", "what generates; auto: vllm where it is installed")
    temperature: Float = arg(0.0, "of requests that give none; 0 (default): always the most likely token", ge=0)
    max_new_tokens: OptionalCount = arg(None, "most tokens of a completion (default: the room in the context)")

    @property
    def key(self) -> str:
        """The key, from the command line or the environment."""
        return self.api_key or os.environ.get(API_KEY, "")
