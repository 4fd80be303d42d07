"""The report is one page that needs nothing else, whatever a model wrote into it; the commands."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.evaluation import report, results, runs
from rl.evaluation.figures import Settings
from shared.store import Database
from shared.trajectory import Problem
from tests import evaluated
from tests.stored import HOSTILE


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def stored(db: Database, name: str, problems: list[Problem], **more: object) -> None:
    config = evaluated.config(problems, 3, **more)
    evaluated.work(db, runs.start(db, name, config, problems))


def test_a_page_that_needs_nothing_and_runs_nothing(db: Database, tmp_path: Path) -> None:
    """Hostile text is in the prompt of every attempt, hence on the page; it stays text."""
    evil = f"<script>alert(1)</script><img src=x onerror=alert(2)>{HOSTILE}"
    problems = [
        Problem(f"{p.text} {evil}", p.answer, p.source, p.external_id, evil, None)
        for p in evaluated.questions(6)
    ]
    stored(db, "<b>e</b>", problems)
    made = [results.load(db, run) for run in runs.find(db, "<b>e</b>")]
    path = report.write(db, "<b>e</b>", made, tmp_path / "r", Settings())
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert(1)</script>" in page.text, "it is shown, as text"
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "b1"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text), "no control character is left"
    names = sorted(file.name for file in (tmp_path / "r").iterdir())
    assert names == ["accuracy.png", "cost.png", "funnel-times.png", "index.html"]


def test_the_page_shows_tries_before_and_after(db: Database, tmp_path: Path) -> None:
    stored(db, "e", evaluated.questions(10))
    made = [results.load(db, run) for run in runs.find(db, "e")]
    text = report.write(db, "e", made, tmp_path, Settings()).read_text(encoding="utf-8")
    page = Page(text)
    for shown in ("corrected, and right", "taken back", "before: a try that failed", "masked",
                  "NameError", "k attempts".replace("k", "3"), "Calls that stand and the answer",
                  "accuracy", "best-of-3"):  # fmt: skip
        assert shown in page.text, shown


def run(arguments: list[str]) -> str:
    found = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture
def at(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIRGEN_DATABASE_URL", database_url)


@pytest.mark.usefixtures("at")
def test_the_commands_over_stored_evaluations(db: Database, tmp_path: Path) -> None:
    problems = evaluated.questions(12)
    stored(db, "s@n_corr=0", problems, correction={"strategy": "none"})
    stored(db, "s@n_corr=2", problems)
    told = json.loads(run(["compare", "s@n_corr=0", "s@n_corr=2", "--format", "json"]))
    assert told[0]["n_common"] == 12
    assert any(line.startswith("correction") for line in told[0]["differences"])
    by_name = {figure["name"]: figure for figure in told[0]["figures"]}
    assert by_name["call pass rate"]["difference"] > 0
    for figure in by_name.values():
        assert {"p", "low", "high", "n"} <= figure.keys()
    assert "sides swapped question by question" in run(["compare", "s@n_corr=0", "s@n_corr=2"])

    shown = run(["analyze", "show", "s@n_corr=2"])
    for part in ("k ", "seeds", "judge", "budgets", "95 % interval", "first-try"):
        assert part in shown, part
    funnel = json.loads(run(["analyze", "correction", "s@n_corr=2", "--format", "json"]))
    assert funnel[0]["corrected"]
    assert "never corrected" in run(["analyze", "correction", "s@n_corr=2"])
    both = json.loads(run(["analyze", "tool-success", "s@n_corr=2", "--format", "json"]))
    assert [one["calls"] for one in both] == ["calls that stand", "first tries"]
    assert "within questions" in run(["analyze", "tool-success", "s@n_corr=2"])
    points = json.loads(run(["analyze", "sweep", "s", "--format", "json", "--plot",
                             str(tmp_path / "sweep.png")]))  # fmt: skip
    assert [one["run"] for one in points] == ["s@n_corr=0/times", "s@n_corr=2/times"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("at")
def test_nano_from_the_command_line(tmp_path: Path) -> None:
    """The packaged policy, its real weights and a real sandbox; the second time nothing is left
    to do, and the figures are the same."""
    command = ["eval", "--model", "nano", "--benchmark", "nano", "--limit", "4", "--samples", "2",
               "--strategy", "suffix", "--run", "n", "--format", "json"]  # fmt: skip
    told = json.loads(run([*command, "--report", str(tmp_path)]))
    [one] = told[0]["runs"]
    assert one["run"] == "n/nano"
    assert (one["n_questions"], one["n_attempts"], one["failures"]) == (4, 8, {})
    by_name = {figure["name"]: figure["value"] for figure in one["figures"]}
    assert by_name["accuracy"] > 0.5
    assert by_name["code ratio"] > 0.5
    assert (tmp_path / "index.html").exists()
    again = json.loads(run(command))
    assert again[0]["runs"][0]["figures"] == one["figures"]
