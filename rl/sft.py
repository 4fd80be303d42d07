"""SFT, the cold start: negative log-likelihood of what the policy is to write (Eq. 3 of the paper).

    L = - sum over rows s, tokens t of w(s) log pi(s_t | s_<t)

w is `rl.loss.token_weight` over the counts of the whole optimizer window, so the gradient does not
depend on how the window was cut into micro-batches and ranks. Loss is on thoughts, code and EOS;
with `learn_observations` on tool output as well, as the paper's equation has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl.checkpoint import Progress
from rl.config import SftConfig
from rl.data import NANO, SnapshotSource, Source, Window
from rl.engine import Engine
from rl.flops import costs
from rl.loss import Counts, token_weight
from rl.model import Policy, attention_cost, load_model, load_tokenizer
from rl.nano import Demonstrations
from rl.packing import TrainRow, collate, pack
from rl.session import Clock, Session, make_renderer
from shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(config: SftConfig, session: Session, *, resume: bool) -> None:
    """Train on the configured snapshot; see `train`."""
    tokenizer = load_tokenizer(config.model)
    source: Source
    if config.data.snapshot == NANO:
        source = Demonstrations(tokenizer, config.seed, session.world)
    else:
        source = SnapshotSource(
            config.data,
            make_renderer(config, tokenizer),
            session.world,
            observations=config.learn_observations,
        )
    policy = Policy(load_model(config.model, config.seed), chunk=config.model.logits_chunk)
    train(config, session, source, policy, tokenizer, resume=resume)


def train(
    config: SftConfig,
    session: Session,
    source: Source,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool,
) -> None:
    """Train to the end, or until the session is told to stop. Either way a checkpoint is there.

    Raises ConfigError where there are no rows, and what a checkpoint raises that does not fit.
    """
    total = config.epochs * ceil(len(source) / config.batch_rows)
    total = min(total, config.max_steps or total)
    if not total:
        raise ConfigError("There is nothing to train on.", where="data.snapshot, data.split")
    engine = session.engine(config, policy, total)
    checkpoints = session.checkpoints(config, source.digest)
    at = checkpoints.load(engine)[0] if resume else Progress()
    windows = source.windows(at.position, config.epochs, config.batch_rows)
    with session.signals(), session.progress("sft", total, at.step) as tick:
        for step, window in enumerate(islice(windows, total - at.step), start=at.step + 1):
            values = train_window(config, engine, window)
            session.log(step, values)
            tick(step, f"loss {values['loss']:.4f}  {values['speed/tokens']:.0f} tok/s")
            every = config.checkpoint.every
            stopping = step < total and session.stopping()
            if stopping or step == total or (every and step % every == 0):
                session.saved(step, checkpoints.save(engine, Progress(step, window.after)))
            if stopping:
                session.ends_early()
                return
    session.export(engine, tokenizer, config.model)


def train_window(config: SftConfig, engine: Engine, window: Window) -> dict[str, float]:
    """One optimizer step; what it came to over all ranks."""
    world, clock = engine.world, Clock()
    counts = count(window.rows)
    plan = pack(
        [len(row.ids) for row in window.rows],
        config.engine.token_budget,
        world.size,
        attention_cost(engine.policy.lm),
    )[world.rank]
    told: list[Tensor] = []  # of each micro-batch; read once, since to read is to wait for a GPU
    with clock("step"):
        for numbers in plan:
            rows = [window.rows[n] for n in numbers]
            batch = collate(rows, pad=0, layout=config.engine.layout)
            logp_N, entropy_N = engine.logprobs(batch)
            weights = [token_weight(row.n_loss, counts, config.aggregation) for row in rows]
            weight_N = logp_N.new_tensor(weights)[batch.row_N.to(logp_N.device)]
            loss = -(weight_N * logp_N).sum()
            engine.backward(loss)
            told.append(torch.stack([loss.detach(), -logp_N.detach().sum(), entropy_N.sum()]))
        result = engine.step()
    parts = torch.stack(told).double().sum(0).tolist()
    sums = world.total(dict(zip(("loss", "nll", "entropy"), parts, strict=True)))
    lengths, seconds = [len(row.ids) for row in window.rows], clock.seconds["step"]
    tokens, frozen = sum(lengths), config.model.lora is not None
    return {
        "loss": sums["loss"],
        "nll": sums["nll"] / max(1, counts.tokens),
        "entropy": sums["entropy"] / max(1, counts.tokens),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": float(not result.applied),
        "rows": len(window.rows),
        "tokens": tokens,
        "loss_tokens": counts.tokens,
        "epoch": window.after.epoch,
        **{f"left_out/{reason}": n for reason, n in window.left_out.items()},
        **clock.values(),
        "speed/tokens": tokens / seconds,
        "speed/loss_tokens": counts.tokens / seconds,
        **costs(engine.policy.lm.config, lengths, seconds, world.size, frozen=frozen),
    }


def count(rows: Sequence[TrainRow]) -> Counts:
    """A window without loss tokens counts one, so that nothing is divided by zero."""
    tokens = sum(row.n_loss for row in rows)
    return Counts(max(1, tokens), max(1, sum(row.n_loss > 0 for row in rows)), tokens)
