"""Problems under any column names: --map, deeper columns, worked solutions, dataset folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import ConfigError, InputError
from shared.problems import field_map, load_problems
from shared.trajectory import Problem

GSM8K = {"question": "How many?", "answer": "She has 10 + 8 = 18.\n#### 18"}
DEEP = {"prompt": [{"role": "user", "content": "How many?"}], "reward": {"truth": "18"}}
WORKED = {"problem": "How many?", "solution": r"First \boxed{17}, no: \boxed{18}."}
EXPECTED = [Problem("How many?", "18", "p")]


def read(path: Path | str, *fields: str) -> list[Problem]:
    found = load_problems(str(path), fields=field_map(fields))
    return [Problem(one.text, one.answer, "p") for one in found]


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (GSM8K, ()),
        (GSM8K, ("problem=question,answer=answer",)),
        ({"q": "How many?", "final": 18}, ("problem=q", "answer=final")),
        (DEEP, ("problem=prompt.0.content,answer=reward.truth",)),
        ({"a.b": "How many?", "answer": "18"}, ("problem=a.b",)),
        (WORKED, ("answer=boxed:solution",)),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_of_any_name_are_read(
    tmp_path: Path, row: dict[str, Any], fields: tuple[str, ...], kind: str
) -> None:
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    assert read(path, *fields) == EXPECTED


def test_a_mapped_csv_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("nr,frage,lösung\n1,How many?,18\n")
    assert read(path, "problem=frage,answer=lösung,id=nr") == EXPECTED


def test_labels_are_mapped_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**GSM8K, "topic": "sums", "grade": 5, "uid": "x7"}))
    (one,) = load_problems(
        str(path), fields=field_map(["subject=topic,level=grade,id=uid,source=topic"])
    )
    assert (one.subject, one.level, one.external_id, one.source) == ("sums", "5", "x7", "sums")


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"q": "x"}, "problem=question", ["line 1", "no field 'question'", "has: 'q'", "--map"]),
        (GSM8K, "answer=final.0", ["no field 'final.0'"]),
        (DEEP, "problem=prompt,answer=reward.truth", ["field 'prompt' is a list", "a text"]),
        (DEEP, "problem=prompt.7.content", ["no field 'prompt.7.content'"]),
        (DEEP, "problem=prompt.0.content,answer=reward", ["'reward' is an object"]),
        ({**WORKED, "solution": "18"}, "answer=boxed:solution", ["'solution' has no complete"]),
        (WORKED, "id=solution", ["no field 'answer'", "--map answer=boxed:solution"]),
    ],
)
def test_a_row_without_the_mapped_column_is_named(
    tmp_path: Path, row: dict[str, Any], fields: str, said: list[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError) as caught:
        read(path, fields)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("problem", "is not FIELD=COLUMN"),
        ("problem=", "is not FIELD=COLUMN"),
        ("question=problem", "no field 'question'"),
        ("anser=final", "did you mean 'answer'"),
    ],
)
def test_a_map_that_is_none_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        field_map([setting])
    assert said in str(caught.value)


def test_answers_are_asked_for_unless_nobody_grades(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "How many?"}\n{"problem": "And now?", "answer": ""}\n')
    texts = [one.text for one in load_problems(str(path), answers=False)]
    assert texts == ["How many?", "And now?"]
    with pytest.raises(InputError, match="no field 'answer'"):
        read(path)


def test_dataset_folders_are_read_by_split(tmp_path: Path) -> None:
    """As `datasets` saves them: one split, several; and a folder of Parquet files."""
    one = datasets.Dataset.from_list([GSM8K])
    other = datasets.Dataset.from_list([{"question": "Which?", "answer": "#### 7"}])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "three").mkdir()
    one.to_parquet(str(tmp_path / "three" / "train-00000.parquet"))
    assert read(tmp_path / "one") == read(tmp_path / "two") == read(tmp_path / "three") == EXPECTED
    assert read(f"{tmp_path / 'two'}:test") == [Problem("Which?", "7", "p")]
    with pytest.raises(InputError, match="dataset cannot be read") as caught:
        read(f"{tmp_path / 'two'}:valid")
    assert "FOLDER:SPLIT" in str(caught.value)
