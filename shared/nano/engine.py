"""Continuous batching in one thread: requests enter and leave a decode batch of constant shape.

The HTTP side submits and cancels from any thread; the engine thread alone touches the model. Each
round admits waiting requests into free slots (one prefill each), then makes one decode step for
all slots. A request's tokens depend on its prompt, its parameters and its seed, never on the
other slots. While it is paused, which is when the model may be replaced, requests wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shared.nano.model import Float32, NanoModel
from shared.nano.sampling import SamplingParams, TokenLogprob, generator, logprobs_of, sample
from shared.nano.text import GrowingText, TextCodec, find_stop

log = logging.getLogger(__name__)


class EngineBusyError(Exception):
    """The queue of waiting requests is full; try again later."""


class EngineDeadError(Exception):
    """The engine thread met an error of its own and serves no more."""


@dataclass(frozen=True)
class Update:
    """What one request gained since its last update; the last one has a finish reason.

    `finish_reason` is stop, length, abort (cancelled) or error (the engine died).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(eq=False)
class Generation:
    """A request inside the engine. Only the engine thread changes it, except for `cancelled`."""

    prompt: list[int]
    params: SamplingParams
    rng: np.random.Generator
    growing: GrowingText
    on_update: Callable[[Update], None]
    streams: bool
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    sent_tokens: int = 0
    sent_text: int = 0
    cancelled: bool = False


class Engine:
    """Owns the model and its thread. `submit` never blocks."""

    def __init__(
        self,
        model: NanoModel,
        codec: TextCodec,
        *,
        eos_ids: tuple[int, ...],
        max_waiting: int,
    ) -> None:
        """`eos_ids`: the tokenizer's own first, whose stop reason is null as in vLLM."""
        self._model, self._codec, self._eos = model, codec, eos_ids
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}
        # Prompts of the running slots, with the logits that followed them. (A free slot's memory
        # is scratch: decode steps write to its first position.)
        self._held: dict[int, tuple[list[int], Float32]] = {}
        self._changed = threading.Condition()
        self._closing = self._dead = self._paused = False
        self._absent = _absent(model, codec)
        self._thread = threading.Thread(target=self._run, name="nano-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._dead

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_update: Callable[[Update], None],
        *,
        choice: int = 0,
        streams: bool = False,
    ) -> Generation:
        """Queue a request. `on_update` is called in the engine thread, once unless `streams`.

        The caller has checked that 1 <= len(prompt) and len(prompt) + max_tokens <= max_len.
        Raises EngineBusyError or EngineDeadError.
        """
        growing = GrowingText(self._codec, prompt, skip_special_tokens=params.skip_special_tokens)
        rng = generator(params.seed, choice)
        generation = Generation(prompt, params, rng, growing, on_update, streams)
        with self._changed:
            if self._dead or self._closing:
                raise EngineDeadError
            if len(self._waiting) >= self._max_waiting:
                raise EngineBusyError
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Give its slot back at the next round; a finished request is left as it is."""
        generation.cancelled = True

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Admit no more requests; returns when those under way have ended."""
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: self._dead or not self._running)

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def replace(self, model: NanoModel) -> None:
        """Go on with another model of the same shape. Only while it is paused."""
        with self._changed:
            assert self._paused
            assert not self._running
            self._model, self._absent = model, _absent(model, self._codec)

    def close(self) -> None:
        """Stop the thread; requests under way end with reason abort."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        reason = "abort"
        try:
            while self._wait_for_work():
                self._admit()
                self._step()
        except Exception:
            log.exception("the nano engine died")
            reason = "error"
        with self._changed:
            self._dead = True
            self._changed.notify_all()
            left = [*self._running.values(), *self._waiting]
            self._waiting.clear()
        for generation in left:
            self._send(generation, reason, None)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closing or self._running or (self._waiting and not self._paused)):
                self._changed.notify_all()  # whoever waits for a pause
                self._changed.wait()
            return not self._closing

    def _admit(self) -> None:
        for slot in [slot for slot, gen in self._running.items() if gen.cancelled]:
            self._send(self._release(slot), "abort", None)
        for slot in range(self._model.slots):
            if slot in self._running:
                continue
            # A request can end with its first token; then the slot takes the next one at once.
            while slot not in self._running:
                with self._changed:
                    if not self._waiting or self._paused:
                        return
                    generation = self._waiting.popleft()
                if generation.cancelled:
                    self._send(generation, "abort", None)
                    continue
                logits = self._prefill(slot, generation.prompt)
                self._running[slot] = generation
                self._take(slot, logits)

    def _prefill(self, slot: int, prompt: list[int]) -> Float32:
        """Logits after the prompt. A prompt that some slot still holds is copied, not recomputed:
        the samples of one problem arrive together."""
        twin = next((other for other, (held, _) in self._held.items() if held == prompt), None)
        if twin is not None:
            self._model.copy_prompt(twin, slot, len(prompt))
            logits = self._held[twin][1]
        else:
            logits = self._model.prefill(slot, prompt)
            logits[self._absent] = -np.inf
        self._held[slot] = (prompt, logits)
        return logits

    def _release(self, slot: int) -> Generation:
        del self._held[slot]
        return self._running.pop(slot)

    def _step(self) -> None:
        if not self._running:
            return
        logits = self._model.decode(
            {
                slot: (gen.token_ids[-1], len(gen.prompt) + len(gen.token_ids) - 1)
                for slot, gen in self._running.items()
            }
        )
        logits[:, self._absent] = -np.inf
        for slot in list(self._running):
            self._take(slot, logits[slot])

    def _take(self, slot: int, logits: Float32) -> None:
        """Sample this slot's next token and free the slot if that ends the request."""
        gen = self._running[slot]
        params = gen.params
        row = logits.astype(np.float64)
        token = sample(row, params, gen.rng)
        if params.logprobs is not None:
            gen.logprobs.append(logprobs_of(row, token, params.logprobs))
        gen.token_ids.append(token)

        reason: str | None = None
        stop_reason: str | int | None = None
        if not params.ignore_eos and token in self._eos:
            reason, stop_reason = "stop", None if token == self._eos[0] else token
        elif token in params.stop_token_ids:
            reason, stop_reason = "stop", token
        # The token that stops is no part of the text unless asked for.
        if reason is None or params.include_stop:
            new = gen.growing.add(token)
            gen.text += new
            found = find_stop(gen.text, len(new), params.stop) if params.stop and new else None
            if found and reason is None:
                stop, at = found
                gen.text = gen.text[: at + len(stop) if params.include_stop else at]
                reason, stop_reason = "stop", stop
        if reason is None and len(gen.token_ids) >= params.max_tokens:
            reason = "length"
        if reason is not None:
            self._release(slot)
        if reason is not None or gen.streams:
            self._send(gen, reason, stop_reason)

    def _send(self, gen: Generation, reason: str | None, stop_reason: str | int | None) -> None:
        end = len(gen.text)
        if reason is None and not gen.params.include_stop:
            # Text that may turn out to be the start of a stop string is held back.
            end -= max((len(stop) for stop in gen.params.stop), default=1) - 1
        end = max(end, gen.sent_text)
        begin, gen.sent_text = gen.sent_text, end
        tokens, gen.sent_tokens = gen.sent_tokens, len(gen.token_ids)
        gen.on_update(
            Update(
                gen.text[begin:end],
                tuple(gen.token_ids[tokens:]),
                tuple(gen.logprobs[tokens:]),
                reason,
                stop_reason,
            )
        )


def _absent(model: NanoModel, codec: TextCodec) -> npt.NDArray[np.int64]:
    """Rows of the vocabulary without a token (padding to a round size): they are never sampled."""
    return np.array([i for i in range(model.config.vocab) if i not in codec.ids], dtype=np.int64)
