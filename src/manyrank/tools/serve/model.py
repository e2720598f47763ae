"""A loaded model that completes requests."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...chat_template.types import BadRow
from .protocol import ApiError, ChatRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...chat_template.render import RenderOptions
    from ...models.generation import Completion


class ServedModel:
    """A model with the template and the stop tokens with which it was trained.

    Args:
        name: in requests.
        temperature: of requests that give none.
        max_new_tokens: most tokens of a completion; None: as many as the model's context has room for.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rendering: RenderOptions,
        *,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
    ) -> None:
        from ...chat_template.render import stop_tokens
        from ...models.generation import context_length

        self.name, self.model, self.tokenizer, self.rendering = name, model, tokenizer, rendering
        self.temperature, self.context = temperature, context_length(model.config)
        self.max_new_tokens = max_new_tokens or self.context or 2048
        self.stops = stop_tokens(tokenizer, rendering, where="the tokenizer")

    def prompt(self, request: ChatRequest) -> list[int]:
        """Render the conversation to tokens.

        Raises:
            ApiError: the template refuses it, or it leaves no room in the model's context.
        """
        from ...chat_template.render import prompt_ids

        messages = [message.message for message in request.messages]
        try:
            prompt = prompt_ids(self.tokenizer, messages, options=self.rendering)
        except BadRow as error:
            raise ApiError(str(error), param="messages") from None
        if self.context and len(prompt) >= self.context:
            what = f"the messages have {len(prompt):,} tokens, and the model's context is {self.context:,}"
            raise ApiError(what, param="messages", code="context_length_exceeded")
        return prompt

    def complete(
        self, prompt: list[int], request: ChatRequest, *, show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Completion:
        """Generate, and hand the text over in pieces.

        Args:
            show: gets each piece. stopped: asked after each token; True ends the completion there.
        """
        from ...models.generation import Sampling, stream
        from ...models.text_stream import TextStream

        seed = secrets.randbits(63) if request.seed is None else request.seed
        sampling = Sampling(
            max_new_tokens=min(request.most_tokens or self.max_new_tokens, self.max_new_tokens),
            temperature=self.temperature if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            top_k=request.top_k or 0,
            seed=seed % 2**64,
        )
        text = TextStream(self.tokenizer, show, stops=self.stops, stop_strings=request.stop)
        completion = stream(
            self.model,
            prompt,
            sampling=sampling,
            stops=self.stops,
            pad_token=self.tokenizer.pad_token_id,
            streamer=text,
            stopped=lambda: text.stopped or stopped(),
        )
        return replace(completion, finish="stop") if text.stopped else completion
