"""An engine behind HTTP: vLLM, or nano's server, by token ids.

The server has to speak vLLM's token-id prompts, `return_token_ids` and `logprobs`. New weights go
another way: transfer.py.

vLLM tells log-probabilities at temperature 1 and before top-k and top-p (its default). So they are
passed on only where that is the distribution that was sampled from; elsewhere there are none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shared.endpoints import Completion, Endpoint, Sampling
from shared.errors import EndpointError
from shared.policy import Finish, Generated


class HttpEngine:
    """`shared.policy.Engine`. `eos`: the ids that end a turn. Batches freely: not deterministic."""

    def __init__(self, endpoint: Endpoint, *, eos: Collection[int], version: int = 0) -> None:
        self.endpoint, self.eos, self.version = endpoint, frozenset(eos), version

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """Raises EndpointError; also where the server sends no ids, or not as many logprobs."""
        while True:
            version = self.version
            reply = await self.endpoint.complete(ids, sampling, seed=seed, logprobs=0)
            if reply.finish_reason != "abort":  # by somebody who pauses the server without waiting
                break
        made, logprobs = reply.token_ids, reply.logprobs
        if not made or (logprobs is not None and len(logprobs) != len(made)):
            raise EndpointError(
                f"The server sent {len(made or ())} token ids with {len(logprobs or ())} logprobs.",
                kind="bad_reply",
                retryable=False,
                where=self.endpoint.config.base_url,
                remedy="use vLLM or nano: ids of what was sampled are needed, not its text alone",
            )
        plain = (
            sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k in (None, 0, -1)
        )
        return Generated(made, logprobs if plain else None, self._finish(made, reply), version)

    def _finish(self, made: Sequence[int], reply: Completion) -> Finish:
        """Servers say "stop" for a stop string and for every token that ends a text."""
        if made[-1] in self.eos:
            return "eos"
        if reply.finish_reason == "length":
            return "length"
        return "stop" if isinstance(reply.stop_reason, str) else "eos"

    async def release(self, key: str) -> None:
        """The server's own cache of prefixes needs no telling."""
