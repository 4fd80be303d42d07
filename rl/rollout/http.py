"""An engine behind HTTP: vLLM, or nano's server, by token ids.

The server has to speak vLLM's token-id prompts, `return_token_ids` and `logprobs`. New weights
travel through a folder that both can read: they are written there as Hugging Face files, and the
server is told to load them (`/pause`, `/collective_rpc reload_weights`, `/reset_prefix_cache`,
`/resume`; vLLM has these with VLLM_SERVER_DEV_MODE=1, nano's server with --dev).

vLLM tells log-probabilities at temperature 1 and before top-k and top-p (its default). So they are
passed on only where that is the distribution that was sampled from; elsewhere there are none.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import httpx2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.weight_sync import checksum
from shared.endpoints import Endpoint, Sampling
from shared.errors import EndpointError
from shared.policy import Generated

RELOAD_SECONDS = 600.0
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model folder, beside its weights


class HttpEngine:
    """`shared.policy.Engine`. `eos`: the ids that end a turn. Batches freely: not deterministic."""

    def __init__(self, endpoint: Endpoint, *, eos: Collection[int], version: int = 0) -> None:
        self.endpoint, self.eos, self.version = endpoint, frozenset(eos), version

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        """Raises EndpointError; also where the server sends no ids, or not as many logprobs."""
        version = self.version
        reply = await self.endpoint.complete(ids, sampling, seed=seed, logprobs=0)
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
        if made[-1] in self.eos:
            finish = "eos"
        else:
            finish = "length" if reply.finish_reason == "length" else "stop"
        return Generated(made, logprobs if plain else None, finish, version)  # type: ignore[arg-type]

    async def release(self, key: str) -> None:
        """The server's own cache of prefixes needs no telling."""


class HttpReceiver:
    """`rl.weight_sync.Receiver` of such a server. `model` is the folder that it was started with.

    `save_to` is a folder that the server can read; two copies of the weights take turns in it.
    Blocks; raises EndpointError where the server does not do what it is told.
    """

    dtype: torch.dtype | None = None  # as they come

    def __init__(self, engine: HttpEngine, model: Path, save_to: Path) -> None:
        self.engine, self.model, self.save_to = engine, model, save_to
        self._taken: dict[str, Tensor] = {}
        self._client = httpx2.Client(
            base_url=engine.endpoint.config.root_url,
            timeout=RELOAD_SECONDS,
            trust_env=not engine.endpoint.config.is_loopback,
        )
        self._saved: Path | None = None

    @property
    def version(self) -> int:
        return self.engine.version

    def begin_update(self) -> None:
        self._taken = {}
        self._post("/pause")

    def update(self, name: str, tensor: Tensor) -> None:
        self._taken[name] = tensor.to("cpu", copy=True).contiguous()

    def end_update(self, version: int) -> None:
        folder = (self.save_to / f"weights-{version % 2}").resolve()
        self._write(folder)
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post("/collective_rpc", call)
        self._post("/reset_prefix_cache")
        self._post("/resume")
        self._saved, self._taken = folder, {}
        self.engine.version = version

    def abandon_update(self, why: str) -> None:
        """The server stays paused: it must not be sampled from."""
        self._taken = {}

    def checksums(self) -> Mapping[str, int]:
        """Of the file that the server was told to load; it does not tell what it has in memory."""
        assert self._saved is not None
        return {n: checksum(t) for n, t in load_file(self._saved / "model.safetensors").items()}

    def close(self) -> None:
        self._client.close()

    def _write(self, folder: Path) -> None:
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for pattern in FILES:
            for file in self.model.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, part)
        # A tied head is written out, for a server that was started with an untied copy: vLLM on a
        # CPU packs the head when it starts, and does not pack a tied one again (docs/rollouts.md).
        head = {HEAD: self._taken[EMBEDDING].clone()} if EMBEDDING in self._taken else {}
        save_file(head | self._taken, part / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        where = f"{self._client.base_url}{path}"
        try:
            reply = self._client.post(path, json=body or {})
            reply.raise_for_status()
        except httpx2.HTTPStatusError as error:
            raise EndpointError(
                f"The server does not take new weights: {error.response.status_code} "
                f"{error.response.text[:500]}",
                kind="server_error", retryable=False, where=where,
                remedy="start vLLM with VLLM_SERVER_DEV_MODE=1, nano's server with --dev",
            ) from error  # fmt: skip
        except httpx2.HTTPError as error:
            raise EndpointError(
                f"The server does not answer: {error or type(error).__name__}",
                kind="unreachable", retryable=False, where=where,
                remedy="start it, or correct rollout.base_url",
            ) from error  # fmt: skip
