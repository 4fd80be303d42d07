"""An engine in this process: continuous batching of any causal LM of transformers, on torch alone.

Contract.
- A reply depends on the weights, the arguments of the call and the earlier calls of its key, and
  on nothing else: not on which other sequences are in the batch, in which slot, since when, or how
  long a tool took. Ids and logprobs are the same bits (one machine, one number of threads).
- A key holds its slot, with all keys and values computed for it, from its first call until it is
  released: the next call of an episode reads only what is new, and backtracking drops what is no
  longer there. A first call waits for a slot; so nobody may hold one key while waiting for another.
- The event loop is never blocked: one thread owns the model, and makes one step for all sequences
  under way while tools run.
- New weights are taken between calls, never within one; what was computed with the old ones is
  dropped. Every reply names the version of the weights that sampled all of it.

The keys of one group often begin with the same prompt. Its keys and values are computed once and
copied, which gives the bits that computing them again would give.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl.rollout.fused import Fused
from rl.rollout.memory import Memory
from rl.rollout.plain import Plain
from rl.rollout.sampling import draw
from rl.weight_sync import Target, checksum
from shared.endpoints.config import Sampling
from shared.errors import EndpointError
from shared.policy import Finish, Generated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Request:
    """A call under way. Only the engine's thread changes it."""

    key: str
    ids: list[int]
    sampling: Sampling
    random: Random
    future: asyncio.Future[Generated]
    loop: asyncio.AbstractEventLoop
    feed: int = 0  # the token that the next step reads
    made: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Slot:
    """Whose it is, and the tokens whose keys and values are in memory.

    `first`: the context that it was read from empty in one go, and `after` the logits after that.
    """

    key: str | None = None
    held: list[int] = field(default_factory=list)
    first: tuple[int, ...] = ()
    after: Tensor | None = None


class LocalEngine:
    """`shared.policy.Engine`, and a target of weights (`rl.weight_sync.Target`).

    The engine owns `model`: give it a copy, in the dtype and on the device that it is to run in.
    `eos`: the ids that end a turn. `max_len`: the longest context, prompt and response. Raises
    ConfigError for a model that it cannot run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos: Collection[int],
        slots: int = 64,
        max_len: int = 4096,
        version: int = 0,
    ) -> None:
        kind = Fused if Fused.fits(model) else Plain
        self._memory: Memory = kind(model.train(False), slots=slots, max_len=max_len)
        self._stops = _Stops(tokenizer)
        self._eos = frozenset(eos)
        self._threads = torch.get_num_threads()  # with which the memory has tried what is free
        self._slots = [_Slot() for _ in range(slots)]
        self._by_key: dict[str, int] = {}
        self._free = deque(range(slots))
        self._waiting: list[_Request] = []
        self._running: dict[int, _Request] = {}
        self._done: list[tuple[_Request, Generated]] = []
        self._version = version
        self._target = Target(model)
        self.n_generated = 0  # tokens, since the start
        # Shared with the event loop:
        self._changed = threading.Condition()
        self._inbox: deque[_Request | str] = deque()  # calls, and keys that are released
        self._paused = self._idle = False  # for an update; idle: no call is under way any more
        self._closing, self._failure = False, ""
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()

    # ---- the event loop's side -----------------------------------------------------------------

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_len(self) -> int:
        return self._memory.max_len

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """Raises EndpointError for a context that is too long, or if the engine has died."""
        if not 0 < len(ids) <= self.max_len - sampling.max_tokens:
            raise EndpointError(
                f"{len(ids)} tokens and {sampling.max_tokens} new ones do not fit.",
                kind="context_overflow",
                retryable=False,
                where=f"the local engine, whose contexts have 1 to {self.max_len} tokens",
                remedy="give the engine a longer max_len, or the episodes a shorter context",
            )
        loop = asyncio.get_running_loop()
        request = _Request(key, list(ids), sampling, Random(seed), loop.create_future(), loop)
        self._post(request)
        return await request.future

    async def release(self, key: str) -> None:
        if not self._failure:
            self._post(key)

    def close(self) -> None:
        """Stop the thread. Calls under way fail."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _post(self, item: _Request | str) -> None:
        with self._changed:
            if self._failure:
                raise self._died()
            self._inbox.append(item)
            self._changed.notify_all()

    def _died(self) -> EndpointError:
        return EndpointError(
            f"The local engine has stopped: {self._failure}",
            kind="server_error",
            retryable=False,
            remedy="see the log; start again from the last checkpoint",
        )

    # ---- new weights: `rl.weight_sync.Receiver`, for the trainer's thread ----------------------

    @property
    def dtype(self) -> torch.dtype:
        kept: torch.dtype = self._memory.dtype
        return kept

    def begin_update(self) -> None:
        with self._changed:
            self._paused = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle or self._failure)
            if self._failure:
                raise self._died()

    def update(self, name: str, tensor: Tensor) -> None:
        """Raises InputError for an unknown name or another shape."""
        self._target.take(name, tensor)

    def end_update(self, version: int) -> None:
        """Raises InputError if some weights were not given."""
        self._target.complete()
        with self._changed:
            for slot in self._slots:
                slot.held, slot.first, slot.after = [], (), None
            self._version, self._paused, self._idle = version, False, False
            self._changed.notify_all()

    def abandon_update(self, why: str) -> None:
        """The weights are neither old nor new: nothing is sampled from them."""
        with self._changed:
            self._failure = f"an update of the weights failed: {why}"
            self._closing = True
            self._changed.notify_all()

    def checksums(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in self._target.tensors.items()}

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept; 0 right after an update."""
        return sum(len(slot.held) for slot in self._slots)

    # ---- the thread's side ---------------------------------------------------------------------

    def _run(self) -> None:
        why = "it was closed"
        torch.set_num_threads(self._threads)
        try:
            while self._wait_for_work():
                self._admit()
                self._step()
                self._deliver()
        except Exception as error:
            log.exception("the local engine died")
            why = f"{type(error).__name__}: {error}"
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()
            inbox = [item for item in self._inbox if isinstance(item, _Request)]
            self._inbox.clear()
        for request in (*self._running.values(), *self._waiting, *inbox):
            _tell(request.loop, _fail, request.future, self._died())

    def _wait_for_work(self) -> bool:
        """False once it is over. Otherwise there is something to do, outside the lock."""
        with self._changed:
            while not self._closing:
                if self._paused and not self._running:
                    self._idle = True
                    self._changed.notify_all()
                elif self._inbox or self._running or self._admissible():
                    return True
                self._changed.wait()
            return False

    def _admissible(self) -> bool:
        """Only asked while nothing runs."""
        return any(r.key in self._by_key or self._free for r in self._waiting)

    def _admit(self) -> None:
        with self._changed:
            paused = self._paused
            inbox = list(self._inbox)
            self._inbox.clear()
        for item in inbox:
            if isinstance(item, _Request):
                self._waiting.append(item)
            else:
                self._release(item)
        if paused:
            return
        left = []
        for request in self._waiting:
            if request.future.cancelled():
                continue
            if request.key not in self._by_key and self._free:
                number = self._by_key[request.key] = self._free.popleft()
                # Another sequence's keys and values are no part of this one's history.
                self._slots[number].key, self._slots[number].held = request.key, []
            number = self._by_key.get(request.key, -1)
            if number < 0 or number in self._running:
                left.append(request)
            else:
                self._begin(number, request)
        self._waiting = left

    def _release(self, key: str) -> None:
        """What the slot holds stays: the next sequence may begin with the same prompt."""
        self._waiting = [r for r in self._waiting if r.key != key]
        slot = self._by_key.pop(key, None)
        if slot is not None:
            self._running.pop(slot, None)
            self._slots[slot].key = None
            self._free.append(slot)

    def _begin(self, number: int, request: _Request) -> None:
        """Bring the slot to hold all of the context but what the next step reads."""
        slot, ids = self._slots[number], request.ids
        known = min(_agree(slot.held, ids), len(ids) - 1)
        self._running[number] = request
        if known == 0:
            logits_V = self._open(number, ids)
        elif known == len(ids) - 1:
            self._keep(slot, known)
            request.feed = ids[-1]  # the step that everybody makes will read it
            return
        else:
            self._keep(slot, known)
            logits_V = self._memory.read(number, ids[known:], known)
        slot.held = list(ids)
        token, logprob = self._draw([(0, request)], logits_V[None])[0]
        self._take(number, request, token, logprob)

    def _keep(self, slot: _Slot, known: int) -> None:
        """What is behind the first `known` tokens will be overwritten."""
        del slot.held[known:]
        if known < len(slot.first):
            slot.first, slot.after = (), None

    def _open(self, number: int, ids: list[int]) -> Tensor:
        """The logits after a context of which nothing is known in this slot."""
        slot, first = self._slots[number], tuple(ids)
        twin = next((i for i, other in enumerate(self._slots) if other.first == first), None)
        if twin is None:
            slot.after = self._memory.read(number, ids, 0)
        elif twin != number:
            self._memory.copy(twin, number, len(ids))
            slot.after = self._slots[twin].after
        slot.first = first
        assert slot.after is not None
        return slot.after

    def _step(self) -> None:
        for number in [n for n, request in self._running.items() if request.future.cancelled()]:
            del self._running[number]
        if not self._running:
            return
        self._move_together()
        logits_SV = self._memory.step(
            [(n, request.feed, len(self._slots[n].held)) for n, request in self._running.items()]
        )
        running = list(self._running.items())
        for (number, request), (token, logprob) in zip(
            running, self._draw(running, logits_SV), strict=True
        ):
            self._slots[number].held.append(request.feed)
            self._take(number, request, token, logprob)

    def _move_together(self) -> None:
        """Bring what runs into the first slots, where that makes the step smaller."""
        rows = self._memory.rows(len(self._running))
        for number in [n for n in self._running if n >= rows]:
            self._swap(number, next(n for n in range(rows) if n not in self._running))

    def _swap(self, a: int, b: int) -> None:
        tokens = max(max(len(self._slots[n].held), len(self._slots[n].first)) for n in (a, b))
        self._memory.swap(a, b, tokens)
        self._slots[a], self._slots[b] = self._slots[b], self._slots[a]
        for new in (a, b):
            key = self._slots[new].key
            if key is not None:
                self._by_key[key] = new
        self._running[b] = self._running.pop(a)
        self._free = deque({a: b, b: a}.get(n, n) for n in self._free)

    def _draw(
        self, rows: Sequence[tuple[int, _Request]], logits_NV: Tensor
    ) -> list[tuple[int, float]]:
        """(token, logprob) for some rows of the logits, with the next random number of each."""
        n = len(logits_NV)
        temperature, top_k, top_p, uniform = [1.0] * n, [0] * n, [1.0] * n, [0.0] * n
        for row, request in rows:
            sampling = request.sampling
            temperature[row], top_p[row] = sampling.temperature, sampling.top_p
            top_k[row] = max(0, sampling.top_k or 0)
            uniform[row] = request.random.random()
        device, real = logits_NV.device, torch.float64
        with torch.inference_mode():
            tokens, logprobs = draw(
                logits_NV,
                torch.tensor(temperature, dtype=real, device=device),
                torch.tensor(top_k, device=device),
                torch.tensor(top_p, dtype=real, device=device),
                torch.tensor(uniform, dtype=real, device=device),
            )
        chosen, chances = tokens.tolist(), logprobs.tolist()
        return [(chosen[row], chances[row]) for row, _ in rows]

    def _take(self, number: int, request: _Request, token: int, logprob: float) -> None:
        """One more token; deliver the reply if it is the last."""
        if logprob != logprob:
            raise FloatingPointError("the model's logits are not numbers")
        request.made.append(token)
        request.logprobs.append(logprob)
        finish: Finish
        if token in self._eos:
            finish = "eos"
        elif self._stops.ends(request.made, request.sampling.stop):
            finish = "stop"
        elif len(request.made) >= request.sampling.max_tokens:
            finish = "length"
        else:
            request.feed = token
            return
        del self._running[number]
        self.n_generated += len(request.made)
        made = Generated(tuple(request.made), tuple(request.logprobs), finish, self._version)
        self._done.append((request, made))

    def _deliver(self) -> None:
        for request, made in self._done:
            _tell(request.loop, _settle, request.future, made)
        self._done.clear()


class _Stops:
    """Which token completes a stop string, found on decoded text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # the thread's own
        self._texts: dict[int, str] = {}

    def ends(self, made: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the newest token completes one of `stops` in the text of `made`.

        Few tokens can: only those that hold the stop string's last character, as far as a single
        token shows it (parts of characters beyond ASCII do not).
        """
        token = made[-1]
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._decode([token])
        for stop in stops:
            last = stop[-1]
            if (last in text or not last.isascii()) and stop in self._decode(
                made[-4 * len(stop) - 4 :]  # a character has at most four bytes, hence tokens
            ):
                return True
        return False

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _tell(loop: asyncio.AbstractEventLoop, what: object, *args: object) -> None:
    """Call something in an event loop; a loop that is gone has nobody waiting."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(what, *args)  # type: ignore[arg-type]


def _settle(future: asyncio.Future[object], value: object = None) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[object], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
