"""Job files, the commands and scripts that come of them, and the keeper that ends what it began."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl.config import SftConfig
from rl.config import load as load_config
from rl.job_file import Spec, host_commands, load, make_spec
from rl.job_rows import Hold
from rl.logs import Follower, last_lines, read_tail, settled
from rl.slurm import script
from rl.verdicts import verdict
from shared.config import merge_settings
from shared.errors import ConfigError
from shared.store.models import JobState
from tests.processes import kill

ROOT = Path(__file__).parents[2]

JOB = """
[job]
name = "sft-1"
command = "sft"
snapshot = "gsm-v1"
model = "Qwen/Qwen3-0.6B"
python = "python"
"""


def job_file(folder: Path, text: str) -> Path:
    file = folder / "job.toml"
    file.write_text(text)
    return file


def spec(folder: Path, text: str = JOB, *settings: str) -> Spec:
    return make_spec(load(job_file(folder, text), settings), folder)


# The file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (JOB + "proceses = 2", r"job.proceses: unknown key; did you mean 'processes'?"),
        (JOB + "[slurm]\nparttion = 'x'", r"slurm.parttion: unknown key; did you mean 'partition'"),
        (JOB + "where = 'slrum'", "job.where: Input should be 'local', 'slurm' or 'celery'"),
        (JOB + "nodes = 2", "nodes needs where = 'slurm'"),
        (JOB + "where = 'slurm'\nhosts = ['a']", "hosts and hostfile need where = 'local'"),
        (JOB + "hosts = ['a']\nhostfile = 'h'", "one of them"),
        (JOB.replace("sft-1", "../sft"), "job.name"),
        (JOB + "[slurm]\noptions = [\"a\\n#SBATCH --x\"]", "slurm.options"),
        ("[job]", "job.name: Field required"),
        ("[job", "Not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_before_anything_starts(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(job_file(tmp_path, text))
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


def test_settings_go_over_the_file(tmp_path: Path) -> None:
    file = job_file(tmp_path, JOB)
    chosen = load(file, ["job.name=other", "job.processes=4", "set.optimizer.lr=0.5"])
    assert (chosen.job.name, chosen.job.processes) == ("other", 4)
    assert chosen.set == {"optimizer": {"lr": 0.5}}


def test_recipe_settings_reach_the_trainer_as_they_were_written(tmp_path: Path) -> None:
    """Through the command line and the trainer's own reader, every kind of value."""
    over = """
    [set]
    "optimizer.lr" = 1e-6
    "data.split" = "tra\\"in ü"
    [set.engine]
    max_grad_norm = 2.5
    offload_optimizer = true
    [set.log]
    trackers = ["wandb", "trackio"]
    """
    arguments = spec(tmp_path, JOB + over).arguments
    given = [value for name, value in pairwise(arguments) if name == "--set"]
    values: dict[str, Any] = {}
    merge_settings(values, given)
    assert values == {
        "optimizer": {"lr": 1e-6},
        "data": {"split": 'tra"in ü'},
        "engine": {"max_grad_norm": 2.5, "offload_optimizer": True},
        "log": {"trackers": ["wandb", "trackio"]},
    }
    config = load_config(SftConfig, settings=given, model="m", snapshot="s")
    assert config.log.trackers == ("wandb", "trackio")


# The commands


def test_one_process_is_plain_and_more_are_torchruns(tmp_path: Path) -> None:
    """Everything absolute: the job may be started from anywhere, later."""
    (tmp_path / "r.toml").write_text("epochs = 2")
    (tmp_path / "model").mkdir()
    given = spec(tmp_path, JOB, "job.recipe=r.toml", "job.model=./model", "job.out=o")
    out = tmp_path / "o"
    one = [
        "python", "-m", "rl.cli", "sft", "--snapshot", "gsm-v1", "--model", f"{tmp_path}/model",
        "--out", f"{out}", "--config", f"{out}/recipe.toml",
    ]  # fmt: skip
    assert host_commands(given, 7, resume=False) == [one]
    assert host_commands(given, 7, resume=True) == [[*one, "--resume"]]
    assert given.recipe == "epochs = 2"
    (two,) = host_commands(spec(tmp_path, JOB, "job.processes=2"), 7, resume=False)
    torchrun = "python -m torch.distributed.run --nproc-per-node 2 --standalone -m rl.cli sft"
    assert shlex.join(two).startswith(torchrun)


def test_hosts_meet_at_the_first_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two\na slots=4\n\nb slots=2  # smaller\n")
    first, second = host_commands(spec(tmp_path, JOB, "job.hostfile=hosts"), 7, resume=False)
    common = "--nnodes 2 --node-rank {} --master-addr a --master-port 20007 -m rl.cli sft"
    assert f"--nproc-per-node 4 {common.format(0)}" in shlex.join(first)
    assert f"--nproc-per-node 2 {common.format(1)}" in shlex.join(second)
    other = host_commands(spec(tmp_path, JOB, "job.hostfile=hosts"), 8, resume=False)
    assert "--master-port 20008" in shlex.join(other[0]), "two jobs on a host must not meet"
    given = spec(tmp_path, JOB, "job.hosts=['a','b']", "job.processes=8")
    assert given.world_size == 16


@pytest.mark.parametrize("line", ["a slots=0", "a slots", "a b", "a slots=x"])
def test_a_wrong_host_file_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts").write_text(line)
    with pytest.raises(ConfigError) as caught:
        spec(tmp_path, JOB, "job.hostfile=hosts")
    assert caught.value.where == str(tmp_path / "hosts")


# Slurm


SLURM = """
where = "slurm"
processes = 8
nodes = 2
out = "/data/it's 100%"
env = { NCCL_DEBUG = "a b" }
[set]
"optimizer.lr" = 1e-6
[slurm]
partition = "gpu"
time = "2-00:00:00"
cpus_per_task = 96
options = ["--exclusive"]
setup = ["module load cuda"]
"""

GOLDEN = r"""#!/bin/bash
#SBATCH --job-name=sft-1
#SBATCH --output="/data/it's 100%%/log.txt"
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --time=2-00:00:00
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --exclusive
# Job sft-1, written by tirgen-rl launch. Started again, it goes on from its last checkpoint.

export TIRGEN_JOB=12:3
export NCCL_DEBUG='a b'
cd CWD || exit 1
module load cuda

resume=()
[ -e '/data/it'"'"'s 100%/checkpoints/latest' ] && resume=(--resume)
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=20012

exec python -m rl.slurm "$TIRGEN_JOB" \
    srun --kill-on-bad-exit=1 bash -c 'exec python -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node 8 \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"' bash \
    -m rl.cli sft --snapshot gsm-v1 --model Qwen/Qwen3-0.6B --out '/data/it'"'"'s 100%' """ \
    r"""--set optimizer.lr=1e-06 "${resume[@]}"
"""  # fmt: skip


def test_the_script_for_slurm(tmp_path: Path) -> None:
    made = script(spec(tmp_path, JOB + SLURM), "sft-1", Hold(12, 3))
    assert made.replace(str(tmp_path), "CWD") == GOLDEN
    subprocess.run(["bash", "-n"], input=made, text=True, check=True)


def test_a_python_with_a_quote_in_its_path_survives_both_shells(tmp_path: Path) -> None:
    """The interpreter stands once inside '…', and must be one word to the shell in there. This one
    runs the command behind `-m rl.slurm ID:TOKEN`, and else says what it was given."""
    odd = tmp_path / "it's here"
    odd.mkdir()
    python = odd / "python"
    python.write_text(
        '#!/bin/bash\n[ "$2" = rl.slurm ] && shift 4 && shift && exec "$@"\n'
        'for a in "$@"; do echo "<$a>"; done\n'
    )
    python.chmod(0o755)
    made = script(
        spec(tmp_path, JOB.replace('"python"', json.dumps(str(python))), "job.where=slurm"),
        "n", Hold(1, 0),
    )  # fmt: skip
    said = subprocess.run(
        ["bash"], input="scontrol() { echo first; }\n" + made, text=True, check=True,
        capture_output=True,
        env={**os.environ, "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"},
    ).stdout  # fmt: skip
    assert said.startswith("<-m>\n<torch.distributed.run>\n<--nnodes>\n<1>\n<--node-rank>\n<0>\n")
    assert "<--master-addr>\n<first>" in said
    assert said.endswith(f"<--out>\n<{tmp_path}/runs/sft-1>\n")


# Exit statuses


@pytest.mark.parametrize(
    ("code", "state", "error_class"),
    [
        (0, JobState.DONE, None),
        (1, JobState.FAILED, "exit"),
        (137, JobState.FAILED, "killed"),
        (143, JobState.FAILED, "terminated"),
        (250, JobState.FAILED, "exit"),
        (-9, JobState.FAILED, "keeper"),
    ],
)
def test_what_an_exit_status_says(code: int, state: JobState, error_class: str | None) -> None:
    assert verdict(code)[:2] == (state, error_class)


# The keeper


class Kept:
    """A keeper and a tree below it: the command, and a child that left its session, as torchrun's
    ranks do. What they hear is written to `heard`."""

    PROGRAM = """
import os, signal, subprocess, sys, time
who, deaf, heard = sys.argv[1], sys.argv[2] == "deaf", sys.argv[3]
def hear(number, frame):
    print(who, file=open(heard, "a"))
    deaf or sys.exit(7)
signal.signal(signal.SIGTERM, hear)
if who == "parent":
    env = {**os.environ, "RANK": "0"}
    child = subprocess.Popen([*sys.orig_argv[:-3], "child", *sys.argv[2:]], env=env,
                             start_new_session=True)
    print(child.pid, flush=True)
    if deaf: child.wait()
    sys.exit(child.wait())
print("ready", flush=True)
time.sleep(3600)
"""

    def __init__(self, folder: Path, how: str, grace: float) -> None:
        self.heard = folder / "heard"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rl.keeper"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        command = [sys.executable, "-c", self.PROGRAM, "parent", how, str(self.heard)]
        order = {
            "command": command, "cwd": str(folder), "grace": grace,
            "env": {"TIRGEN_JOB_MARK": folder.name, "TOLD": "x"},
        }  # fmt: skip
        self.tell(json.dumps(order))
        assert self.process.stdout is not None
        lines = {self.process.stdout.readline().strip() for _ in range(2)}
        (pid,) = lines - {"ready"}
        self.child = psutil.Process(int(pid))
        parent = self.child.parent()
        assert parent is not None
        self.parent = parent

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def gone(self) -> bool:
        _, alive = psutil.wait_procs([self.child, self.parent], timeout=10)
        return not alive


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def start(how: str, grace: float = 30.0) -> Kept:
        made.append(Kept(tmp_path, how, grace))
        return made[-1]

    yield start
    for kept in made:
        kill(kept.child, kept.parent)
        kept.process.kill()
        kept.process.wait()


def test_ranks_are_asked_first_and_torchrun_is_not(keep: Callable[..., Kept]) -> None:
    """The rank ends in order and with it what waits for it; its exit status is the keeper's."""
    kept = keep("obedient")
    assert os.getsid(kept.child.pid) != os.getsid(kept.parent.pid), "no session has them all"
    assert kept.process.stdin is not None
    kept.process.stdin.close()
    assert kept.process.wait(20) == 7
    assert kept.gone()
    assert kept.heard.read_text() == "child\n"


def test_what_does_not_hear_is_killed_after_its_grace(keep: Callable[..., Kept]) -> None:
    kept = keep("deaf")
    kept.tell("0.3")
    assert kept.process.wait(20) == 128 + signal.SIGKILL
    assert kept.gone()
    assert kept.heard.read_text() == "child\n"


def test_whoever_started_it_may_be_killed(keep: Callable[..., Kept], tmp_path: Path) -> None:
    """The pipe's other end closes, whatever the death; the same for SIGTERM to the keeper."""
    kept = keep("obedient")
    kept.process.send_signal(signal.SIGTERM)
    assert kept.process.wait(20) == 7
    assert kept.gone()


def test_the_command_may_die_and_leave_ranks_behind(keep: Callable[..., Kept]) -> None:
    """As torchrun killed by kill -9 does. Control: before the keeper ends, the rank lives."""
    kept = keep("deaf")
    assert kept.child.is_running()
    kept.parent.kill()
    assert kept.process.wait(20) == 128 + signal.SIGKILL
    assert kept.gone()


def test_others_processes_are_let_alone(keep: Callable[..., Kept], tmp_path: Path) -> None:
    """One without the mark, and one with another job's."""
    others = [
        subprocess.Popen(["sleep", "3600"], env={**os.environ, "TIRGEN_JOB_MARK": mark})
        for mark in ("", f"{tmp_path.name}0")
    ]
    kept = keep("deaf", grace=0.0)
    kept.tell("0")
    kept.process.wait(20)
    assert kept.gone()
    assert [other.poll() for other in others] == [None, None]
    for other in others:
        other.kill()
        other.wait()


# The log


def test_what_progress_bars_wrote_over_is_left_out() -> None:
    assert settled("a\rab\rabc\nnext\r\nlast\r") == "abc\nnext\n"
    assert last_lines("1\n2\rtwo\n3", 2) == "two\n3"


def test_a_log_is_followed_from_its_last_lines_on(tmp_path: Path) -> None:
    """Each byte once, also of a log that comes late or begins anew."""
    file = tmp_path / "log.txt"
    late = Follower(file, 2)
    assert (list(late.read()), late.found) == ([], False)
    file.write_text("1\n2\n3\n")
    assert list(late.read()) == ["2\n3\n"]
    with file.open("a") as log:
        log.write("4\n")
    assert "".join(late.read()) == "4\n"
    assert list(late.read()) == []
    assert "".join(Follower(file, 0).read()) == ""
    file.write_text("")
    assert list(late.read()) == []
    file.write_text("new\n")
    assert "".join(late.read()) == "new\n"


def test_the_tail_is_read_only_when_there_is_more(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    assert read_tail(file) is None
    file.write_bytes(b"x" * 100 + "ü".encode())
    tail = read_tail(file, limit=3)
    assert tail is not None
    assert (tail.text, tail.n_bytes) == ("xü", 102)
    assert read_tail(file, known=102) is None
