"""New weights into a server of ours: the routes that halt it, and two ways for the tensors.

    FolderReceiver      files in a folder that both can read; the server works until it loads them
    BroadcastReceiver   from GPU to GPU over NCCL, a bucket at a time; the server waits meanwhile

Both are `rl.weight_sync.Receiver`s, block, and raise EndpointError where the server does not do
what it is told.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import httpx2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl.folder import share
from rl.rollout.http import HttpEngine
from rl.weight_sync import BUCKET, checksum
from shared.errors import EndpointError

LOADING_SECONDS = 600.0
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_nccl: Any = torch.cuda.nccl  # untyped
FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model folder, beside its weights


class Control:
    """A server's routes for whoever trains what it serves: vLLM has them with
    VLLM_SERVER_DEV_MODE=1, nano's server with --dev. All block, and raise EndpointError where the
    server does not do what it is told.

    `sleeps`: the server shares the trainer's GPU, and gives up the memory of its weights and its
    cache while the policy is trained.
    """

    def __init__(self, engine: HttpEngine, *, sleeps: bool = False) -> None:
        self.engine, self.sleeps = engine, sleeps
        self._halted_asleep = False
        self._client = httpx2.Client(
            base_url=engine.endpoint.config.root_url,
            timeout=LOADING_SECONDS,
            trust_env=not engine.endpoint.config.is_loopback,
        )

    def sleep(self) -> None:
        """Until new weights come the server answers nothing. A job that is killed meanwhile finds
        it asleep and wakes it with its first weights."""
        self.post("/sleep?level=2&mode=wait")

    def halt(self) -> None:
        """Have it take no step until `go_on`. A pause waits for what is under way, so that no reply
        is of two versions; of a server that sleeps the weights wake, and nothing else.

        A server that somebody paused says that it sleeps, and waking it lets it go on: so the pause
        comes last."""
        self._halted_asleep = self.sleeps and bool(self.get("/is_sleeping")["is_sleeping"])
        if self._halted_asleep:
            self.post("/wake_up?tags=weights")
        self.post("/pause?mode=wait")

    def go_on(self, version: int) -> None:
        """With the weights that it has now, and nothing computed with older ones."""
        self.post("/reset_prefix_cache")
        self.engine.version = version
        self.post("/wake_up?tags=kv_cache" if self._halted_asleep else "/resume")

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", path, None).json()
        return found

    def post(self, path: str, body: Mapping[str, object] | None = None) -> None:
        self._ask("POST", path, body or {})

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None) -> httpx2.Response:
        where = f"{self._client.base_url}{path}"
        try:
            reply = self._client.request(method, path, json=body)
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


class FolderReceiver:
    """`model` is the folder that the server was started with, `save_to` one that it can read: two
    copies of the weights take turns there, in files of about `bucket` bytes, of which one is held
    in memory."""

    dtype: torch.dtype | None = None  # as they come

    def __init__(
        self, control: Control, model: Path, save_to: Path, *, bucket: int = BUCKET
    ) -> None:
        self.control, self.model, self.save_to, self.bucket = control, model, save_to, bucket
        self._held: dict[str, Tensor] = {}  # not yet written
        self._head: Tensor | None = None
        self._files: dict[str, str] = {}  # where each tensor is
        self._saved: Path | None = None

    @property
    def version(self) -> int:
        return self.control.engine.version

    @property
    def _part(self) -> Path:
        return self.save_to / ".part"

    def begin_update(self) -> None:
        """Begin the folder, if the server has the routes that will be needed."""
        self.control.post("/reset_prefix_cache")
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
        share(self._part)
        folder = (self.save_to / f"weights-{version % 2}").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        self._part.rename(folder)
        self.control.halt()
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self.control.post("/collective_rpc", call)
        self._saved = folder
        self.control.go_on(version)

    def abandon_update(self, why: str) -> None:
        """What was not loaded is thrown away. A server that failed to load stays paused."""
        self._held, self._head = {}, None
        shutil.rmtree(self._part, ignore_errors=True)

    def checksums(self) -> Mapping[str, int]:
        """Of the files that the server was told to load; it does not tell what it has in memory."""
        assert self._saved is not None
        files = sorted(self._saved.glob("*.safetensors"))
        return {name: checksum(t) for file in files for name, t in load_file(file).items()}

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


class Group(Protocol):
    """The trainer, as rank 0, and the workers of a server."""

    device: torch.device  # where a tensor has to be to be broadcast

    def open(self, world: int) -> dict[str, object]:
        """What the server's workers are told to join it."""
        ...

    def join(self) -> None:
        """Returns when all have joined."""
        ...

    def broadcast(self, tensor: Tensor) -> None: ...

    def synchronize(self) -> None:
        """Returns when all that was broadcast has left."""
        ...


class BroadcastReceiver:
    """vLLM's weight transfer (`--weight-transfer-config '{"backend": "nccl"}'`): a bucket is named
    over HTTP and broadcast while that request waits. At most `bucket` bytes are held, on the GPU.

    The server has no step between the first bucket and the last one, and stays halted where an
    update fails: what it has then are no weights.
    """

    dtype: torch.dtype | None = None  # as they come

    def __init__(self, control: Control, group: Group, *, bucket: int = BUCKET) -> None:
        self.control, self.group, self.bucket = control, group, bucket
        self._held: dict[str, Tensor] = {}
        self._sent: dict[str, int] = {}
        self._joined = False

    @property
    def version(self) -> int:
        return self.control.engine.version

    def begin_update(self) -> None:
        self._join()
        self._held, self._sent = {}, {}
        self.control.halt()
        self.control.post("/start_weight_update")

    def update(self, name: str, tensor: Tensor) -> None:
        if self._held and sum(t.nbytes for t in self._held.values()) + tensor.nbytes > self.bucket:
            self._broadcast()
        self._held[name] = tensor.to(self.group.device, copy=True).contiguous()

    def end_update(self, version: int) -> None:
        self._broadcast()
        self.control.post("/finish_weight_update", {"weight_version": str(version)})
        self.control.go_on(version)

    def abandon_update(self, why: str) -> None:
        """Nothing brings the old weights back: a server that was halted stays so."""
        self._held = {}

    def checksums(self) -> Mapping[str, int]:
        """Of what was broadcast; the server does not tell what it has in memory."""
        return self._sent

    def _join(self) -> None:
        """Once. The server answers when its workers are in the group, for which it needs us."""
        if self._joined:
            return
        world = 1 + int(self.control.get("/get_world_size")["world_size"])
        told = {"rank_offset": 1, "world_size": world, "packed": False} | self.group.open(world)
        with ThreadPoolExecutor(1) as aside:
            asked = aside.submit(
                self.control.post, "/init_weight_transfer_engine", {"init_info": told}
            )
            _unless_failed(asked)
            self.group.join()
            asked.result()
        self._joined = True

    def _broadcast(self) -> None:
        told = {
            "names": list(self._held),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in self._held.values()],
            "shapes": [list(t.shape) for t in self._held.values()],
        }
        with ThreadPoolExecutor(1) as aside:
            asked = aside.submit(self.control.post, "/update_weights", {"update_info": told})
            for name, tensor in self._held.items():
                _unless_failed(asked)
                self.group.broadcast(tensor)
                self._sent[name] = checksum(tensor)
            self.group.synchronize()
            asked.result()
        self._held = {}


def _unless_failed(asked: Future[None]) -> None:
    """Nobody is there to receive where the request has failed already."""
    if asked.done():
        asked.result()


class NcclGroup:
    """NCCL by torch.cuda.nccl, on the current device. **Unproven**: no machine with two GPUs has
    run this. The rendezvous is by NCCL's own unique id, after which vLLM's workers expect one
    reduction of one element."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._world = 0
        self._id: bytes = b""
        self._comms: list[Any] = []

    def open(self, world: int) -> dict[str, object]:
        self._world, self._id = world, bytes(_nccl.unique_id())
        return {"nccl_unique_id_b64": base64.b64encode(self._id).decode()}

    def join(self) -> None:
        self._comms = [_nccl.init_rank(self._world, self._id, 0)]
        warm = torch.zeros(1, device=self.device)
        _nccl.all_reduce([warm], comms=self._comms)
        self.synchronize()

    def broadcast(self, tensor: Tensor) -> None:
        _nccl.broadcast([tensor], root=0, comms=self._comms)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
