"""What a person gets wrong: one message with the place and the remedy, an exit code, no row."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.home import Home
from tests.fake_endpoint import FakeEndpoint, Reply, error, models, ok

GOOD = '{"problem": "What is 1 + 1?", "answer": "2"}\n'
TABLES = ("runs", "work_items", "problems")


@pytest.fixture
def untouched(home: Home) -> Iterator[Home]:
    """Whatever the test does, it must not write a row."""

    def rows() -> list[int]:
        return [home.sql(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES]

    before = rows()
    yield home
    assert rows() == before


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


FILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "missing field": (
        GOOD + '{"problem": "And 2?"}\n',
        ("no field 'answer'", "the row has: 'problem'", "line 2", "to do: "),
    ),
    "broken line": (
        GOOD + GOOD + '{"problem": "And 2?", answer: 2}\n',
        ("broken JSON at column 23", "line 3", "to do: "),
    ),
    "not an object": (GOOD + "[1, 2]\n", ("expected one JSON object a line", "line 2")),
    "empty": ("", ("it is empty", "to do: ")),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\0", ("binary data", "line 1", "UTF-8")),
    "one id for two problems": (
        '{"id": 1, "problem": "a", "answer": "1"}\n{"id": 1, "problem": "b", "answer": "1"}\n',
        ("the id '1' is already that of another problem, in line 1", "line 2", "to do: "),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_named_with_its_line(untouched: Home, tmp_path: Path, kind: str) -> None:
    """Exit code 2; the message says where, and what was expected."""
    content, expected = FILES[kind]
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = untouched.quick("generate", str(file))
    assert said.code == 2, said
    for part in ("error: ", str(file), *expected):
        assert part in said.text, said


TOML = "[budgets]\ncalls = = 3\n"
SETTINGS = {
    "unknown key": (("--set", "budgets.cals=2"), ("budgets.cals: unknown key", "'calls'?")),
    "wrong type": (("--set", "budgets.calls=many"), ("budgets.calls: ", "integer", "to do: ")),
    "no value": (("--set", "budgets"), ("'budgets' is not key=value", "--set")),
    "unknown preset": (("--preset", "papper"), ("no preset 'papper'", "did you mean 'paper'?")),
    "broken TOML": (("--config", "FOLDER/my.toml"), ("Not valid TOML", "my.toml", "line 2")),
    "no such config": (("--config", "FOLDER/no.toml"), ("Cannot read the config file", "no.toml")),
    "no such option": (("--sampels", "2"), ("No such option", "--samples")),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_bad_setting_is_named(untouched: Home, tmp_path: Path, kind: str) -> None:
    """Exit code 2, with the nearest thing that there is."""
    arguments, expected = SETTINGS[kind]
    (tmp_path / "my.toml").write_text(TOML)
    given = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    said = untouched.quick("generate", "nano", *given)
    assert said.code == 2, said
    for part in expected:
        assert part in said.text, said


def test_a_process_of_its_own_ends_with_the_same_code(untouched: Home, tmp_path: Path) -> None:
    """What the other tests here read off `main` is what a shell sees, on stderr and in $?."""
    file = tmp_path / "problems.jsonl"
    file.write_text("{\n")
    with untouched.start("generate", str(file), stderr=-1) as process:
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr


def words(path: str, body: object) -> Reply:
    return ok({"tokens": [1]})


ENDPOINTS = {
    "401": (error(401, "bad key"), words, ("answered 401", "OPENAI_API_KEY")),
    "no such model": (models("qwen"), words, ("does not have the model 'fake'", "qwen")),
    "no models at all": (error(404, "what?"), words, ("answered 404", "ends in /v1")),
    "not JSON": (Reply(b"<html>"), words, ("not what the API promises", "OpenAI-compatible")),
    "no /tokenize": (models("fake"), lambda *_: error(404, "Not Found"), ("/tokenize", "404")),
    "server error": (error(503, "loading"), words, ("answered 503", "log")),
}


@pytest.mark.parametrize("kind", ENDPOINTS)
def test_an_endpoint_that_will_not_do_is_found_before_the_run(untouched: Home, kind: str) -> None:
    """Exit code 1, the address and what to do about it."""
    listing, script, expected = ENDPOINTS[kind]
    with FakeEndpoint(script, models=listing) as server:
        where = ["--base-url", server.base_url, "--model", "fake"]
        patience = [f"--set={role}.endpoint.max_retries=0" for role in ("reasoner", "extractor")]
        said = untouched.quick("generate", "nano", "--limit", "1", *where, *patience)
        assert said.code == 1, said
        for part in (server.base_url.removesuffix("/v1"), "to do: ", *expected):
            assert part in said.text, said


def test_an_unreachable_endpoint_is_named(untouched: Home) -> None:
    url = f"http://127.0.0.1:{closed_port()}/v1"
    said = untouched.quick("generate", "nano", "--base-url", url)
    assert said.code == 1, said
    for part in ("cannot be reached", url, "to do: Is the server up?"):
        assert part in said.text, said


def test_a_name_that_is_taken_is_refused(home: Home) -> None:
    """Exit code 2 with the command that goes on with it; the run is not touched."""
    asked = ["generate", "nano", "--limit", "1", "--run", "taken"]
    assert home.quick(*asked).code == 0
    before = home.finished("taken")
    said = home.quick(*asked)
    assert said.code == 2, said
    assert "a run named 'taken' already" in said.text
    assert "tirgen resume taken" in said.text
    assert home.finished("taken") == before
    assert home.count("taken") == 1


def test_a_run_that_is_not_there_is_named(untouched: Home) -> None:
    for command in ("resume", "retry", "cancel", "stats"):
        said = untouched.quick(command, "nowhere")
        assert said.code == 2, said
        assert "no run named 'nowhere'" in said.text


def test_a_database_that_is_down_is_named(untouched: Home) -> None:
    """Without its password."""
    url = f"postgresql://me:secret@127.0.0.1:{closed_port()}/db"
    said = Home(untouched.folder, TIRGEN_DATABASE_URL=url).quick("generate", "nano")
    assert said.code == 1, said
    for part in ("PostgreSQL cannot be used", "127.0.0.1", "TIRGEN_DATABASE_URL"):
        assert part in said.text, said
    assert "secret" not in said.text


def test_a_broker_that_is_down_is_named(untouched: Home) -> None:
    """Exit code 1 and the address without its password."""
    url = f"amqp://me:secret@127.0.0.1:{closed_port()}//"
    away = Home(untouched.folder, TIRGEN_BROKER_URL=url)
    said = away.quick("generate", "nano", "--limit", "1")
    assert said.code == 1, said
    for part in ("the broker does not answer", "amqp://me:**@127.0.0.1", "TIRGEN_BROKER_URL"):
        assert part in said.text, said
    assert "secret" not in said.text


@pytest.mark.parametrize("command", [("generate", "nano"), ("up",), ("status",), ("doctor",)])
def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A file is in the way; root, too, cannot write below it. `status` and `doctor` still look."""
    (tmp_path / "file").write_text("in the way")
    blocked = Home(tmp_path / "file" / "home")
    said = blocked.quick(*command)
    assert "Traceback" not in said.text
    if command == ("status",):
        assert said.code == 0, said
        return
    assert said.code == (1 if command == ("doctor",) else 2), said
    for part in ("TIRGEN_HOME cannot be written", str(blocked.folder), "to do: set TIRGEN_HOME"):
        assert part in said.text, said


def test_show_config_prints_what_would_be_used(untouched: Home) -> None:
    """Control: what the tests above refuse, they refuse for the reason that they name."""
    said = untouched.quick("generate", "nano", "--show-config", "--set", "budgets.calls=2")
    assert said.code == 0, said
    assert json.loads(said.text)["budgets"]["calls"] == 2
