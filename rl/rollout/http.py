"""An engine behind HTTP: vLLM, or nano's server, by token ids.

The server has to speak vLLM's token-id prompts, `return_token_ids` and `logprobs`. New weights
travel through a folder that both can read: they are written there as Hugging Face files while the
server still works, and then it is told to load them (`/pause`, `/collective_rpc reload_weights`,
`/reset_prefix_cache`, `/resume`; vLLM has these with VLLM_SERVER_DEV_MODE=1, nano's server with
--dev). The pause waits for what is under way, so that no reply is of two versions. A server that
shares the trainer's GPU sleeps in between (`rollout.sleep`): it gives up its weights and its cache.

vLLM tells log-probabilities at temperature 1 and before top-k and top-p (its default). So they are
passed on only where that is the distribution that was sampled from; elsewhere there are none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import httpx2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.weight_sync import BUCKET, checksum
from shared.endpoints import Completion, Endpoint, Sampling
from shared.errors import EndpointError
from shared.policy import Finish, Generated

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


class HttpReceiver:
    """`rl.weight_sync.Receiver` of such a server. `model` is the folder that it was started with.

    `save_to` is a folder that the server can read; two copies of the weights take turns in it, in
    files of about `bucket` bytes, of which one is held in memory. Until the last step of an update
    the server goes on with the old weights. Blocks; raises EndpointError where the server does not
    do what it is told.
    """

    dtype: torch.dtype | None = None  # as they come

    def __init__(
        self,
        engine: HttpEngine,
        model: Path,
        save_to: Path,
        *,
        bucket: int = BUCKET,
        sleeps: bool = False,
    ) -> None:
        self.engine, self.model, self.save_to, self.bucket = engine, model, save_to, bucket
        self.sleeps = sleeps
        self._held: dict[str, Tensor] = {}  # not yet written
        self._head: Tensor | None = None
        self._files: dict[str, str] = {}  # where each tensor is
        self._client = httpx2.Client(
            base_url=engine.endpoint.config.root_url,
            timeout=RELOAD_SECONDS,
            trust_env=not engine.endpoint.config.is_loopback,
        )
        self._saved: Path | None = None

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def _part(self) -> Path:
        return self.save_to / ".part"

    def begin_update(self) -> None:
        """Begin the folder, if the server has the routes that will be needed."""
        self._post("/reset_prefix_cache")
        self._held, self._head, self._files = {}, None, {}
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        for pattern in FILES:
            for file in self.model.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copy(file, self._part)

    def update(self, name: str, tensor: Tensor) -> None:
        if self._held and sum(t.nbytes for t in self._held.values()) + tensor.nbytes > self.bucket:
            self._write()
        self._held[name] = kept = tensor.to("cpu", copy=True).contiguous()
        if name == EMBEDDING:
            self._head = kept

    def end_update(self, version: int) -> None:
        """Close the folder and have it loaded."""
        if HEAD not in self._files and HEAD not in self._held and self._head is not None:
            # A tied head is written out, for a server that was started with an untied copy: vLLM
            # on a CPU packs the head when it starts, and does not pack a tied one again
            # (docs/rollouts.md).
            self._held[HEAD] = self._head.clone()
        self._write()
        self._index()
        folder = (self.save_to / f"weights-{version % 2}").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        self._part.rename(folder)
        asleep = self.sleeps and self._is_asleep()
        self._post("/wake_up?tags=weights" if asleep else "/pause?mode=wait")
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._post("/collective_rpc", call)
        self._post("/reset_prefix_cache")
        self.engine.version, self._saved = version, folder
        self._post("/wake_up?tags=kv_cache" if asleep else "/resume")

    def sleep(self) -> None:
        """Have the server give up the memory of its weights and its cache until new weights come.
        Until then it answers nothing. For `sleeps` only; a job that is killed meanwhile finds it
        asleep and wakes it with its first weights."""
        self._post("/sleep?level=2&mode=wait")

    def _is_asleep(self) -> bool:
        return bool(self._ask("GET", "/is_sleeping").json()["is_sleeping"])

    def abandon_update(self, why: str) -> None:
        """What was not loaded is thrown away. A server that failed to load stays paused."""
        self._held, self._head = {}, None
        shutil.rmtree(self._part, ignore_errors=True)

    def checksums(self) -> Mapping[str, int]:
        """Of the files that the server was told to load; it does not tell what it has in memory."""
        assert self._saved is not None
        files = sorted(self._saved.glob("*.safetensors"))
        return {name: checksum(t) for file in files for name, t in load_file(file).items()}

    def close(self) -> None:
        self._client.close()

    def _write(self) -> None:
        number = len(set(self._files.values())) + 1
        name = f"model-{number:05d}.safetensors"
        save_file(self._held, self._part / name, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._held, name)
        self._held = {}

    def _index(self) -> None:
        """One file has the plain name; several have an index."""
        files = set(self._files.values())
        if len(files) == 1:
            (self._part / files.pop()).rename(self._part / "model.safetensors")
            return
        size = sum((self._part / file).stat().st_size for file in files)
        index = {"metadata": {"total_size": size}, "weight_map": self._files}
        (self._part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        self._ask("POST", path, json=body or {})

    def _ask(self, method: str, path: str, **content: object) -> httpx2.Response:
        where = f"{self._client.base_url}{path}"
        try:
            reply = self._client.request(method, path, **content)
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
        return reply
