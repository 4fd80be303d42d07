"""From the command line to configurations: what a wrong word is told, before anything is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl.cli import app
from rl.evaluation import benchmarks
from rl.evaluation.config import differences
from rl.evaluation.engines import digest
from rl.evaluation.plan import Asked, plan, points
from rl.folder import describe
from shared.errors import ConfigError, InputError
from tirgen.stack import WEIGHTS

NANO = [benchmarks.find("nano")]


def test_nano_brings_its_own_prompts_and_context() -> None:
    [one] = plan("e", Asked(model="nano"), NANO, limit=3)
    config = one.config
    assert (config.policy.prompts, config.policy.label) == ("compact", "nano/weights")
    assert config.budgets.context <= 1024
    assert (config.benchmark.name, config.benchmark.n, len(one.problems)) == ("nano", 3, 3)
    other = Asked(model="nano", settings=("policy.prompts=full",))
    assert plan("e", other, NANO, limit=3)[0].config.policy.prompts == "full"


def test_what_the_trainer_wrote_beside_the_weights_is_taken(tmp_path: Path) -> None:
    describe(tmp_path, prompts="compact", thinking=True)
    policy = plan("e", Asked(model=str(tmp_path)), NANO, limit=1)[0].config.policy
    assert (policy.prompts, policy.thinking) == ("compact", True)
    (tmp_path / "tirgen.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        plan("e", Asked(model=str(tmp_path)), NANO, limit=1)


def test_a_folder_says_in_what_it_is_stored_and_how_long_its_context_is(tmp_path: Path) -> None:
    """In bf16, which CPUs compute slowly, weights of fp32 would not be those that were trained; and
    no command line has to know what is written in the folder."""

    def of(**config: object) -> tuple[str, int]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        made = plan("e", Asked(model=str(tmp_path)), NANO, limit=1)[0].config
        return made.policy.dtype, made.budgets.context

    assert of(dtype="float32", max_position_embeddings=1024) == ("fp32", 1024)
    assert of(torch_dtype="bfloat16", max_position_embeddings=131072) == ("bf16", 8192)
    assert of(text_config={"dtype": "float32", "max_position_embeddings": 512}) == ("fp32", 512)
    assert of(dtype="float16") == ("bf16", 8192)
    assert of(dtype=3, text_config="?", max_position_embeddings="many") == ("bf16", 8192)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        plan("e", Asked(model=str(tmp_path)), NANO, limit=1)


def test_the_packaged_folder_is_nano_by_whatever_name() -> None:
    [by_name], [by_path] = (
        plan("e", Asked(model=m), NANO, limit=1) for m in ("nano", str(WEIGHTS))
    )
    assert by_path.config == by_name.config


def test_a_point_for_each_combination() -> None:
    assert points([]) == [("", ())]
    assert points(["n_corr=1,4", "l_suf=9"]) == [
        ("n_corr=1,l_suf=9", ("correction.n_corr=1", "correction.l_suf=9")),
        ("n_corr=4,l_suf=9", ("correction.n_corr=4", "correction.l_suf=9")),
    ]
    made = plan("e", Asked(model="nano"), NANO, limit=1, sweep=["n_corr=1,4"])
    assert [one.evaluation for one in made] == ["e@n_corr=1", "e@n_corr=4"]
    assert [one.config.correction.n_corr for one in made] == [1, 4]


def test_the_fingerprint_is_of_what_is_measured(tmp_path: Path) -> None:
    """Not of addresses or patience; of every setting that decides, and of the weights' content."""
    [base] = plan("e", Asked(model="nano"), NANO, limit=2)

    def changed(*settings: str, limit: int = 2) -> list[str]:
        [other] = plan("e", Asked(model="nano", settings=settings), NANO, limit=limit)
        same = other.config.fingerprint == base.config.fingerprint
        found = differences(base.config, other.config)
        assert same == (not found)
        return [line.partition(":")[0] for line in found]

    assert changed("in_flight=3", "tool.minimum_tier=A", "samples=9") == []
    assert changed("seed=1") == ["seed"]
    assert changed("correction.l_suf=3") == ["correction"]
    assert changed(limit=3) == ["benchmark.digest", "benchmark.n"]
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    before = digest(tmp_path)
    weights.write_bytes(b"a" * 99 + b"b")
    assert digest(tmp_path) != before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is no benchmark"),
        (["--benchmark", "nano"], "give --model DIR"),
        (["--benchmark", "nano", "--model", "nano", "--base-url", "http://x/v1"], "give --model"),
        (["--benchmark", "nanno", "--model", "nano"], "did you mean 'nano'?"),
        (["--benchmark", "nano", "--benchmark", "nano", "--model", "nano"], "named twice"),
        (["--benchmark", "nano", "--model", "./nothing"], "there is no such folder"),
        (["--benchmark", "nano", "--model", "nano", "--run", "a@b"], "is no name"),
        (["--benchmark", "nano", "--model", "nano", "--strategy", "sufix"], "correction.strategy"),
        (["--benchmark", "nano", "--model", "nano", "--set", "budgets.call=3"], "'calls'?"),
        (["--benchmark", "nano", "--model", "nano", "--no-code", "2"], "neither a rate"),
        (["--benchmark", "nano", "--model", "nano", "--sweep", "n_corr"], "is not NAME=VALUE"),
    ],
)
def test_a_wrong_word_is_named(arguments: list[str], told: str) -> None:
    found = CliRunner().invoke(app, ["eval", *arguments, "--dry-run"])
    assert isinstance(found.exception, ConfigError | InputError), found.output
    assert told in str(found.exception)
    assert found.exception.exit_code == 2


def test_a_dry_run_prints_every_key_and_stores_nothing() -> None:
    found = CliRunner().invoke(
        app,
        ["eval", "--model", "nano", "--benchmark", "nano@4", "--limit", "5", "--strategy", "suffix",
         "--n-corr", "2", "--l-suf", "7", "--samples", "3", "--dry-run", "--format", "json"],
    )  # fmt: skip
    [config] = json.loads(found.output)
    assert config["samples"] == 4, "the benchmark's own number"
    assert config["correction"]["n_corr"] == 2
    assert config["correction"]["l_suf"] == 7
