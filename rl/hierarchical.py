"""Hierarchical RL (THOR, method.md 4): rollout, update, weights to the engine, again.

    sync:     rollout k ─► update k ─► weights ─► rollout k+1 ─► ...
    overlap:  rollout k+1, by the weights before update k, runs while update k does; so what is
              trained on is one update round old, which every row's version says, and pi_old / TIS
              account for.

A checkpoint after update k holds what was sampled and not yet trained on, so that a job that is
killed at any moment goes on as if it had not been: the same rollouts, bit for bit where the engine
promises that.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from rl.checkpoint import Checkpoints, Progress
from rl.config import TrainConfig
from rl.data import Position, Prompts
from rl.engine import Engine
from rl.flops import costs
from rl.model import Policy, load_model, load_tokenizer
from rl.rollout.open import Rollouts, open_engine
from rl.rollout.sampler import RlRow, Rollout, Sampler
from rl.session import Clock, Session, make_renderer
from rl.update import update
from shared import seeds
from shared.grading import Grader
from shared.sandbox.backend import backend
from shared.trajectory import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


def run(config: TrainConfig, session: Session, *, resume: bool) -> None:
    """Train to the end, or until the session is told to stop. Either way a checkpoint is there."""
    tokenizer = load_tokenizer(config.model)
    prompts = Prompts(config.data, config.data.split)
    heldout = Prompts(config.data, config.heldout.split) if config.heldout else None
    policy = Policy(load_model(config.model, config.seed), chunk=config.model.logits_chunk)
    schedule = config.schedule
    engine = session.engine(config, policy, schedule.rollouts * schedule.updates)
    checkpoints = session.checkpoints(config, prompts.digest)
    at, buffer = checkpoints.load(engine) if resume else (Progress(), None)
    with session.signals(), _Thread() as thread:
        stack = AsyncExitStack()
        try:
            opened = _open(config, session, tokenizer, prompts, stack)
            trainer = _Trainer(config, session, engine, thread, *thread.call(opened))
            finished = trainer.train(at, buffer, checkpoints, heldout)
        finally:
            thread.call(stack.aclose())
    if finished:
        session.export(engine, tokenizer, config.model)


async def _open(
    config: TrainConfig,
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    stack: AsyncExitStack,
) -> tuple[Sampler, Rollouts]:
    """What rollouts need, in the event loop that they will run in."""
    tool = config.rollout.tool
    renderer = make_renderer(config, tokenizer)
    rollouts = await stack.enter_async_context(open_engine(config, renderer, session.world))
    sandbox = await stack.enter_async_context(backend(tool.sandbox_url, tool.minimum_tier))
    grader = await stack.enter_async_context(Grader(zygotes=1, minimum_tier=tool.minimum_tier))
    aside = session.world.aside(timedelta(minutes=config.engine.timeout_minutes))
    parts = (rollouts.engine, renderer, sandbox, grader, aside)
    return Sampler(config, prompts, *parts), rollouts


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        session: Session,
        engine: Engine,
        thread: _Thread,
        sampler: Sampler,
        rollouts: Rollouts,
    ) -> None:
        self.config, self.session, self.engine = config, session, engine
        self.thread, self.sampler, self.rollouts = thread, sampler, rollouts
        self.world = session.world

    def train(
        self,
        at: Progress,
        buffer: Rollout | None,
        checkpoints: Checkpoints,
        heldout: Prompts | None,
    ) -> bool:
        """From `at` on; false where it was told to stop before the end."""
        config, total = self.config, self.config.schedule.rollouts
        first = at.step  # rounds, not optimizer steps: a round may have nothing to learn from
        cursor = at.position.row
        self._sync(first, Clock())
        with self.session.progress("rl", total, first) as tick:
            if heldout is not None and first == 0:
                self.session.log(0, self._heldout(heldout))
            for number in range(first, total):
                began, clock = time.perf_counter(), Clock()
                with clock("wait"):
                    if buffer is None:
                        buffer = self.thread.call(self.sampler.rollout(number, cursor))
                now, cursor = buffer, buffer.cursor
                buffer = ahead = None
                if config.rollout.overlap and number + 1 < total:
                    ahead = self.thread.start(self.sampler.rollout(number + 1, cursor))
                with clock("wait"):
                    rows = self.world.concatenated(now.rows)
                if config.rollout.sleep:
                    with clock("sync"):
                        self.rollouts.sleep(self.world)  # every rank has sampled: it gave its rows
                with clock("update"):
                    seed = seeds.derive(config.seed, "deal", number)
                    steps = update(config, self.engine, rows, seed)
                if ahead is not None:
                    with clock("wait"):
                        buffer = ahead.result()
                self._sync(number + 1, clock)
                values = self._values(now, rows, steps, clock, time.perf_counter() - began)
                values["staleness"] = number - now.version
                last = number + 1 == total
                if heldout is not None and (last or self._is_due(number + 1)):
                    values |= self._heldout(heldout)
                self.session.log(number + 1, values)
                self._show(number, now)
                tick(number + 1, _facts(values))
                stopping = not last and self.session.stopping()
                every = config.checkpoint.every
                if stopping or last or (every and (number + 1) % every == 0):
                    at = Progress(number + 1, Position(0, cursor))
                    self.session.saved(number + 1, checkpoints.save(self.engine, at, buffer))
                if stopping:
                    self.session.ends_early()
                    return False
        return True

    def _sync(self, version: int, clock: Clock) -> None:
        """Give the engine the weights of the trainer."""
        with clock("sync"):
            if self.config.rollout.sleep:
                torch.cuda.empty_cache()  # what training left free is the server's to wake in
            self.rollouts.update(self.engine.weights(), version, self.world)

    def _is_due(self, rollouts: int) -> bool:
        heldout = self.config.heldout
        return heldout is not None and rollouts % heldout.every == 0

    def _heldout(self, prompts: Prompts) -> dict[str, float]:
        """How the policy does on problems that it is not trained on, by the current weights."""
        settings = self.config.heldout
        assert settings is not None
        sums = self.thread.call(self.sampler.heldout(prompts, settings.limit, settings.samples))
        values = rollout_values(self.world.total(sums))
        return {f"heldout/{name}": value for name, value in values.items()}

    def _values(
        self,
        rollout: Rollout,
        rows: Sequence[RlRow],
        steps: Sequence[Mapping[str, float]],
        clock: Clock,
        seconds: float,
    ) -> dict[str, float]:
        """Of one round: what was sampled, the mean over its optimizer steps, times and speeds."""
        sums = Counter(self.world.total(rollout.sums))
        names = dict.fromkeys(name for step in steps for name in step)
        means = {name: fmean(step[name] for step in steps) for name in names}
        lengths = [len(one.row.ids) for one in rows]
        loss_tokens = sum(one.row.n_loss for one in rows)
        times = {"time/rollout": rollout.seconds} | clock.values()
        speeds = {
            "speed/rollout_tokens": sums["tokens/generated"] / max(rollout.seconds, 1e-9),
            "speed/trainer_tokens": sum(lengths) / max(times["time/update"], 1e-9),
            "speed/effective_tokens": loss_tokens / seconds / self.world.size,
        }
        frozen = self.config.model.lora is not None
        config = self.engine.policy.lm.config
        speeds |= costs(config, lengths, times["time/update"], self.world.size, frozen=frozen)
        counted = {"optimizer_steps": float(self.engine.steps), "rows": float(len(rows))}
        return rollout_values(sums) | means | times | {"time/round": seconds} | speeds | counted

    def _show(self, number: int, rollout: Rollout) -> None:
        """A few episodes as text, for people: OUT/rollouts/N.jsonl."""
        if not self.world.is_first:
            return
        folder = self.session.out / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "prompt": one.prompt.number,
                "sample": one.sample,
                "problem": one.prompt.problem.text,
                "reference": one.prompt.problem.answer,
                "text": one.episode.text,
                "end": one.episode.end,
                "outcomes": one.episode.outcomes,
                "reward": one.reward,
            }
            for one in rollout.shown
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{number + 1:06d}.jsonl").write_text(text, encoding="utf-8", errors="replace")


class _Thread:
    """An event loop in a thread of its own: rollouts run there while the main thread trains."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.start(coroutine).result()


def rollout_values(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over episodes as rates and means; a rate of nothing is left out."""
    s = Counter(sums)
    infra = s[f"calls/{Outcome.INFRASTRUCTURE_ERROR}"]
    rates = {
        "reward/episode": (s["episodes/right"], s["episodes"] - s["episodes/undecided"]),
        "reward/step": (s["steps/right"], s["steps/tries"]),
        "calls/pass_rate": (s[f"calls/{Outcome.OK}"], s["calls"] - infra),
        "calls/first_try": (s["calls/first/right"], s["calls/first"]),
        "calls/per_episode": (s["calls"], s["episodes"]),
        "calls/code_ratio": (s["episodes/with_call"], s["episodes"]),
        "length/response": (s["tokens/response"], s["episodes"]),
        "time/generate_per_episode": (s["seconds/generate"], s["episodes"]),
        "time/tool_per_episode": (s["seconds/tool"], s["episodes"]),
    }
    values = {name: part / whole for name, (part, whole) in rates.items() if whole}
    kept = ("groups/", "drop/", "against/", "end/", "steps/", "tokens/")
    outcomes = {f"calls/{outcome}" for outcome in Outcome}
    counts = {
        name: float(value)
        for name, value in s.items()
        if name.startswith(kept) or name in outcomes or name in ("episodes", "prompts", "calls")
    }
    return counts | values


def _facts(values: Mapping[str, float]) -> str:
    shown = {"reward": "reward/episode", "first try": "calls/first_try", "kl": "kl/k3"}
    parts = [f"{what} {values[name]:.3f}" for what, name in shown.items() if name in values]
    return "  ".join([*parts, f"{values['time/round']:.1f} s"])
