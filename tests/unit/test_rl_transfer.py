"""New weights into a server, where nano's own cannot show it: sleep, and broadcasts to its workers.

A scripted server keeps vLLM's rules; the tensors are real, and so is the group that carries them
(gloo in the place of NCCL).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from rl.config import RolloutConfig
from rl.rollout.http import HttpEngine
from rl.rollout.transfer import BroadcastReceiver, Control, FolderReceiver
from rl.weight_sync import checksum, sync
from shared.endpoints import Endpoint, EndpointConfig
from shared.errors import EndpointError
from tests.fake_endpoint import FakeEndpoint, Reply, ok
from tirgen.stack import WEIGHTS

SHAPES = {"model.embed_tokens.weight": (40, 8), "model.norm.weight": (8,), "scale": (),
          "model.layers.0.q_proj.weight": (8, 16), "lm_head.weight": (40, 8)}  # fmt: skip


def named(seed: int = 0) -> list[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.bfloat16]
    return [
        (name, torch.randn(shape, generator=draw).to(dtypes[i % 2]))
        for i, (name, shape) in enumerate(SHAPES.items())
    ]


def engine_of(fake: FakeEndpoint) -> HttpEngine:
    return HttpEngine(Endpoint(EndpointConfig(base_url=fake.base_url, model="policy")), eos={2})


# ---- sleep --------------------------------------------------------------------------------------


class SleepyServer:
    """The rules of --enable-sleep-mode, as in EngineCore of vLLM: weights are loaded into memory
    that is awake, and the scheduler goes on when all of it is."""

    def __init__(self) -> None:
        self.awake = {"weights", "kv_cache"}
        self.paused = False
        self.loaded: list[str] = []

    def __call__(self, path: str, body: Any) -> Reply:
        route, _, query = path.partition("?")
        if route == "/is_sleeping":
            return ok({"is_sleeping": self.paused or len(self.awake) < 2})
        if route == "/sleep":
            assert query == "level=2&mode=wait"
            self.awake.clear()
        elif route == "/wake_up":
            self.awake.add(query.removeprefix("tags="))
            self.paused = False
        elif route in ("/pause", "/resume"):  # of the scheduler alone: nothing wakes by it
            self.paused = route == "/pause"
        elif route == "/collective_rpc":
            if "weights" not in self.awake:
                return Reply(b"no memory to load into", status=500)
            if "kv_cache" in self.awake and not self.paused:
                return Reply(b"half of a reply would be of the old weights", status=500)
            self.loaded.append(body["kwargs"]["weights_path"])
        return ok({})


@pytest.mark.parametrize("killed", [False, True], ids=["", "by a job that was killed meanwhile"])
def test_a_server_that_was_put_to_sleep_wakes_with_new_weights(
    tmp_path: Path, killed: bool
) -> None:
    """It has its weights' memory before they are loaded, and is wholly awake after. Controls: a
    receiver that does not know of sleep cannot load; an update of a server that is awake pauses."""
    server = SleepyServer()
    with FakeEndpoint(server) as fake:
        engine = engine_of(fake)
        receiver = FolderReceiver(Control(engine, sleeps=True), WEIGHTS, tmp_path)
        sync(named(), receiver, 1)
        receiver.control.sleep()
        assert server.awake == set()
        ignorant = FolderReceiver(Control(engine), WEIGHTS, tmp_path)
        with pytest.raises(EndpointError, match="no memory to load into"):
            sync(named(), ignorant, 2)
        if killed:
            receiver = FolderReceiver(Control(engine, sleeps=True), WEIGHTS, tmp_path)
        sync(named(), receiver, 2)
        assert (server.awake, server.paused) == ({"weights", "kv_cache"}, False)
        assert [Path(folder).name for folder in server.loaded] == ["weights-1", "weights-0"]
        assert engine.version == 2


def test_a_server_that_was_left_paused_is_not_loaded_while_it_works(tmp_path: Path) -> None:
    """By a job that was killed between pause and resume. vLLM says of it that it sleeps; waking it
    lets it go on."""
    server = SleepyServer()
    server.paused = True
    with FakeEndpoint(server) as fake:
        sync(named(), FolderReceiver(Control(engine_of(fake), sleeps=True), WEIGHTS, tmp_path), 1)
    assert (len(server.loaded), server.paused) == (1, False)


def test_another_user_may_read_the_weights_who_may_read_the_model(tmp_path: Path) -> None:
    """Control: safetensors by itself keeps them to their owner."""
    save_file({"a": torch.zeros(2)}, tmp_path / "alone.safetensors")
    assert (tmp_path / "alone.safetensors").stat().st_mode & 0o777 == 0o600
    with FakeEndpoint(SleepyServer()) as fake:
        sync(named(), FolderReceiver(Control(engine_of(fake)), WEIGHTS, tmp_path / "to"), 1)
    wanted = (WEIGHTS / "config.json").stat().st_mode & 0o777
    assert wanted & 0o044, "control: others may read the model"
    files = list((tmp_path / "to").glob("weights-1/*.safetensors"))
    assert [file.stat().st_mode & 0o777 for file in files] == [wanted]


def test_sleep_and_sampling_ahead_exclude_each_other() -> None:
    http = {"engine": "http", "base_url": "http://x/v1", "save_to": "w", "sleep": True}
    assert RolloutConfig.model_validate(http).sleep
    for wrong in ({"overlap": True}, {"engine": "local"}):
        with pytest.raises(ValueError, match="sleep needs"):
            RolloutConfig.model_validate(http | wrong)


# ---- broadcasts ---------------------------------------------------------------------------------


class GlooGroup:
    """Two ranks of one process: the trainer, and a worker that the scripted server runs."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.trainer: Any = None

    def member(self, rank: int) -> Any:
        return dist.ProcessGroupGloo(self.store, rank, 2, timedelta(seconds=3))

    def open(self, world: int) -> dict[str, object]:
        assert world == 2
        return {"nccl_unique_id_b64": "id"}

    def join(self) -> None:
        self.trainer = self.member(0)

    def broadcast(self, tensor: Tensor) -> None:
        self.trainer.broadcast([tensor], dist.BroadcastOptions()).wait()

    def synchronize(self) -> None:
        pass


class Worker:
    """vLLM's rules of weight transfer: join, then any number of buckets between start and finish,
    all of it while the scheduler is paused."""

    def __init__(self, group: GlooGroup) -> None:
        self.group = group
        self.member: Any = None
        self.weights: dict[str, Tensor] = {}
        self.said: list[str] = []
        self.state = "running"
        self.refuse = -1  # this bucket, counted from 0
        self.buckets: list[int] = []
        self.lock = threading.Lock()

    def __call__(self, path: str, body: Any) -> Reply:
        with self.lock:
            return self.answer(path, body)

    def answer(self, path: str, body: Any) -> Reply:
        route = path.partition("?")[0]
        moves = {
            "/pause": ("running", "paused"), "/resume": ("paused", "running"),
            "/start_weight_update": ("paused", "updating"),
            "/finish_weight_update": ("updating", "paused"),
        }  # fmt: skip
        self.said.append(route)
        if route == "/get_world_size":
            return ok({"world_size": 1})
        if route in moves:
            before, after = moves[route]
            if self.state != before:
                return Reply(f"{route} while {self.state}".encode(), status=500)
            self.state = after
        elif route == "/init_weight_transfer_engine":
            told = body["init_info"]
            assert (told["rank_offset"], told["world_size"], told["packed"]) == (1, 2, False)
            self.member = self.group.member(1)
        elif route == "/update_weights":
            assert self.state == "updating"
            if self.refuse == len(self.buckets):
                return Reply(b"out of memory", status=500)
            told = body["update_info"]
            self.buckets.append(len(told["names"]))
            for name, dtype, shape in zip(*told.values(), strict=True):
                got = torch.empty(shape, dtype=getattr(torch, dtype))
                self.member.broadcast([got], dist.BroadcastOptions()).wait()
                self.weights[name] = got
        return ok({})


@pytest.fixture
def worker() -> Iterator[tuple[Worker, BroadcastReceiver]]:
    group = GlooGroup()
    worker = Worker(group)
    with FakeEndpoint(worker) as fake:
        yield worker, BroadcastReceiver(Control(engine_of(fake)), group, bucket=1500)


def test_broadcast_weights_arrive_bit_for_bit(worker: tuple[Worker, BroadcastReceiver]) -> None:
    """Twice, in buckets, each dtype and shape as it was sent, between a pause and a resume; the
    group is joined once. Control: those of another seed differ in every tensor."""
    served, receiver = worker
    for version in (1, 2):
        done = sync(named(version), receiver, version)
        assert (done.version, done.tensors) == (version, len(SHAPES))
        sent, other = dict(named(version)), dict(named(99))
        assert list(served.weights) == list(SHAPES)
        assert all(checksum(got) == checksum(sent[n]) for n, got in served.weights.items())
        assert all(checksum(got) != checksum(other[n]) for n, got in served.weights.items())
        assert (served.state, receiver.version) == ("running", version)
    assert served.said.count("/init_weight_transfer_engine") == 1
    assert served.buckets == [3, 1, 1] * 2
    assert served.said.index("/pause") < served.said.index("/update_weights")


@pytest.mark.parametrize("bucket", [0, 1])
def test_a_bucket_that_the_server_refuses_is_an_error_and_the_server_stays_halted(
    worker: tuple[Worker, BroadcastReceiver], bucket: int
) -> None:
    """What it has then is half new: nobody may sample from it."""
    served, receiver = worker
    served.refuse = bucket
    with pytest.raises((EndpointError, RuntimeError), match=r"out of memory|Timed out|Connection"):
        sync(named(), receiver, 1)
    assert served.state == "updating"
    assert "/resume" not in served.said
