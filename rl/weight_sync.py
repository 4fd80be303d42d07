"""The trainer's weights into an engine: checked tensor by tensor, with a version.

    sync(weights(model), receiver, version)          # the engine now samples at `version`

The trainer's side is a model of any kind: plain, in a DeepSpeed engine with whole parameters (ZeRO
0 to 2), or with parameters that are spread over the ranks (ZeRO 3), of which only a bucket is
gathered at a time. LoRA adapters are merged into a copy of the weight they belong to. Tied weights
are sent once, under the first of their names.

The engine's side is a `Receiver`: `rl.rollout.LocalEngine` (a copy in memory), or one of
rl/rollout/transfer.py for a server (files that it loads, or broadcasts from GPU to GPU). All drop
what they cached of the old weights.

All of it blocks, and may be called from any thread but an event loop's: gathering parameters is a
collective, which belongs to the trainer's thread.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.errors import InputError, TirgenError

BUCKET = 512 * 2**20  # bytes

_CHUNK = 2**22  # elements of a checksum that are looked at together
_PEFT = "base_model.model."


class SyncError(TirgenError):
    """The engine does not have the weights that were sent. It must not be sampled from."""


class Receiver(Protocol):
    """An engine that takes weights. `dtype`: what it keeps them in; None, as they come."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def version(self) -> int: ...

    def begin_update(self) -> None:
        """Further calls wait until the update ends. Returns when no call is under way."""
        ...

    def update(self, name: str, tensor: Tensor) -> None:
        """Take one of the weights. It may be overwritten as soon as this returns."""
        ...

    def end_update(self, version: int) -> None:
        """Go on with the new weights; drop what was computed with the old ones."""
        ...

    def abandon_update(self, why: str) -> None:
        """The update failed: never sample from what came of it."""
        ...

    def checksums(self) -> Mapping[str, int]:
        """`checksum` of each tensor that the engine now has, by the trainer's names."""
        ...


@dataclass(frozen=True, slots=True)
class Sync:
    """What an update was: tensors and bytes as sent, and seconds until the engine went on."""

    version: int
    tensors: int
    bytes: int
    seconds: float


def sync(
    named: Iterable[tuple[str, Tensor]],
    receiver: Receiver | None,
    version: int,
    *,
    verify: bool = True,
) -> Sync:
    """Send all tensors and go on at `version`. A tensor is looked at before the next is asked for.

    `receiver` is None on a rank that only helps to gather. `verify` compares the checksum of every
    tensor on both sides. Raises SyncError where they differ, InputError for names or shapes that
    the engine does not have, and what the engine raises; the engine then samples no more.
    """
    started = time.monotonic()
    wanted: dict[str, int] = {}
    n_bytes = n_tensors = 0
    if receiver is None:
        for _ in named:
            n_tensors += 1
        return Sync(version, n_tensors, 0, time.monotonic() - started)
    receiver.begin_update()
    try:
        for name, tensor in named:
            sent = _as_kept(tensor, receiver.dtype)
            if verify:
                wanted[name] = checksum(sent)
            receiver.update(name, sent)
            n_bytes, n_tensors = n_bytes + sent.nbytes, n_tensors + 1
        receiver.end_update(version)
        _verified(wanted, receiver.checksums() if verify else {}, receiver, version)
    except BaseException as error:
        receiver.abandon_update(str(error) or type(error).__name__)
        raise
    return Sync(version, n_tensors, n_bytes, time.monotonic() - started)


def _verified(
    wanted: Mapping[str, int], found: Mapping[str, int], receiver: Receiver, version: int
) -> None:
    wrong = [name for name, value in wanted.items() if found.get(name) != value]
    if wrong:
        raise SyncError(
            f"{len(wrong)} of {len(wanted)} tensors arrived otherwise than they were sent.",
            where=", ".join(wrong[:3]),
            remedy="do not go on: the policy that samples is not the one that is trained",
        )
    if receiver.version != version:
        raise SyncError(f"The engine is at version {receiver.version}, not {version}.")


def _as_kept(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """64 bits over dtype, shape and every bit of the values, in place: no copy to the host.

    A sum of the elements' bits, each times an odd number of its own, modulo 2^64: every change of
    one element shows, and it does not matter in which order or on which device it is summed.
    """
    size = tensor.element_size()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    flat = tensor.detach().contiguous().view(-1).view(bits)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for at in range(0, len(flat), _CHUNK):
        part = flat[at : at + _CHUNK].long()
        odd = torch.arange(at, at + len(part), device=flat.device).mul_(2).add_(1)
        total += (part * odd).sum()
    label = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return (int(total) + (zlib.crc32(label) << 31)) % 2**64


# ---- the trainer's side ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor to send: what must be gathered for it, and how it is made of that."""

    name: str
    needs: tuple[nn.Parameter, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        numel = getattr(self.needs[0], "ds_numel", self.needs[0].numel())
        return int(numel) * self.needs[0].element_size()


def weights(model: nn.Module, bucket: int = BUCKET) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by Hugging Face's names, of which one is valid until the next.

    With ZeRO 3 about `bucket` bytes are gathered at a time. Every rank must then go through all of
    them, since gathering takes all ranks (`sync` with no receiver does).
    """
    part: list[_Item] = []
    for item in _items(model):
        if part and sum(one.size for one in (*part, item)) > bucket:
            yield from _gathered(part)
            part = []
        part.append(item)
    yield from _gathered(part)


def _gathered(part: list[_Item]) -> Iterator[tuple[str, Tensor]]:
    spread = [p for item in part for p in item.needs if hasattr(p, "ds_id")]
    with _gather(spread), torch.no_grad():
        for item in part:
            yield item.name, item.make()


def _gather(spread: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not spread:
        return nullcontext()
    import deepspeed

    # Read-only: no rank modifies.
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(spread)
    return context


def _items(model: nn.Module) -> Iterator[_Item]:
    sent: set[int] = set()
    for prefix, module in model.named_modules():
        if "lora_" in prefix or ".original_module" in f".{prefix}":
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in sent:
                continue
            sent.add(id(parameter))
            yield _item(model, prefix, name, parameter)


def _item(model: nn.Module, prefix: str, name: str, parameter: nn.Parameter) -> _Item:
    full = f"{prefix}.{name}" if prefix else name
    public = full.removeprefix(_PEFT).replace(".base_layer.", ".")
    public = public.replace(".modules_to_save.default.", ".")
    owner = model.get_submodule(prefix.removesuffix(".base_layer"))
    if name != "weight" or not prefix.endswith(".base_layer") or not hasattr(owner, "lora_A"):
        return _Item(public, (parameter,), lambda: parameter.data)
    pairs = [(_weight(owner.lora_A, a), _weight(owner.lora_B, a)) for a in _adapters(owner)]
    scales = [float(owner.scaling[a]) for a in _adapters(owner)]  # type: ignore[index]

    def merged() -> Tensor:
        weight = parameter.data.float()
        for (down, up), scale in zip(pairs, scales, strict=True):
            weight = weight + scale * (up.data.float() @ down.data.float())
        return weight.to(parameter.dtype)

    return _Item(public, (parameter, *(p for pair in pairs for p in pair)), merged)


def _adapters(owner: Any) -> list[str]:
    """Names of the adapters that a forward of this layer adds."""
    return [name for name in owner.active_adapters if name in owner.lora_A]


def _weight(layers: Any, adapter: str) -> nn.Parameter:
    weight: nn.Parameter = layers[adapter].weight
    return weight


# ---- the engine's side, in memory --------------------------------------------------------------


class Target:
    """A model in this process that weights are copied into."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = dict(model.state_dict())
        self._got: set[int] = set()

    @torch.no_grad()
    def take(self, name: str, tensor: Tensor) -> None:
        """Raises InputError for an unknown name or another shape."""
        own = self.tensors.get(name)
        if own is None or own.shape != tensor.shape:
            has = "no such tensor" if own is None else f"shape {tuple(own.shape)}"
            raise InputError(
                f"The engine's model has {has}; {tuple(tensor.shape)} was sent.",
                where=name,
                remedy="the engine must be made from the model that is trained",
            )
        own.copy_(tensor)
        self._got.add(own.data_ptr())

    def complete(self) -> None:
        """Raises InputError if a tensor was not sent since the last time. Tied ones count once."""
        missing = [n for n, own in self.tensors.items() if own.data_ptr() not in self._got]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self.tensors)} tensors were not sent.",
                where=", ".join(missing[:3]),
                remedy="send the whole model: the engine would sample from a mixture",
            )
        self._got.clear()
