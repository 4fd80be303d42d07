"""up, status, doctor, down: any of them at any time, any number of times."""

from __future__ import annotations

import json
from pathlib import Path

from tests.acceptance.home import Home, alive, until


def running(home: Home) -> dict[str, bool]:
    parts = json.loads(home.quick("status", "--format", "json").text)
    return {part["part"]: part["running"] for part in parts}


def test_a_second_up_starts_nothing_and_a_second_down_stops_nothing(tmp_path: Path) -> None:
    """The same processes serve after a second `up`; after `down` none of this home is left."""
    home = Home(tmp_path / "a home")
    assert running(home) == dict.fromkeys(("database", "broker", "policy", "worker"), False)
    assert home.quick("down").code == 0
    assert not home.folder.exists(), "looking and stopping make nothing"
    try:
        assert home.tirgen("up").code == 0
        first = home.postmaster().pid, home.worker().pid
        until(lambda: len(home.worker().children()) >= 1, "the worker has forked")
        assert home.quick("up").code == 0
        assert (home.postmaster().pid, home.worker().pid) == first
        assert running(home) == dict.fromkeys(("database", "broker", "policy", "worker"), True)
        said = home.quick("doctor")
        assert said.code == 0, said
        assert [line[:2] for line in said.text.splitlines()] == ["ok"] * 6
        assert home.quick("generate", "nano", "--limit", "2", "--run", "two").code == 0
        before = home.processes()
        assert len(before) >= 4, "control: they are seen"
    finally:
        assert home.tirgen("down").code == 0
    assert not [process for process in before if alive(process)]
    assert not home.processes()
    assert home.quick("down").code == 0
    assert running(home) == dict.fromkeys(("database", "broker", "policy", "worker"), False)


def test_doctor_names_the_part_that_does_not_work(home: Home) -> None:
    """Exit code 1, the others still checked, and a remedy."""
    sick = Home(home.folder, TIRGEN_BROKER_URL="amqp://guest:secret@127.0.0.1:9//")
    said = sick.quick("doctor")
    assert said.code == 1, said
    assert "fail broker" in said.text
    assert "TIRGEN_BROKER_URL" in said.text
    assert "secret" not in said.text
    assert "ok   database" in said.text
    assert "ok   sandbox" in said.text
