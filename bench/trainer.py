"""The SFT step and the RL update beside TRL's: tokens a second, on the same model and rows.

    python bench/trainer.py [--size nano|50m|0.6b] [--program sft|rl] [--rows 32] [--repeat 5]
    python bench/trainer.py --rl-step     # where the time of a round of hierarchical RL goes

One repetition is one optimizer step over all rows; ours and the peer's take turns, in a process
each, with the same number of threads (OMP_NUM_THREADS). Several settings of the peer are tried,
and the quickest is what we are compared with. Timed of ours is all of `rl.sft.train_window` and
`rl.update.update`: packing, collation, forward, backward, clipping, optimizer, metrics; of the peer
less (bench/peers/trainer.py). Rows are trajectories of nano's world, whose prompts and
observations carry no loss; effective tokens are those that do. `first loss` shows that both train
on the same. --length N: rows of N tokens instead. Without TRL its part is left out. On a CPU a rate
is per second of CPU time, which a busy machine disturbs less; by the clock it is printed as well.
One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.models import SIZES, WEIGHTS, make, rows
from peers.trainer import NAME, Setting, Spent, missing, serve

from rl.packing import TrainRow

ROOT = Path(__file__).resolve().parent.parent
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
GROUP = 8
SETTINGS = {
    "sft": (Setting(8), Setting(32), Setting(8, grouped=True), Setting(16, grouped=True),
            Setting(8, grouped=True, padding_free=True)),
    "rl": (Setting(8), Setting(16), Setting(32)),
}  # fmt: skip
CLOCK = "wall" if shutil.which("nvidia-smi") else "cpu"
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Task:
    program: str
    size: str
    rows: tuple[TrainRow, ...]
    ours: tuple[str, ...]  # settings over the preset of nano

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        return sum(row.n_loss for row in self.rows)


End = tuple[float, int, dict[str, float]]


class Side:
    """A process that takes a step when asked."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Spent:
        self.pipe.send("go")
        spent: Spent = self.pipe.recv()
        return spent

    def end(self) -> End:
        """First loss, peak memory in bytes, and more that it has to say; after the last step."""
        found: Any = self.pipe.recv()
        self.pipe.send("bye")
        self.process.join()
        return found[0], found[1], found[2] if len(found) > 2 else {}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def ours(pipe: Connection, task: Task, steps: int, threads: int) -> None:
    """Our side, as `peers.trainer.serve` is the other."""
    import torch

    from rl.config import SftConfig, TrainConfig, load
    from rl.credit import advantages_of
    from rl.data import Position, Window
    from rl.engine import Engine
    from rl.flops import costs
    from rl.loss import Level
    from rl.model import Policy
    from rl.rollout.sampler import RlRow
    from rl.sft import train_window
    from rl.update import update
    from rl.world import join

    torch.set_num_threads(threads)
    world = join(timedelta(minutes=30))
    gpu = torch.cuda.is_available()
    settings = [*task.ours, 'model.path="-"', 'data.snapshot="-"', "optimizer.lr=1e-5"]
    if gpu:
        settings += ['engine.dtype="bf16"']
    sft = load(SftConfig, "sft-nano", settings=settings)
    alike = ('loss.aggregation="token-mean"', "loss.nll_weight=0.0", 'loss.importance="off"')
    rl = load(TrainConfig, "rl-nano", settings=[*settings, *alike])  # the loss that the peer has
    config = sft if task.program == "sft" else rl
    policy = Policy(make(task.size, config.model.attention), chunk=config.model.logits_chunk)
    engine = Engine(policy, config.engine, config.optimizer, world, steps)
    window = Window(task.rows, Counter(), Position())
    advantages = advantages_of([float(n % 2) for n in range(GROUP)], rl.credit)
    dealt = [
        RlRow(Level.EPISODE, str(n // GROUP), advantages[n % GROUP], row)
        for n, row in enumerate(task.rows)
    ]
    before, first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for n in range(steps):
        pipe.recv()
        began = Spent.now()
        values = train_window(sft, engine, window) if task.program == "sft" else None
        values = values or update(rl, engine, dealt, seed=0)[0]
        spent = Spent.now().less(began)
        pipe.send(spent)
        first = values["loss"] if n == 0 else first
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    more = {}
    if gpu:
        more = costs(policy.lm.config, [len(r.ids) for r in task.rows], spent.wall, 1, frozen=False)
        memory = int(more["memory/peak_bytes"])
    pipe.send((first, memory, more))
    pipe.recv()
    world.close()


def take_turns(
    starts: Sequence[Callable[[], Side]], steps: int
) -> tuple[list[list[Spent]], list[End]]:
    sides = [start() for start in starts]
    rounds = [[side.step() for side in sides] for _ in range(steps)][1:]
    return [list(times) for times in zip(*rounds, strict=True)], [side.end() for side in sides]


def one_by_one(
    starts: Sequence[Callable[[], Side]], steps: int
) -> tuple[list[list[Spent]], list[End]]:
    times, ends = [], []
    for start in starts:
        side = start()
        times.append([side.step() for _ in range(steps)][1:])
        ends.append(side.end())
    return times, ends


def compare(task: Task, repeat: int, settings: Sequence[Setting]) -> None:
    setting = best_setting(task, settings)
    steps = repeat + 1  # the first of each is not counted
    starts = [lambda: Side(ours, task, steps, THREADS)]
    if setting is not None:
        starts.append(lambda: peer(task, setting, steps))
    # In turns, as a CPU is not steady. A GPU is, and has not the memory for both.
    times, ends = take_turns(starts, steps) if CLOCK == "cpu" else one_by_one(starts, steps)
    loss, memory, more = ends[0]
    against = None
    name = f"{task.program} {'step' if task.program == 'sft' else 'update'}, {task.size}"
    facts: dict[str, object] = {
        "threads": THREADS,
        "rows": len(task.rows),
        "tokens_a_step": task.tokens,
    }
    if setting is not None:
        label = f"{NAME} {version(NAME)}, {setting}"
        peer_loss, peer_memory, _ = ends[1]
        against = (label, times[1])
        emit(f"{name}: first loss", loss, "nats", label, peer_loss)
        # Of a process, over what it had before: its allocator keeps pages, so it is a rough figure.
        emit(f"{name}: peak memory of training", memory / 2**20, "MiB", label, peer_memory / 2**20,
             peer_memory / max(memory, 1))  # fmt: skip
    for what, tokens in (("tokens", task.tokens), ("effective tokens", task.loss_tokens)):
        rate(f"{name}: {what}", tokens, times[0], against, facts, CLOCK)
    if CLOCK != "wall":
        rate(f"{name}: effective tokens, by the clock", task.loss_tokens, times[0], against, facts)
    for key, value in more.items():
        emit(f"{name}: {key}", value, "1")


def best_setting(task: Task, settings: Sequence[Setting]) -> Setting | None:
    """The quickest of the peer's, each by the better of two steps; by one where steps are long."""
    if (why := missing()) is not None:
        emit(f"peer left out: {why}", None, "", NAME)
        return None
    settings = [setting for setting in settings if len(task.rows) % setting.rows == 0]
    if len(settings) == 1:
        return settings[0]
    found: dict[Setting, float] = {}
    for setting in settings:
        tries = 3 if task.size == "nano" or CLOCK == "wall" else 1
        side = peer(task, setting, tries)
        try:
            times = [getattr(side.step(), CLOCK) for _ in range(tries)]
            found[setting] = min(times[1:] or times)
        except EOFError:
            emit(f"peer's setting failed: {setting}", None, "", NAME)
        finally:
            side.stop()
        if setting in found:
            label = f"{NAME} {version(NAME)}, {setting}"
            emit(f"{task.program}, {task.size}: a setting of the peer, effective tokens",
                 task.loss_tokens / found[setting], "1/s", label)  # fmt: skip
    if not found:
        raise SystemExit(
            f"no setting of the peer ran: {len(task.rows)} rows, --peer-rows divides them"
        )
    return min(found, key=lambda one: found[one])


def peer(task: Task, setting: Setting, steps: int) -> Side:
    return Side(serve, task.program, task.size, task.rows, setting, steps, GROUP, THREADS)


# ---- where the time of a round goes -------------------------------------------------------------


def rl_step(rounds: int) -> None:
    """A few rounds of `tirgen-rl train` from a small frozen snapshot; medians of their time/*."""
    from shared.store import Database, EmbeddedPostgres, migrate
    from tests.nano_frozen import freeze

    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        try:
            migrate.upgrade(db)
            freeze(db, "bench", 120, kind="problems")
            url = db.url.render_as_string(hide_password=False)
            arguments = [
                "train", "--preset", "rl-nano", "--model", str(WEIGHTS), "--snapshot", "bench",
                "--out", f"{home}/out", "--set", f"schedule.rollouts={rounds + 1}",
                "--set", 'data.split="train"', "--set", f'data.url="{url}"',
            ]  # fmt: skip
            subprocess.run(
                [sys.executable, "-m", "rl.cli", *arguments], check=True, cwd=ROOT,
                env=os.environ | {"TIRGEN_HOME": home}, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            db.close()
            server.stop()
        text = Path(home, "out/metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()][1:]  # the first one warms up
    whole = statistics.median(line["time/round"] for line in lines)
    for key in sorted(
        {key for line in lines for key in line if key.startswith(("time/", "speed/"))}
    ):
        values = [line[key] for line in lines if key in line]
        share = statistics.median(values) / whole if key.startswith("time/") else None
        emit(f"rl round, nano: {key}", statistics.median(values),
             "s" if share is not None else "1/s", spread=[min(values), max(values)],
             **({} if share is None else {"share_of_round": round(share, 3)}))  # fmt: skip


# ---- output -------------------------------------------------------------------------------------


def rate(
    metric: str,
    tokens: int,
    ours: Sequence[Spent],
    against: tuple[str, Sequence[Spent]] | None,
    facts: dict[str, object],
    clock: str = "wall",
) -> None:
    """Tokens a second: of the median time, with the slowest and quickest as the spread."""
    unit = "1/s" if clock == "wall" else "1/CPU s"
    times = [getattr(spent, clock) for spent in ours]
    value = tokens / statistics.median(times)
    facts = facts | {"spread": [round(tokens / t, 1) for t in (max(times), min(times))]}
    if against is None:
        emit(metric, value, unit, **facts)
        return
    label, theirs = against[0], [getattr(spent, clock) for spent in against[1]]
    other = tokens / statistics.median(theirs)
    facts |= {"peer_spread": [round(tokens / t, 1) for t in (max(theirs), min(theirs))]}
    emit(metric, value, unit, label, other, value / other, **facts)


def emit(
    metric: str,
    value: float | None,
    unit: str,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    **more: object,
) -> None:
    """`ratio` says how many times better we are."""
    shown = None if value is None else float(f"{value:.5g}")
    line: dict[str, object] = {"bench": "trainer", "metric": metric, "value": shown, "unit": unit,
                               "peer": peer}  # fmt: skip
    if peer_value is not None:
        line["peer_value"] = float(f"{peer_value:.5g}")
    line["ratio"] = None if ratio is None else float(f"{ratio:.3g}")
    print(json.dumps(line | more), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--program", choices=("sft", "rl"), nargs="*", default=["sft", "rl"])
    parser.add_argument("--rows", type=int, default=32, help=f"a multiple of {GROUP}")
    parser.add_argument("--length", type=int, help="tokens of a row, instead of trajectories")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--peer-rows", type=int, nargs="+", help="of a micro-batch, to be tried")
    parser.add_argument("--set", action="append", default=[], help="ours: over the preset of nano")
    parser.add_argument("--rl-step", action="store_true")
    args = parser.parse_args()
    if args.rl_step:
        rl_step(args.repeat)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by what the two sides import
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    made = tuple(rows(args.rows, args.length))
    for program in args.program:
        settings = [Setting(n) for n in args.peer_rows or ()] or SETTINGS[program]
        compare(Task(program, args.size, made, tuple(args.set)), args.repeat, settings)


if __name__ == "__main__":
    main()
