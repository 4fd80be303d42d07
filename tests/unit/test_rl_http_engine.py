"""The engine behind HTTP, against nano's server: real ids, real log-probabilities, new weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.render import Renderer
from rl.rollout.http import HttpEngine
from rl.rollout.transfer import Control, FolderReceiver
from rl.weight_sync import sync, weights
from shared.endpoints import Endpoint, EndpointConfig, Sampling
from shared.errors import EndpointError
from shared.nano.launch import NanoProcess, start_server, stop_server
from shared.policy import Generated
from tests.fake_endpoint import FakeEndpoint, Reply, ok, sequence, usage
from tests.nano_random import make_model
from tirgen.stack import WEIGHTS

PROBLEM = "A farm has 12 goats and buys 30 more. How many goats are there?"
FREE = Sampling(temperature=1.0, max_tokens=40)


@dataclass(frozen=True)
class Served:
    process: NanoProcess
    folder: Path  # what it was started with


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(WEIGHTS, folder / "model")
    process = start_server(folder / "model", log=folder / "log", name="policy", dev=True)
    yield Served(process, folder / "model")
    stop_server(process.pid)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(WEIGHTS), "compact")


def model(seed: int | None = None) -> torch.nn.Module:
    """The packaged policy; with a seed, its weights moved a little."""
    lm = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return lm


def sample(
    url: str, renderer: Renderer, sampling: Sampling = FREE, seed: int = 1, n: int = 1
) -> list[Generated]:
    async def run() -> list[Generated]:
        async with Endpoint(EndpointConfig(base_url=url, model="policy")) as endpoint:
            engine = HttpEngine(endpoint, eos={renderer.eos}, version=3)
            prompt = renderer.prompt(PROBLEM).ids
            calls = (engine.generate(prompt, sampling, seed=seed + i, key=str(i)) for i in range(n))
            return list(await asyncio.gather(*calls))

    return asyncio.run(run())


def by_torch(lm: torch.nn.Module, prompt: tuple[int, ...], made: Generated) -> torch.Tensor:
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[*prompt, *made.ids]])).logits[0].double()
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp[range(len(made.ids)), list(made.ids)]


def test_ids_and_logprobs_are_of_what_was_sampled(served: Served, renderer: Renderer) -> None:
    """Beside a forward pass of torch. Control: by other weights they are others."""
    prompt, lm, other = renderer.prompt(PROBLEM).ids, model(), model(seed=0)
    for made in sample(served.process.url, renderer, n=6):
        assert made.version == 3
        assert made.logprobs is not None
        assert len(made.logprobs) == len(made.ids)
        told = torch.tensor(made.logprobs, dtype=torch.float64)
        assert (told - by_torch(lm, prompt, made)).abs().max() < 1e-3
        assert (told - by_torch(other, prompt, made)).abs().max() > 1e-2
        assert (made.ids[-1] == renderer.eos) is (made.finish == "eos")


def test_a_stop_string_is_kept_and_told_apart_from_the_end(
    served: Served, renderer: Renderer
) -> None:
    stops = FREE.model_copy(update={"stop": ("```",), "include_stop": True})
    finishes = set()
    for made in sample(served.process.url, renderer, stops, n=6):
        finishes.add(made.finish)
        if made.finish == "stop":
            assert renderer.decode(made.ids).endswith("```")
    assert "stop" in finishes
    (cut,) = sample(served.process.url, renderer, FREE.model_copy(update={"max_tokens": 3}))
    assert (cut.finish, len(cut.ids)) == ("length", 3)


@pytest.mark.parametrize("changed", [{"temperature": 0.6}, {"top_p": 0.9}, {"top_k": 5}])
def test_logprobs_of_another_distribution_are_not_passed_on(
    served: Served, renderer: Renderer, changed: dict[str, float]
) -> None:
    """vLLM tells them before temperature and truncation: a ratio to them would be wrong."""
    (made,) = sample(served.process.url, renderer, FREE.model_copy(update=changed))
    assert made.logprobs is None


def test_new_weights_are_what_it_samples_from(
    served: Served, renderer: Renderer, tmp_path: Path
) -> None:
    """Twice, and back. Controls: before, and by the old weights, log-probabilities are others."""
    prompt = renderer.prompt(PROBLEM).ids

    async def updated(lm: torch.nn.Module, version: int) -> Generated:
        address = EndpointConfig(base_url=served.process.url, model="policy")
        async with Endpoint(address) as endpoint:
            engine = HttpEngine(endpoint, eos={renderer.eos})
            receiver = FolderReceiver(Control(engine), served.folder, tmp_path)
            done = await asyncio.to_thread(sync, weights(lm), receiver, version)
            assert done.version == engine.version == version
            receiver.control.close()
            return await engine.generate(prompt, FREE, seed=version, key="k")

    previous = model()
    for version, lm in ((1, model(seed=1)), (2, model(seed=2)), (3, model())):
        made = asyncio.run(updated(lm, version))
        assert made.version == version
        told = torch.tensor(made.logprobs, dtype=torch.float64)
        assert (told - by_torch(lm, prompt, made)).abs().max() < 1e-3
        assert (told - by_torch(previous, prompt, made)).abs().max() > 1e-2
        previous = lm


def test_weights_in_several_files_are_the_same_weights(
    served: Served, renderer: Renderer, tmp_path: Path
) -> None:
    """A bucket at a time, no more than that in memory; the index names every tensor."""
    lm, prompt = model(seed=5), renderer.prompt(PROBLEM).ids
    engine = HttpEngine(
        Endpoint(EndpointConfig(base_url=served.process.url, model="policy")), eos={renderer.eos}
    )
    receiver = FolderReceiver(Control(engine), served.folder, tmp_path, bucket=2**20)
    held = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(lm):
            held.append(sum(t.nbytes for t in receiver._held.values()))
            yield name, tensor

    sync(watched(), receiver, 4)
    receiver.control.close()
    folder = tmp_path / "weights-0"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert max(held) <= 2**20
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == lm.state_dict().keys()
    assert set(index["weight_map"].values()) == set(files)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in lm.state_dict().items())
    (made,) = sample(served.process.url, renderer)
    told = torch.tensor(made.logprobs, dtype=torch.float64)
    assert (told - by_torch(lm, prompt, made)).abs().max() < 1e-3
    sync(weights(model()), FolderReceiver(Control(engine), served.folder, tmp_path), 5)


def test_what_is_under_way_ends_with_the_old_weights(
    served: Served, renderer: Renderer, tmp_path: Path
) -> None:
    """Requests from before, during and after an update: each is of one version, and says which."""
    old, new = model(), model(seed=6)
    prompt = renderer.prompt(PROBLEM).ids
    long = FREE.model_copy(update={"max_tokens": 300})

    async def run() -> list[Generated]:
        address = EndpointConfig(base_url=served.process.url, model="policy")
        async with Endpoint(address) as endpoint:
            engine = HttpEngine(endpoint, eos={renderer.eos}, version=0)
            receiver = FolderReceiver(Control(engine), served.folder, tmp_path)
            made: list[Generated] = []

            async def ask(seed: int) -> None:
                made.append(await engine.generate(prompt, long, seed=seed, key=str(seed)))

            tasks = [asyncio.create_task(ask(seed)) for seed in range(24)]
            await asyncio.sleep(0)
            update = asyncio.create_task(asyncio.to_thread(sync, weights(new), receiver, 1))
            while not update.done():
                tasks.append(asyncio.create_task(ask(len(tasks))))
                await asyncio.wait({tasks[-1], update}, return_when=asyncio.FIRST_COMPLETED)
            await update
            await asyncio.gather(*tasks, ask(999))
            await asyncio.to_thread(sync, weights(old), receiver, 2)
            receiver.control.close()
            return made

    def off(lm: torch.nn.Module, made: Generated) -> float:
        told = torch.tensor(made.logprobs, dtype=torch.float64)
        return float((told - by_torch(lm, prompt, made)).abs().max())

    made = asyncio.run(run())
    assert {one.version for one in made} == {0, 1}
    for one in made:
        right, wrong = (old, new) if one.version == 0 else (new, old)
        if off(right, one) >= 1e-3:  # sent before the update, begun after it: version of the asking
            assert one.version == 0
            assert off(new, one) < 1e-3
        else:
            assert off(wrong, one) > 1e-2


def test_weights_of_another_model_are_refused_and_the_old_ones_stay(
    served: Served, renderer: Renderer, tmp_path: Path
) -> None:
    engine = HttpEngine(
        Endpoint(EndpointConfig(base_url=served.process.url, model="policy")), eos={renderer.eos}
    )
    other = make_model(tmp_path / "other")
    before = sample(served.process.url, renderer)
    for folder, why in ((other, "another model"), (tmp_path / "nowhere", "cannot read")):
        receiver = FolderReceiver(Control(engine), served.folder, tmp_path)
        with pytest.raises(EndpointError, match=why):
            receiver.control.post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
            )
        with pytest.raises(EndpointError, match="mode=wait"):
            receiver.control.post("/pause")  # vLLM's default would abort what is under way
        receiver.control.close()
    assert sample(served.process.url, renderer) == before


@pytest.mark.parametrize(
    ("reason", "stop", "ids", "finish"),
    [
        ("stop", None, [5, 2], "eos"),
        ("stop", 0, [5, 0], "eos"),  # another token that ends a text, as in generation_config.json
        ("stop", "```", [5, 7], "stop"),
        ("length", None, [5, 7], "length"),
    ],
)
def test_how_a_reply_ended_is_told_by_its_reason(
    reason: str, stop: object, ids: list[int], finish: str
) -> None:
    """A request that was aborted by a pause is sent again."""
    ended = {"text": "x", "token_ids": ids, "finish_reason": reason, "stop_reason": stop}
    cut = {"text": "", "token_ids": [], "finish_reason": "abort"}
    replies = [ok({"choices": [one], "usage": usage(1, 2)}) for one in (cut, ended)]
    with FakeEndpoint(sequence(*replies)) as fake:
        engine = HttpEngine(
            Endpoint(EndpointConfig(base_url=fake.base_url, model="policy")), eos={2}
        )
        made = asyncio.run(engine.generate([1], FREE, seed=1, key="k"))
    assert (made.finish, made.ids, made.logprobs) == (finish, tuple(ids), None)


def test_a_server_without_the_routes_says_how_to_get_them(
    renderer: Renderer, tmp_path: Path
) -> None:
    with FakeEndpoint(lambda path, body: Reply(b"no such route", status=404)) as fake:
        config = EndpointConfig(base_url=fake.base_url, model="policy")
        engine = HttpEngine(Endpoint(config), eos={renderer.eos})
        receiver = FolderReceiver(Control(engine), WEIGHTS, tmp_path)
        with pytest.raises(EndpointError, match="404") as error:
            receiver.begin_update()
        assert "VLLM_SERVER_DEV_MODE" in str(error.value)
        receiver.control.close()
    receiver = FolderReceiver(Control(engine), WEIGHTS, tmp_path)
    with pytest.raises(EndpointError) as error:
        receiver.begin_update()
    assert error.value.kind == "unreachable"
    receiver.control.close()
