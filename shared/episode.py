"""The tool-use loop of a policy: one problem becomes one episode, or one prefix one action.

    write until a closed ```python block ──► run it ──► inject its observation ──► write on …
                     ▲                         │ failed
                     └── drop a part of r_t ◄──┘   (self-correction: settings.correction)

Rollouts of the trainer, evaluation and sampling without a tool are this one loop, over any engine
(`shared/policy.py`). What holds for every episode:

- The ids of its segments, joined, are what was sampled and what was injected, in that order. No
  text is ever tokenised again; thought and code are told apart on the sampled ids.
- Only a closed python block is run. An output block that the policy writes itself is no
  observation: it ends the episode.
- All budgets are the episode's own. Tries of self-correction count against their own, and every
  token that was sampled is counted, whether it stands or not.
- Every draw has a seed of its own, from the episode's seed, the turn, the try and the call of the
  engine. So an episode does not depend on other episodes or on how long a tool takes.
- A failure of the sandbox itself is neither shown to the policy nor held against it: it is tried
  again, and then the episode ends with it.

Names are those of method.md: r_t the thought, a_t the action, o_t the observation, L_suf, N_corr.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from shared import seeds
from shared.episode_records import Correction, Discarded, Episode, EpisodeSettings, StepAttempt
from shared.fences import prose
from shared.grading.extract import last_boxed
from shared.policy import Codec, Engine, Finish, Generated, Tool
from shared.sandbox.observation import observe
from shared.segments import Kind, Segment
from shared.trajectory import End, Outcome, Step, ToolCall
from shared.turns import Turn, Writer, Wrote

__all__ = [
    "Codec", "Correction", "Discarded", "Engine", "Episode", "EpisodeSettings", "Finish",
    "Generated", "StepAttempt", "Tool", "run_episode", "run_step",
]  # fmt: skip

OPENING, END_THINK = "<think>\n", "</think>"
CALLS_USED_UP = "(no tool calls are left; finish without code)"
_NOTHING = Segment(Kind.THOUGHT, (), ())


async def run_episode(
    engine: Engine,
    codec: Codec,
    sandbox: Tool,
    problem: str,
    settings: EpisodeSettings,
    *,
    seed: int,
    key: str,
) -> Episode:
    """Have the policy solve `problem`. Raises what the engine raises (EndpointError)."""
    try:
        return await _Loop(engine, codec, sandbox, settings, seed, key).run(problem)
    finally:
        await engine.release(key)


async def run_step(
    engine: Engine,
    codec: Codec,
    sandbox: Tool,
    prefix: Segment,
    settings: EpisodeSettings,
    *,
    seed: int,
    key: str,
    begun: int = 0,
) -> StepAttempt:
    """One thought (or the rest of one) and one action after `prefix`, without self-correction.

    `begun`: how many of the prefix's last ids are r_t already (`rl.steps.prefix`); fences are then
    read from there, so that a prefix cut inside a line or a block misleads nobody. `tokens` of the
    settings limits what is sampled here, `context` also counts the prefix.
    """
    at = len(prefix.ids) - begun
    start = Segment(Kind.THOUGHT, prefix.ids[at:], (0.0,) * begun)
    writer = Writer(engine, codec, settings.sampling, key)
    hands = _Hands(sandbox, settings)
    room = min(settings.tokens, settings.context - len(prefix.ids))
    try:
        turn = await writer.write(
            prefix.ids[:at], start, begun + room, seed=seeds.derive(seed, 0, "policy", 0)
        )
    finally:
        await engine.release(key)
    call = None
    segments: Sequence[Segment] = turn.all_thought()
    if turn.code is not None:
        segments = codec.split(turn.ids, turn.thought, turn.logprobs)
        call = await hands.run(turn.code, seeds.tool(seed, 0))
    return StepAttempt(
        segments=tuple(s for s in _after(segments, begun) if s.kind is not Kind.EOS),
        outcome=None if call is None else call.result.outcome,
        call=call,
        version=min(writer.versions, default=engine.version),
        n_generated=writer.n_generated,
        seconds_generate=writer.seconds,
        seconds_tool=hands.seconds,
    )


class _Hands:
    """Runs actions; a sandbox that fails is asked again."""

    def __init__(self, sandbox: Tool, settings: EpisodeSettings) -> None:
        self.sandbox, self.settings, self.seconds = sandbox, settings, 0.0

    async def run(self, code: str, seed: int) -> ToolCall:
        settings, wait = self.settings, self.settings.infrastructure_wait
        started = time.monotonic()
        for tries_left in reversed(range(settings.infrastructure_tries)):
            result = await self.sandbox.arun(code, seed=seed, timeout=settings.tool_timeout)
            if result.outcome is not Outcome.INFRASTRUCTURE_ERROR or not tries_left:
                break
            await asyncio.sleep(wait)
            wait *= 2
        self.seconds += time.monotonic() - started
        if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
            return ToolCall(code, "", result)
        return ToolCall(code, observe(result, settings.observation), result)


class _Loop:
    """An episode under way. Its lists only ever grow: what failed is not yet in them."""

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        sandbox: Tool,
        settings: EpisodeSettings,
        seed: int,
        key: str,
    ) -> None:
        self.codec, self.settings, self.seed = codec, settings, seed
        self.writer = Writer(engine, codec, settings.sampling, key)
        self.hands = _Hands(sandbox, settings)
        self.segments: list[Segment] = []
        self.ids: list[int] = []  # of the segments
        self.steps: list[Step] = []
        self.discarded: list[Discarded] = []
        self.text = ""
        self.n_turns = 0
        self.noticed = False  # that no calls are left

    async def run(self, problem: str) -> Episode:
        prompt = self.codec.prompt(problem)
        self._add(prompt)
        self.text = self._begun_by(prompt)
        self.prefilled = len(self.text)
        self.limit = min(self.settings.tokens + len(prompt.ids), self.settings.context)
        end, before = None, ""
        while end is None:
            if len(self.ids) >= self.limit:
                end = End.LENGTH_BUDGET
                break
            before = self.text
            turn, call = await self._turn()
            self.n_turns += 1
            end = self._commit(turn, call)
        acted = not self.n_turns or turn.wrote is Wrote.ACTION
        void = not acted and last_boxed(self._visible(turn.text, before)) is None
        versions = self.writer.versions or {self.writer.engine.version}
        return Episode(
            segments=tuple(self.segments),
            steps=tuple(self.steps),
            text=self.text,
            end=end,
            answer=last_boxed(self._visible(self.text)),
            seed=self.seed,
            versions=(min(versions), max(versions)),
            n_turns=self.n_turns,
            void_turns=int(void),
            discarded=tuple(self.discarded),
            n_generated=self.writer.n_generated,
            seconds_generate=self.writer.seconds,
            seconds_tool=self.hands.seconds,
        )

    # ---- one turn, with its tries --------------------------------------------------------------

    async def _turn(self) -> tuple[Turn, ToolCall | None]:
        """What stands of this turn, and its call. Failed tries before it are in `discarded`."""
        settings, correction = self.settings, self.settings.correction
        has_calls = len(self._calls()) < settings.calls
        stops = has_calls or settings.after_calls == "notice"
        begun, shown, tried = _NOTHING, Segment(Kind.OBSERVATION, ()), 0
        while True:
            turn = await self.writer.write(
                [*self.ids, *shown.ids],
                begun,
                min(self.limit - len(self.ids), settings.context - len(self.ids) - len(shown.ids)),
                seed=seeds.derive(self.seed, self.n_turns, "policy", tried),
                actions=has_calls or (stops and not self.noticed),
                stops=stops,
            )
            if turn.code is None or not has_calls:
                return turn, None
            call = await self.hands.run(turn.code, seeds.tool(self.seed, len(self.steps)))
            well = call.result.outcome in (Outcome.OK, Outcome.INFRASTRUCTURE_ERROR)
            left = tried < correction.n_corr and len(self.discarded) < correction.n_corr_total
            if well or correction.strategy == "none" or not left:
                return turn, call
            tried += 1
            written = self.codec.split(turn.ids, turn.thought, turn.logprobs)
            n_thought = sum(len(s.ids) for s in written if s.kind is Kind.THOUGHT)
            kept = correction.kept(n_thought)
            dropped = tuple(_after(written, kept))
            self.discarded.append(Discarded(len(self.steps), call, dropped))
            known = turn.logprobs
            begun = Segment(Kind.THOUGHT, turn.ids[:kept], None if known is None else known[:kept])
            shown = self._shown(turn, call, kept)

    def _shown(self, turn: Turn, call: ToolCall, kept: int) -> Segment:
        """The failed try and its error, if the policy is to see them and they leave it room."""
        if not self.settings.correction.feedback:
            return Segment(Kind.OBSERVATION, ())
        ids = (*turn.ids, *self.codec.observation(call.observation).ids)
        fits = len(self.ids) + len(ids) + kept < self.settings.context
        return Segment(Kind.OBSERVATION, ids if fits else ())

    def _commit(self, turn: Turn, call: ToolCall | None) -> End | None:
        """Add the turn and what is injected after it; how the episode ends, if it does."""
        taken_back = tuple(d.call for d in self.discarded if d.step == len(self.steps))
        self.text += turn.text
        said = turn.text if call is None else turn.text[: turn.thought]
        if self.settings.thinking and not self.steps:
            said = said.removeprefix(OPENING[self.prefilled :])
        if call is not None:
            self._add(*self.codec.split(turn.ids, turn.thought, turn.logprobs))
            self.steps.append(Step(said, call, discarded=taken_back))
            return self._observe(call)
        self._add(*turn.all_thought())
        if turn.wrote is Wrote.ACTION:  # one too many
            self.noticed, before = True, len(self.text)
            fits = self._inject(CALLS_USED_UP)
            self.steps.append(Step(said + self.text[before:]))
            return None if fits else End.LENGTH_BUDGET
        if said or taken_back:
            self.steps.append(Step(said, discarded=taken_back))
        match turn.wrote:
            case Wrote.OWN_BLOCK:
                return End.OWN_BLOCK
            case Wrote.LENGTH:
                return End.LENGTH_BUDGET
        answered = last_boxed(self._visible(self.text)) is not None
        return End.ANSWERED if answered else End.GAVE_UP

    def _observe(self, call: ToolCall) -> End | None:
        outcome = call.result.outcome
        if outcome is Outcome.INFRASTRUCTURE_ERROR:
            return End.INFRASTRUCTURE
        fits = self._inject(call.observation)
        if self.settings.abort_at_failure and outcome is not Outcome.OK:
            return End.FAILED_CALL
        return None if fits else End.LENGTH_BUDGET

    def _inject(self, output: str) -> bool:
        """Add an observation, unless it does not fit: a row never exceeds its budget."""
        observation = self.codec.observation(output)
        fits = len(self.ids) + len(observation.ids) <= self.limit
        if fits:
            self._add(observation)
            self.text += self.codec.decode(observation.ids)
        return fits

    # ---- small things --------------------------------------------------------------------------

    def _add(self, *segments: Segment) -> None:
        for segment in segments:
            self.segments.append(segment)
            self.ids += segment.ids

    def _calls(self) -> list[ToolCall]:
        return [step.call for step in self.steps if step.call is not None]

    def _begun_by(self, prompt: Segment) -> str:
        """The part of "<think>" that the chat template wrote into the prompt itself."""
        if not self.settings.thinking:
            return ""
        header = self.codec.decode(prompt.ids[-16:])
        return max(OPENING[:n] for n in range(len(OPENING) + 1) if header.endswith(OPENING[:n]))

    def _visible(self, text: str, before: str = "") -> str:
        """Where an answer counts: outside blocks, and after the thinking if there is any."""
        said = prose(text)
        if not self.settings.thinking or END_THINK in prose(before):
            return said
        return said.partition(END_THINK)[2]


def _after(segments: Sequence[Segment], n: int) -> list[Segment]:
    """The segments without their first `n` ids."""
    rest = []
    for segment in segments:
        cut = min(n, len(segment.ids))
        n -= cut
        known = segment.logprobs
        if cut < len(segment.ids):
            rest.append(
                Segment(segment.kind, segment.ids[cut:], None if known is None else known[cut:])
            )
    return rest
