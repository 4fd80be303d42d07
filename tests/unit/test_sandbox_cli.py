"""`tirgen sandbox run` and `check`, and what a run says of its sandbox before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from shared.errors import SandboxError
from shared.sandbox import Sandbox, Tier, conformance, pool
from tirgen.cli import generate
from tirgen.cli import sandbox as commands
from tirgen.config import RunConfig, load


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zygotes that preload nothing."""

    def backend(url: str | None, minimum: Tier) -> Sandbox:
        return Sandbox(zygotes=1, minimum_tier=minimum, preload=(), warmup="")

    monkeypatch.setattr(commands, "backend", backend)


def tirgen(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), input=stdin)


def test_a_program_from_a_file_or_from_standard_input(tmp_path: Path) -> None:
    program = tmp_path / "p.py"
    program.write_text("import random; print(6 * 7, random.random())")
    first = tirgen("run", str(program), "--seed", "3")
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("42 ")
    assert "[ok, tier A" in first.stderr
    assert tirgen("run", "-", "--seed", "3", stdin=program.read_text()).stdout == first.stdout


def test_a_failure_is_exit_code_1_with_the_traceback_on_standard_error() -> None:
    failed = tirgen("run", "-", stdin="print('before')\n1 / 0")
    assert (failed.exit_code, failed.stdout) == (1, "before\n")
    assert "ZeroDivisionError" in failed.stderr
    assert "[model_error, tier A" in failed.stderr


def test_what_code_prints_does_not_reach_the_terminal_as_control() -> None:
    shown = tirgen("run", "-", stdin="print('\\x1b[31mred')").output
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown
    body = json.loads(tirgen("run", "-", "--format", "json", stdin="print('\\x9b')").stdout)
    assert (body["outcome"], body["stdout"], body["tier"]) == ("ok", "\x9b\n", "A")


def test_check_counts_the_claims_and_names_those_that_are_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = conformance.Case("one is one", "print(1)", stdout="1\n")
    false = conformance.Case("one is two", "print(1)", stdout="2\n")
    monkeypatch.setattr(conformance, "CASES", (true,))
    said = tirgen("check")
    assert (said.exit_code, said.stdout) == (0, "1 of 1 claims hold at tier A.\n")
    monkeypatch.setattr(conformance, "CASES", (true, false))
    said = tirgen("check")
    assert said.exit_code == 1
    assert "fail one is two" in said.stdout
    assert "stdout: '1\\n'" in said.stdout
    assert said.stdout.endswith("1 of 2 claims hold at tier A.\n")


@pytest.fixture
def config() -> RunConfig:
    return load("nano", base_url="http://127.0.0.1:1/v1")


def client(has_workers: bool = True) -> Any:
    return SimpleNamespace(stack=SimpleNamespace(has_workers=has_workers))


def test_a_run_says_its_tier_and_its_minimum(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    generate._announce_sandbox(client(), config)
    generate._announce_sandbox(client(has_workers=False), config)
    assert capsys.readouterr().out.splitlines() == [
        "sandbox: tier A (minimum B)",
        "sandbox: on the workers' hosts (minimum B)",
    ]


def test_a_run_whose_minimum_is_not_reached_does_not_start(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "TIERS", (Tier.C,))
    with pytest.raises(SandboxError, match="tier B or stronger"):
        generate._announce_sandbox(client(), config)
