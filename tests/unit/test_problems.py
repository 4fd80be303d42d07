"""Problem files: what is read as what, and every bad input with its message and exit code."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared import problems, rows
from shared.errors import ConfigError, InputError
from shared.problems import load_problems, packaged_problems
from shared.trajectory import Problem

GOOD = '{"id": "a", "problem": "What is 6 times 7?", "answer": "42"}\n'
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: str | bytes, name: str = "p.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


def read(source: str, limit: int | None = None) -> list[Problem]:
    return list(load_problems(source, limit))


# What is read


def test_all_fields_and_their_aliases_are_read_and_others_ignored(write: Write) -> None:
    row = {"question": "q?", "target": 7, "level": 5, "subject": "Algebra", "id": 3, "extra": [1]}
    [problem] = read(write(json.dumps(row)))
    assert problem == Problem("q?", "7", "p.jsonl", "3", "Algebra", "5")
    [problem] = read(write('{"prompt": "q", "final_answer": "x", "source": "s", "level": null}'))
    assert problem == Problem("q", "x", "s")


@pytest.mark.parametrize("literal", ["72", "0.10", "1e5", "-3", "9" * 5000])
def test_numeric_answer_is_taken_as_it_is_written(write: Write, literal: str) -> None:
    [problem] = read(write(f'{{"problem": "q", "answer": {literal}}}'))
    assert problem.answer == literal
    assert type(problem.answer) is str


def test_worked_solution_of_gsm8k_gives_what_follows_the_four_hashes(write: Write) -> None:
    row = {"question": "q", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"}
    assert read(write(json.dumps(row)))[0].answer == "72"


def test_same_rows_in_every_format_are_the_same_problems(write: Write, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "problem": 'Say "hi, {x}"\nnow', "answer": "42", "source": "s"},
        {"id": "b", "problem": "Ünïcode", "answer": "7", "source": "s"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = 'id,problem,answer,source\na,"Say ""hi, {x}""\nnow",42,s\nb,Ünïcode,7,s\n'
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    sources = [
        write(lines),
        write(lines.replace("\n", "\r\n"), "p.json"),
        write(gzip.compress(lines.encode()), "p.jsonl.gz"),
        write("\ufeff" + cells, "p.csv"),
        write(gzip.compress(cells.encode()), "P.CSV.GZ"),
        str(tmp_path / "p.parquet"),
    ]
    expected = [Problem(r["problem"], r["answer"], "s", r["id"]) for r in rows]
    assert [read(source) for source in sources] == [expected] * len(sources)


def test_duplicates_and_blank_answers_are_left_out_and_counted(write: Write) -> None:
    other_id = GOOD.replace('"a"', '"b"')
    blank = '{"problem": "proof", "answer": " "}\n{"problem": "p", "answer": null}\n'
    stream = load_problems(write(GOOD + "\n" + GOOD + other_id + blank))
    assert len(list(stream)) == 1
    assert (stream.n_rows, stream.n_duplicates, stream.n_unanswered) == (5, 2, 2)


def test_limit_counts_distinct_problems_and_reads_no_further(write: Write) -> None:
    second = GOOD.replace("6", "8").replace('"a"', '"b"')
    assert len(read(write(GOOD + GOOD + second + "{broken"), limit=2)) == 2


def test_file_is_streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two problems are had from a file that never ends."""

    def endless(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in iter(int, 1):
            yield i, {"problem": f"{next(numbers)}", "answer": "1"}

    numbers = iter(range(10**9))
    monkeypatch.setattr(rows, "_jsonl", endless)
    (tmp_path / "p.jsonl").touch()
    assert len(list(islice(load_problems(str(tmp_path / "p.jsonl")), 2))) == 2


def test_packaged_problems_go_by_the_name_nano(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    assert packaged_problems().parts[-3:] == ("shared", "nano", "problems.jsonl")
    path = Path(write(GOOD))
    monkeypatch.setattr(problems, "packaged_problems", lambda: path)
    assert [p.answer for p in load_problems("nano")] == ["42"]


# Bad input: (content, file name, what the message must hold)

BAD = {
    "missing problem": ('{"answer": "1"}', "p.jsonl", ["line 1", "'problem' or", "'answer'"]),
    "missing answer": (GOOD + '{"problem": "q"}', "p.jsonl", ["line 2", "no field 'answer' or"]),
    "only a solution": (
        '{"problem": "q", "solution": "\\\\boxed{1}"}', "p.jsonl", ["line 1", "worked solution"]
    ),
    "wrong type": (GOOD + '{"problem": "q", "answer": ["1"]}', "p.jsonl", ["line 2", "a list"]),
    "bool answer": ('{"problem": "q", "answer": true}', "p.jsonl", ["true or false", "a number"]),
    "number problem": ('{"problem": 1, "answer": "1"}', "p.jsonl", ["'problem' is a number"]),
    "NaN answer": ('{"problem": "q", "answer": NaN}', "p.jsonl", ["line 1", "nan", "expected"]),
    "broken line": (GOOD + '{"problem": "q", answer}', "p.jsonl", ["line 2", "column 18"]),
    "cut off": (GOOD + GOOD[:30], "p.jsonl", ["line 2", "broken JSON"]),
    "no object": (GOOD + "17", "p.jsonl", ["line 2", "expected one JSON object", "17"]),
    "nested": ("[" * 100_000 + "]" * 100_000, "p.jsonl", ["line 1", "nested too deeply"]),
    "JSON array": ("[\n" + GOOD + "]", "p.json", ["over several lines", "one object a line"]),
    "empty": ("", "p.jsonl", ["it is empty", "expected"]),
    "blank": ("\n \n\n", "p.jsonl", ["it is empty"]),
    "no answers": ('{"problem": "q", "answer": ""}', "p.jsonl", ["none of its 1 rows"]),
    "empty problem": (GOOD + '{"problem": " ", "answer": "1"}', "p.jsonl", ["line 2", "is empty"]),
    "NUL": (GOOD.encode() + b"\0\1", "p.jsonl", ["line 2", "binary", "UTF-8"]),
    "not UTF-8": (GOOD.encode() + b'{"problem": "\xff"}', "p.jsonl", ["line 2", "0xff"]),
    "UTF-16": (GOOD.encode("utf-16"), "p.jsonl", ["line 1", "binary", "UTF-8"]),
    "endless line": (b"x" * (rows.MAX_LINE + 2), "p.jsonl", ["line 1", "a line of more than"]),
    "same id": (GOOD + GOOD.replace("42", "43"), "p.jsonl", ["line 2", "id 'a'", "line 1"]),
    "not gzip": (GOOD, "p.jsonl.gz", ["gzip cannot read it"]),
    "cut gzip": (gzip.compress(GOOD.encode() * 999)[:-20], "p.jsonl.gz", ["gzip cannot read it"]),
    "damaged gzip": (gzip.compress(GOOD.encode())[:10] + b"\xff" * 40, "p.csv.gz", ["gzip"]),
    "CSV cells": ("problem,answer\nq,1\nq,1,2\n", "p.csv", ["line 3", "3 cells", "2 columns"]),
    "CSV quote": ('problem,answer\n"q,1\n', "p.csv", ["line 2", "broken CSV"]),
    "CSV header": ("a,b\n1,2\n", "p.csv", ["line 2", "no field 'problem' or", "'a', 'b'"]),
    "CSV only header": ("problem,answer\n", "p.csv", ["it is empty"]),
    "not Parquet": (GOOD, "p.parquet", ["cannot be read as Parquet"]),
    "unknown kind": (GOOD, "p.txt", ["what kind", ".jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "name", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_named_with_what_was_found_and_expected(
    write: Write, content: str | bytes, name: str, message: list[str]
) -> None:
    source = write(content, name)
    with pytest.raises(InputError) as caught:
        read(source)
    assert caught.value.exit_code == 2
    assert source in (caught.value.where or "")
    assert caught.value.remedy
    assert [part for part in message if part not in str(caught.value)] == []
    assert len(str(caught.value)) < 1000
    assert "\0" not in str(caught.value)


def test_missing_file_and_folder_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        load_problems("data/none.jsonl")  # looks like ORG/NAME, but for its suffix
    with pytest.raises(InputError, match=r"folder, not a file(.|\n)*\*.jsonl"):
        load_problems(str(tmp_path))


def test_parquet_of_other_columns_or_types_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "p.parquet")
    for row, message in [
        ({"text": "q", "label": 1}, "no field 'problem' .*'text', 'label'(.|\n)*row 1"),
        ({"problem": b"q", "answer": "1"}, "'problem' is bytes"),
        ({"problem": "q", "answer": float("nan")}, "expected a text or a number"),
    ]:
        pq.write_table(pa.Table.from_pylist([row]), path)
        with pytest.raises(InputError, match=message):
            read(path)
    pq.write_table(pa.table({"problem": ["q"], "answer": [72]}), path)
    assert read(path)[0].answer == "72"


# Optional libraries


@pytest.mark.parametrize(
    ("source", "module", "install"),
    [("p.parquet", "pyarrow", "tirgen[parquet]"), ("org/name:test", "datasets", "tirgen[hub]")],
)
def test_missing_library_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, module: str, install: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        read(source)
    assert f"'{module}'" in caught.value.what
    assert f"pip install '{install}'" in (caught.value.remedy or "")


def fake_datasets(rows: list[dict[str, Any]] | Exception) -> tuple[ModuleType, list[Any]]:
    module, calls = ModuleType("datasets"), []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((*args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.exceptions = SimpleNamespace(DatasetsError=KeyError)  # type: ignore[attr-defined]
    return module, calls


def test_dataset_names_become_streamed_configs_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = fake_datasets([{"question": "q", "answer": "w\n#### 72"}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    for source in ("openai/gsm8k", "openai/gsm8k:test", "openai/gsm8k:main:test"):
        assert read(source) == [Problem("q", "72", source)]
    assert calls == [
        ("openai/gsm8k", None, {"split": "train", "streaming": True}),
        ("openai/gsm8k", None, {"split": "test", "streaming": True}),
        ("openai/gsm8k", "main", {"split": "test", "streaming": True}),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach the Hub"), ValueError("Unknown split"), KeyError("x")]
)
def test_unreachable_or_unknown_dataset_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(error)[0])
    with pytest.raises(InputError, match="dataset cannot be read") as caught:
        read("org/name")
    assert "ORG/NAME:SPLIT" in (caught.value.remedy or "")
