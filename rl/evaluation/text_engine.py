"""An engine over any server of OpenAI's /completions that takes and gives texts, not token ids.

The context is sent as the text of its ids, and the reply is tokenised here, by the server's own
tokenizer, which has to be at hand (without it: `shared/text_policy.py`): so the prompt is rendered
as in training and L_suf counts the policy's tokens. They are not the ids that were sampled, though:
good enough to evaluate with, never to train on.

Such servers do not say which stop string ended a reply. So the server is told to stop where an
output would begin, which the policy may only write after an action, and the reply is cut here at
every fence; what is left of it is the next reply to the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl.render import Renderer
from shared.endpoints import Endpoint, Sampling
from shared.errors import EndpointError
from shared.policy import Finish, Generated

OUTPUT = "```output"


@dataclass(frozen=True, slots=True)
class _Rest:
    """What a reply still has to say after `context`, and how it ended."""

    context: str
    text: str
    finish: Finish


class TextEngine:
    """`shared.policy.Engine`, without logprobs. As deterministic as the server."""

    version = 0

    def __init__(self, endpoint: Endpoint, renderer: Renderer) -> None:
        self.endpoint, self.renderer = endpoint, renderer
        self._rest: dict[str, _Rest] = {}

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """Raises EndpointError; also for a reply without a text that was cut by its length."""
        context = self.renderer.decode(ids)
        rest = self._rest.pop(key, None)
        if rest is None or rest.context != context:
            rest = await self._ask(context, sampling, seed)
        said, finish = rest.text, rest.finish
        ends = [at + len(stop) for stop in sampling.stop if (at := said.find(stop)) >= 0]
        if ends:
            said, finish = said[: min(ends)], "stop"
            self._rest[key] = _Rest(context + said, rest.text[len(said) :], rest.finish)
        made = self._encode(said)
        if finish == "eos":
            made = [*made, self.renderer.eos]
        if len(made) > sampling.max_tokens:
            made, finish = made[: sampling.max_tokens], "length"
            self._rest.pop(key, None)
        if not made:
            raise EndpointError(
                "The server sent no text and no end.",
                kind="bad_reply",
                retryable=True,
                where=self.endpoint.config.base_url,
            )
        return Generated(tuple(made), None, finish, self.version)

    async def release(self, key: str) -> None:
        self._rest.pop(key, None)

    async def _ask(self, context: str, sampling: Sampling, seed: int) -> _Rest:
        stop = (OUTPUT,) if sampling.stop else ()
        asked = sampling.model_copy(update={"stop": stop, "include_stop": False})
        reply = await self.endpoint.complete(context, asked, seed=seed, return_token_ids=None)
        return _Rest(context, reply.text, "length" if reply.finish_reason == "length" else "eos")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.renderer.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids
