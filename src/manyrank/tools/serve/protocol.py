"""Requests, answers and errors in the form of OpenAI's chat completions. No torch.

A parameter that the server does not know is refused, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...chat_template.types import Message

# Parameters that change no completion, and the values with which others change none.
NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logprobs": [False],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        param: the parameter that is wrong.
        code: a word for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as the API writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# Requests


def _without_nulls(value: Any) -> Any:
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


def _in_list(value: Any) -> Any:
    return [value] if value and isinstance(value, str) else value or []


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(_Part):
    """A part of a message; pictures and sound are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
    name: str | None = None
    reasoning_content: str | None = None

    @property
    def message(self) -> Message:
        """The message as chat templates know it."""
        text = "\n".join(part.text for part in self.content)
        values = {"content": text, "name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": "system" if self.role == "developer" else self.role, **_without_nulls(values)}


class StreamOptions(_Part):
    """What a stream has beside the text."""

    include_usage: bool = False


class ChatRequest(_Part):
    """A request; what it leaves out is None."""

    model: str | None = None  # the one that is served
    messages: list[Annotated[ChatMessage, BeforeValidator(_without_nulls)]] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_in_list)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the completion, under its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON, or a parameter is missing, wrong or not known.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ApiError("the body is no JSON object")
    given = {key: value for key, value in _without_nulls(given).items() if key not in NOTES}
    for key, neutral in NEUTRAL.items():
        if key in given and (value := given.pop(key)) not in neutral:
            raise ApiError(f"{key} {json.dumps(value)[:80]} is not supported", param=key, code="unsupported_value")
    if "stream_options" in given and given.get("stream") is not True:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    try:
        return ChatRequest(**given)
    except ValidationError as invalid:
        problem = invalid.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    what = "not known" if problem["type"] == "extra_forbidden" else problem["msg"]
    raise ApiError(f"{place}: {what}", param=str(problem["loc"][0]))


# Answers


def model_card(name: str, created: int) -> dict[str, Any]:
    """The entry of a model in the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "manyrank"}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The counts of tokens; the token that ends a completion is not counted."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Reply:
    """Answers to one request, whole or in chunks.

    Args:
        model: the name of the model.
        chunk_fields: what every chunk has beside its text.
    """

    def __init__(self, model: str, **chunk_fields: Any) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.chunk_fields = chunk_fields

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": counts}

    def chunk(self, *, finish: str | None = None, **delta: str) -> dict[str, Any]:
        """A piece of the answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **self.chunk_fields}

    def last_chunk(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk with the counts, after the answer."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": counts}
