"""The nano server as a process: replies, streams, errors, cancellation, start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI
from transformers import AutoTokenizer

from shared.errors import EndpointError
from shared.nano.launch import NanoProcess, is_server, start_server, stop_server
from shared.nano.model import Float32
from shared.nano.server import create_app
from shared.nano.service import NanoService
from shared.nano.text import PromptError, TextCodec
from tests.nano_random import make_model

PROMPT = "Tom has 12 apples and buys 7 more;"
Post = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NanoProcess]:
    process = start_server(folder, log=tmp_path_factory.mktemp("log") / "nano.log")
    yield process
    stop_server(process.pid)


@pytest.fixture(scope="module")
def post(server: NanoProcess) -> Iterator[Post]:
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=30) as client:

        def send(path: str, **body: Any) -> httpx.Response:
            # Escaped by json.dumps: a lone surrogate can travel in JSON, though not in UTF-8.
            headers = {"content-type": "application/json"}
            return client.post(path, content=json.dumps(body), headers=headers)

        yield send


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec(folder)


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_greedy_completion_equals_transformers(post: Post, folder: Path) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT)["input_ids"]
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )[0, len(ids) :].tolist()
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    reply = post("/v1/completions", ignore_eos=True, logprobs=0, **body).json()
    [choice] = reply["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, expected)
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == len(ids)
    assert reply["usage"]["completion_tokens"] == 24
    with torch.no_grad():
        logits = model(torch.tensor([ids + expected])).logits[0, len(ids) - 1 : -1]
        # Padding rows of the vocabulary take no part in the server's distribution.
        logits[:, sorted(set(range(512)) - TextCodec(folder).ids)] = -torch.inf
        wanted = logits.log_softmax(-1)[torch.arange(24), torch.tensor(expected)]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_32_concurrent_requests_get_what_each_gets_alone(post: Post) -> None:
    def request(seed: int) -> list[int]:
        body = {"max_tokens": 20, "seed": seed, "return_token_ids": True, "ignore_eos": True}
        reply = post("/v1/completions", prompt=PROMPT + " " * (seed % 5), **body)
        ids: list[int] = reply.json()["choices"][0]["token_ids"]
        return ids

    alone = [request(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(request, range(32))) == alone


def test_choices_have_seeds_of_their_own_and_choice_0_is_that_of_n_1(post: Post) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16, "seed": 3, "ignore_eos": True}
    three = post("/v1/completions", n=3, **body).json()
    texts = [choice["text"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert post("/v1/completions", n=1, **body).json()["choices"][0]["text"] == texts[0]
    assert post("/v1/completions", n=3, **body).json()["choices"] == three["choices"]
    assert three["usage"]["completion_tokens"] == 48


def test_openai_client_reads_both_interfaces_and_their_streams(server: NanoProcess) -> None:
    client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["nano"]
    messages: Any = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(
        model="nano", messages=messages, max_completion_tokens=12, seed=1, logprobs=True,
        top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    parts = list(
        client.chat.completions.create(
            model="nano", messages=messages, max_completion_tokens=12, seed=1, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )
    )  # fmt: skip
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage == whole.usage
    stream = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=5, stream=True, n=2, extra_body={"ignore_eos": True}
    )
    assert {part.choices[0].index for part in stream} == {0, 1}


def test_completion_stream_joins_to_the_whole_reply(post: Post) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "seed": 9, "logprobs": 2, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    [whole] = post("/v1/completions", **body).json()["choices"]
    parts = events(post("/v1/completions", stream=True, **body))
    chunks = [part["choices"][0] for part in parts]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [i for chunk in chunks for i in chunk["token_ids"]] == whole["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all(chunk["prompt_token_ids"] is None for chunk in chunks[1:])
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for chunk in chunks for entry in chunk["logprobs"][key]]
        assert joined == whole["logprobs"][key], key


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("mode", ["generate", "continue", "neither"])
def test_chat_template_renders_as_in_transformers(
    folder: Path, codec: TextCodec, thinking: bool | None, mode: str
) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Größe? <b>&amp;"}],
        [
            {"role": "system", "content": "You reason."},
            {"role": "user", "content": "  spaces kept "},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo 5"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "It is "},
        ],
    ]
    flags = {"add_generation_prompt": mode == "generate",
             "continue_final_message": mode == "continue"}  # fmt: skip
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    for messages in conversations:
        wanted = reference.apply_chat_template(messages, tokenize=False, **flags, **kwargs)
        assert codec.render_chat(messages, **flags, **kwargs) == wanted


def test_template_errors_and_missing_messages_reach_the_client(
    codec: TextCodec, post: Post
) -> None:
    with pytest.raises(PromptError, match="Unexpected role"):
        codec.render_chat([{"role": "judge", "content": "x"}], add_generation_prompt=True)
    reply = post("/v1/chat/completions", messages=[{"role": "judge", "content": "x"}])
    assert reply.status_code == 400
    assert "Unexpected role" in reply.json()["error"]["message"]
    # A template reaches plain data only, whatever the client passes in.
    nasty = {"messages": [{"role": "user", "content": "x"}],
             "chat_template_kwargs": {"enable_thinking": {"__class__": 1}}}  # fmt: skip
    assert post("/tokenize", **nasty).status_code == 200


def test_tokenize_and_detokenize_are_inverse(post: Post, codec: TextCodec) -> None:
    text = "naïve 数学 🙂 <think>\n"
    reply = post("/tokenize", model="nano", prompt=text).json()
    ids = codec.encode(text, add_special_tokens=True)
    assert reply == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    assert post("/detokenize", tokens=ids).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    for thinking in (True, False):
        kwargs = {"enable_thinking": thinking}
        tokens = post("/tokenize", messages=messages, chat_template_kwargs=kwargs).json()["tokens"]
        prompt = codec.render_chat(messages, add_generation_prompt=True, **kwargs)
        assert tokens == codec.encode(prompt, add_special_tokens=False)


OK: dict[str, Any] = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {**OK, "model": "gpt-5"}, 404, "The model `gpt-5` does not exist."),
        ("/v1/completions", {**OK, "n": 2, "temperature": 0}, 400, "greedy"),
        ("/v1/completions", {"prompt": [5] * 256}, 400, "maximum context length is 256 tokens"),
        ("/v1/completions", {"prompt": "a " * 400}, 400, "maximum context length is 256 tokens"),
        ("/v1/completions", {"prompt": "a" * 10**6}, 400, "maximum context length is 256 tokens"),
        ("/v1/completions", {"prompt": [5, 512]}, 400, "out of vocabulary"),
        ("/v1/completions", {"prompt": [-1]}, 400, "out of vocabulary"),
        ("/v1/completions", {"prompt": ""}, 400, "at least one token"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, "not valid Unicode"),
        ("/v1/completions", {}, 400, "prompt: Field required"),
        ("/v1/completions", {**OK, "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {**OK, "top_p": 0}, 400, "top_p"),
        ("/v1/completions", {**OK, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {**OK, "n": 10**6}, 400, "n: "),
        ("/v1/completions", {**OK, "stop": ["", "a"]}, 400, "empty string"),
        ("/v1/completions", {**OK, "logit_bias": {"5": 1}}, 400, "`logit_bias`"),
        ("/v1/completions", {**OK, "echo": True}, 400, "`echo`"),
        ("/v1/completions", {**OK, "stream_options": {}}, 400, "stream_options"),
        (
            "/v1/completions",
            {**OK, "response_format": {"type": "json_schema", "json_schema": {}}},
            400,
            "does not support response_format 'json_schema'",
        ),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "tools": [{}]}, 400, "tools"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "text parts",
        ),
        ("/detokenize", {"tokens": [10**9]}, 400, "out of vocabulary"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(
    post: Post, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    reply = post(path, **body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert says in error["message"]
    assert error["code"] == status
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"null", b""])
def test_a_body_that_is_no_json_object_is_a_400(server: NanoProcess, content: bytes) -> None:
    reply = httpx.post(
        f"{server.url}/completions", content=content, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_a_neutral_value_of_an_unsupported_field_is_fine(post: Post) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1,
               "repetition_penalty": 1.0, "response_format": {"type": "text"}}  # fmt: skip
    reply = post("/v1/completions", **OK, **neutral, user="x")
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_generated_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """40 requests (8 of them still waiting for a slot) are abandoned while the engine stands at its
    fifth step: it makes no sixth, though each asked for 250 tokens."""
    service = NanoService(folder, "nano")
    decode, steps, gate = service.model.decode, [0], threading.Event()

    def gated(rows: dict[int, tuple[int, int]]) -> Float32:
        steps[0] += 1
        assert steps[0] < 5 or gate.wait(30)
        return decode(rows)

    monkeypatch.setattr(service.model, "decode", gated)
    engine: Any = service.engine
    body = {"prompt": [5], "max_tokens": 250, "ignore_eos": True, "stream": stream}

    async def abandon(url: str) -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body))
                     for _ in range(40)]  # fmt: skip
            deadline = time.monotonic() + 30
            while steps[0] < 5 or len(engine._running) + len(engine._waiting) < 40:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        while not all(gen.cancelled for gen in [*engine._running.values(), *engine._waiting]):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        gate.set()
        while engine._running or engine._waiting:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            asyncio.run(abandon(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        finally:
            gate.set()
            server.should_exit = True
            thread.join()
    assert steps[0] == 5


def test_start_and_stop_of_a_server_process(folder: Path, tmp_path: Path) -> None:
    process = start_server(folder, log=tmp_path / "log", name="other")
    assert is_server(process.pid)
    assert os.getsid(process.pid) == process.pid, "detached: it outlives the terminal"
    assert httpx.get(f"{process.url}/models").json()["data"][0]["id"] == "other"
    assert process.url in (tmp_path / "log").read_text()
    assert stop_server(process.pid)
    assert not is_server(process.pid)
    assert not stop_server(process.pid)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{process.url}/models")


def test_stop_leaves_a_process_of_another_kind_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        assert not stop_server(bystander.pid)
        assert bystander.poll() is None
        bystander.send_signal(signal.SIGKILL)


def test_a_port_in_use_and_a_folder_that_is_no_model_are_explained(
    folder: Path, tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EndpointError, match="cannot listen"),
    ):
        start_server(folder, taken.getsockname()[1], log=tmp_path / "log")
    with pytest.raises(EndpointError) as caught:
        start_server(tmp_path, log=tmp_path / "log2")
    assert "tokenizer" in str(caught.value.raw)


def test_the_command_line_prints_its_address(folder: Path) -> None:
    command = [sys.executable, "-m", "shared.nano.server", "--port", "0", "--model", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("nano: ").strip()
        assert httpx.get(address.removesuffix("/v1") + "/health").status_code == 200
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
