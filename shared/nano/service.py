"""A loaded nano model as the routes see it: prompts in, choices out, cancelled if unwanted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from shared.errors import InputError
from shared.nano.engine import Engine, EngineDeadError, Generation, Update
from shared.nano.model import NanoModel, read_json
from shared.nano.protocol import ApiError, ChatRequest, TokenizeChat
from shared.nano.sampling import SamplingParams, TokenLogprob
from shared.nano.text import TextCodec

SLOTS = 32  # rows of the decode batch; its shape never changes
MAX_WAITING = 1024  # further requests get 503 and may retry


@dataclass
class Choice:
    """One choice as gathered so far."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason


class Batch:
    """The choices of one request under way in the engine.

    Submitted at once, so that a full queue is known before a reply begins.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        params: SamplingParams,
        choices: int,
        *,
        streams: bool,
    ) -> None:
        """Raises EngineBusyError or EngineDeadError. Needs a running event loop."""
        self._engine, self._choices = engine, choices
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._generations: list[Generation] = []
        try:
            for index in range(choices):
                self._generations.append(
                    engine.submit(
                        prompt, params, self._receiver(index), choice=index, streams=streams
                    )
                )
        except Exception:
            self.cancel()
            raise

    def _receiver(self, index: int) -> Callable[[Update], None]:
        def receive(update: Update) -> None:
            # A closed loop means that the server is gone and nobody waits for this.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return receive

    def cancel(self) -> None:
        for generation in self._generations:
            self._engine.cancel(generation)

    async def updates(self) -> AsyncGenerator[tuple[int, Update]]:
        """Updates of all choices as they come. EngineDeadError if the engine stops meanwhile."""
        unfinished = self._choices
        while unfinished:
            index, update = await self._updates.get()
            if update.finish_reason in ("abort", "error"):
                raise EngineDeadError
            unfinished -= update.finish_reason is not None
            yield index, update

    async def gather(self) -> list[Choice]:
        gathered = [Choice() for _ in range(self._choices)]
        async for index, update in self.updates():
            gathered[index].add(update)
        return gathered

    async def complete(self, request: Request) -> list[Choice]:
        """All choices, whole. A client that disconnects meanwhile cancels them."""
        working = asyncio.create_task(self.gather())
        leaving = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ApiError(499, "client closed the request", kind="ClientClosedRequest")
            return working.result()
        finally:
            self.cancel()
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class NanoService:
    """A model folder, its engine, and the checks that come before it."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises InputError if the folder is not a Qwen3 model with a tokenizer."""
        self.name, self.created = name, int(time.time())
        self.codec = TextCodec(folder)
        path = folder / "generation_config.json"
        self.defaults = read_json(path) if path.exists() else {}
        self.model = NanoModel(folder, slots=SLOTS)
        named = self.defaults.get("eos_token_id")
        listed = named if isinstance(named, list) else [named]
        # The tokenizer's end token comes first: its stop reason is null.
        eos = dict.fromkeys(i for i in (self.codec.eos_id, *listed) if i is not None)
        self.engine = Engine(self.model, self.codec, eos_ids=tuple(eos), max_waiting=MAX_WAITING)

    def load(self, folder: Path) -> None:
        """Go on with the weights in `folder`, of the same model, when what is under way has ended.

        Raises InputError for weights that cannot be used; then everything stays as it was.
        """
        model = NanoModel(folder, slots=SLOTS)
        if model.config != self.model.config:
            raise InputError("these are weights of another model", where=str(folder))
        paused = self.engine.paused
        self.engine.pause()
        self.engine.replace(model)
        self.model = model
        if not paused:
            self.engine.resume()

    @property
    def max_len(self) -> int:
        return self.model.max_len

    def submit(
        self, prompt: list[int], params: SamplingParams, choices: int, *, streams: bool
    ) -> Batch:
        if choices > 1 and params.temperature == 0:
            raise ApiError(400, f"n must be 1 when using greedy sampling, got {choices}.")
        return Batch(self.engine, prompt, params, choices, streams=streams)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404, f"The model `{name}` does not exist.", kind="NotFoundError", param="model"
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        least = self.codec.least_tokens(text)
        if least > self.max_len:
            raise self._too_long(least)
        try:
            text.encode()  # JSON can carry lone surrogates, the tokenizer cannot
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the text is not valid Unicode: {error}") from error
        return self.codec.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, body: ChatRequest | TokenizeChat) -> list[int]:
        text = self.codec.render_chat(
            body.plain_messages(),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **(body.chat_template_kwargs or {}),
        )
        return self.encode(text, add_special_tokens=body.add_special_tokens)

    def room(self, prompt: list[int], max_tokens: int | None) -> int:
        """How many tokens to generate: what is asked, as far as the context has room (as vLLM).

        ApiError if the prompt leaves room for none.
        """
        if not prompt:
            raise ApiError(400, "The prompt must contain at least one token.", param="prompt")
        unknown = [i for i in prompt if not 0 <= i < self.model.config.vocab]
        if unknown:
            raise ApiError(400, f"Token id {unknown[0]} is out of vocabulary", param="prompt")
        left = self.max_len - len(prompt)
        if left < 1:
            raise self._too_long(len(prompt))
        return min(max_tokens or left, left)

    def _too_long(self, prompt: int) -> ApiError:
        return ApiError(
            400,
            f"This model's maximum context length is {self.max_len} tokens. However, your prompt "
            f"contains at least {prompt} input tokens, which leaves no room for output. Please "
            "reduce the length of the input prompt.",
            param="input_tokens",
        )
