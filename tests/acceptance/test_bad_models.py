"""Servers that misbehave during a run: every item ends, with its class and what the model said."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.home import Home, Said
from tests.fake_endpoint import FakeEndpoint, Reply, error
from tests.scripted import Server, http, speech

WORDS = http(Server(speech("SEVEN is the answer: \\boxed{7}")))
N = 3
ENDLESS = ("stalled", "a trickle without end", "a flood without end")
Script = Callable[[str, Any], Reply]


def instead(reply: Callable[[], Reply]) -> Script:
    """A server that is fine, until it is asked to complete something."""
    return lambda path, body: reply() if path == "/v1/completions" else WORDS(path, body)


def generate(home: Home, folder: Path, run: str, script: Script, *options: str) -> Said:
    file = folder / "problems.jsonl"
    rows = [{"problem": f"Is {i} seven?", "answer": "7"} for i in range(N)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with FakeEndpoint(script) as server:
        where = ["--base-url", server.base_url, "--model", "fake"]
        return home.quick("generate", str(file), "--run", run, *where, *options)


FAULTS: dict[str, tuple[Callable[[], Reply], str, str | None]] = {
    "429 without end": (lambda: error(429, "slow down"), "rate_limited", "slow down"),
    "500": (lambda: error(500, "out of memory"), "server_error", "out of memory"),
    "not JSON": (lambda: Reply(b"<html>nginx"), "bad_reply", "<html>nginx"),
    "not the promised JSON": (lambda: Reply(b'{"choices": []}'), "bad_reply", '{"choices": []}'),
    "stalled": (lambda: Reply(stall=True), "timeout", None),
    "a trickle without end": (
        lambda: Reply(chunks=itertools.repeat(b" "), pause=0.02), "timeout", None,
    ),
    "a flood without end": (lambda: Reply(chunks=itertools.repeat(b" " * 65536)), "*", None),
    "a broken connection": (lambda: Reply(reset=True), "unreachable", None),
    "too long a context": (
        lambda: error(400, "maximum context length is 8"), "context_overflow", "maximum context",
    ),
    "the key expires": (lambda: error(401, "expired"), "unauthorized", "expired"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_every_item_of_a_run_on_a_bad_server_is_accounted_for(
    home: Home, tmp_path: Path, kind: str
) -> None:
    """The run ends, with exit code 0: it did what could be done, and says what failed and why."""
    reply, error_class, raw = FAULTS[kind]
    # Impatient only where nothing else ends the waiting: a busy machine is not a bad server.
    impatient = ("timeout=1.5", "deadline=2", "max_retries=0")
    options = [
        f"--set={role}.endpoint.{setting}"
        for role in ("reasoner", "extractor")
        for setting in (impatient if kind in ENDLESS else ("max_retries=1",))
    ]
    said = generate(home, tmp_path, kind, instead(reply), *options)
    assert said.code == 0, said
    home.assert_reconciles(kind, N)
    assert home.count(kind, "state = 'failed'") == N
    rows = home.sql(
        "SELECT DISTINCT error_class, error_text, raw, failures FROM work_items \
            WHERE run_id = (SELECT id FROM runs WHERE name = %s)",
        kind,
    )
    classes = {"timeout", "bad_reply"} if error_class == "*" else {error_class}
    assert {row[0] for row in rows} <= classes
    assert all("/v1/completions" in row[1] for row in rows)
    assert all(raw in row[2] if raw else row[2] is None for row in rows)
    final = error_class in ("context_overflow", "unauthorized")
    assert {row[3] for row in rows} == {1 if final else 3}
    assert f"The counts reconcile: {N} items = {N} failed" in said.text
    sent = "SELECT sum(requests) FROM model_usage \
        WHERE run_id = (SELECT id FROM runs WHERE name = %s)"
    assert home.sql(sent, kind)[0][0] >= N, "failed requests are counted as well"


def test_a_storm_of_429_passes(home: Home, tmp_path: Path) -> None:
    """Once the server has calmed down everything is generated; nothing counts as a failure."""
    refusals = itertools.count()
    lock = threading.Lock()

    def calms_down() -> Reply | None:
        with lock:
            return error(429, "slow down", {"Retry-After": "0"}) if next(refusals) < 8 else None

    def script(path: str, body: Any) -> Reply:
        refused = calms_down() if path == "/v1/completions" else None
        return refused or WORDS(path, body)

    patient = [f"--set={role}.endpoint.max_retries=9" for role in ("reasoner", "extractor")]
    said = generate(home, tmp_path, "storm", script, *patient)
    assert said.code == 0, said
    home.assert_reconciles("storm", N)
    assert home.count("storm", "state = 'failed' OR failures > 0") == 0
    retries = "SELECT sum(retries) FROM model_usage WHERE role = 'reasoner' \
        AND run_id = (SELECT id FROM runs WHERE name = 'storm')"
    assert home.sql(retries)[0][0] == 8


def test_a_model_that_talks_nonsense_yields_rejected_trajectories(
    home: Home, tmp_path: Path
) -> None:
    """Terminal sequences, NUL, a lone surrogate: kept cleaned, judged, and no failure."""
    nonsense = "\x1b[2J\x00 \\ud800 ``` \\boxed{8}"
    server = Server(lambda user, response, seed: nonsense, lambda user, seed: "\x00}{" * 9)
    said = generate(home, tmp_path, "nonsense", http(server))
    assert said.code == 0, said
    home.assert_reconciles("nonsense", N)
    assert home.count("nonsense", "state = 'rejected'") == N
    assert "\x1b[2J" not in said.text
    cleaned = "SELECT bool_and(cleaned) FROM trajectories \
        WHERE run_id = (SELECT id FROM runs WHERE name = 'nonsense')"
    assert home.sql(cleaned) == [(True,)]
