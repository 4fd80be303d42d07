"""The graph of agents: one math problem becomes one vetted or rejected trajectory (THOR, Alg. 1).

    reason ──► extract ──► execute ──► commit ──► reason … until a boxed answer or a budget
                  │           │ failed   ▲   └──► verify
                  │           ▼          │
                  │       backtrack ─► extract       (suffix self-correction, optional)
                  └── nothing to compute ┘

There is no checkpointer: the unit of recovery is one sample, and running it again is cheaper than
saving it at every node. All budgets belong to the trajectory; every draw has a seed of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph

from shared.endpoints import UsageMeter
from shared.errors import SandboxError
from shared.fences import Kind, action, observation, parse, prose
from shared.grading.extract import last_boxed
from shared.sandbox.backend import Backend
from shared.sandbox.observation import observe
from shared.tracing import spanned
from shared.trajectory import End, Outcome, Problem, Step, ToolCall, Trajectory, Verdict
from tirgen import seeds
from tirgen.agents.code_extractor import CodeExtractor, Extraction
from tirgen.agents.reasoner import END_THINK, Draft, Reasoner
from tirgen.agents.verifier import Verifier
from tirgen.config import RunConfig


class State(TypedDict, total=False):
    problem: Problem
    seed: int
    meter: UsageMeter
    header: list[int]  # the rendered prompt, token ids
    response: list[int]  # everything committed after it
    text: str  # the same as text
    steps: tuple[Step, ...]
    draft: Draft | None  # r_t, until it is committed
    action: Extraction | None  # (r_logic, a_t)
    call: ToolCall | None  # (a_t, o_t)
    discarded: tuple[ToolCall, ...]  # calls of this step that self-correction took back
    notes: Counter[str]  # why steps were left as they were
    end: End | None
    started: float
    trajectory: Trajectory
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Agents:
    """What the nodes use. One set serves all trajectories of a process."""

    config: RunConfig
    reasoner: Reasoner
    extractor: CodeExtractor
    sandbox: Backend
    verifier: Verifier


class Graph:
    """Compiled once per process; `run` is safe for hundreds of trajectories at a time."""

    def __init__(self, agents: Agents) -> None:
        self.agents, self.config = agents, agents.config
        graph = StateGraph(State)
        for node in (
            self.reason, self.extract, self.execute, self.backtrack, self.commit, self.verify,
        ):  # fmt: skip
            graph.add_node(node.__name__, spanned(node))
        graph.add_edge(START, "reason")
        graph.add_conditional_edges("reason", self.after_reason, ["extract", "execute", "commit"])
        graph.add_conditional_edges("extract", self.after_extract, ["execute", "commit"])
        graph.add_conditional_edges("execute", self.after_execute, ["backtrack", "commit"])
        graph.add_conditional_edges(
            "backtrack", self.after_reason, ["extract", "execute", "commit"]
        )
        graph.add_conditional_edges("commit", self.after_commit, ["reason", "verify"])
        graph.add_edge("verify", END)
        self.compiled = graph.compile()

    async def run(
        self, problem: Problem, seed: int, meter: UsageMeter
    ) -> tuple[Trajectory, tuple[Verdict, ...]]:
        """Raises EndpointError or SandboxError when a model or the sandbox fails for good."""
        opening = await self.agents.reasoner.open(problem)
        state = State(
            problem=problem, seed=seed, meter=meter, header=opening.header,
            response=opening.response, text=opening.text, steps=(), draft=None, action=None,
            call=None, discarded=(), notes=Counter(), end=None, started=time.monotonic(),
        )  # fmt: skip
        correction = self.config.correction
        nodes = 4 * self.config.budgets.steps + 3 * correction.n_corr_total + 8
        final: Mapping[str, Any] = await self.compiled.ainvoke(state, {"recursion_limit": nodes})
        return final["trajectory"], final["verdicts"]

    # ---- nodes: each returns what it changes ------------------------------------------------

    async def reason(self, state: State) -> State:
        """r_t ~ π_actor(· | τ), |r_t| ≤ L_step."""
        draft = await self.agents.reasoner.step(
            [*state["header"], *state["response"]],
            room=self.config.budgets.tokens - len(state["response"]),
            seed=self._seed(state, "reasoner"),
            meter=state["meter"]["reasoner"],
        )
        return self._drafted(state, draft)

    async def extract(self, state: State) -> State:
        """Judge, extract logic, convert to code; the extractor sees this step and nothing else."""
        assert state["draft"] is not None
        found = await self.agents.extractor.extract(
            state["draft"].text,
            seed=self._seed(state, "extractor"),
            meter=state["meter"]["extractor"],
        )
        if isinstance(found, Extraction):
            return State(action=found)
        return State(action=None, notes=state["notes"] + Counter([found.reason]))

    async def execute(self, state: State) -> State:
        """o_t = Sandbox(a_t)."""
        assert state["action"] is not None
        code, tool = state["action"].code, self.config.tool
        seed = seeds.tool(state["seed"], len(state["steps"]))
        result = await self.agents.sandbox.arun(code, seed=seed, timeout=tool.timeout)
        if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
            raise SandboxError(f"The sandbox failed: {result.stderr or 'no reason given'}")
        return State(call=ToolCall(code, observe(result, tool.observation), result))

    async def backtrack(self, state: State) -> State:
        """Take a failed call back: drop r_t's last L_suf tokens, sample suffix and action anew."""
        assert state["draft"] is not None
        assert state["call"] is not None
        discarded = (*state["discarded"], state["call"])
        kept = await self.agents.reasoner.backtrack(
            state["draft"].text, self.config.correction.l_suf
        )
        draft = await self.agents.reasoner.step(
            [*state["header"], *state["response"]],
            room=self.config.budgets.tokens - len(state["response"]),
            seed=self._seed({**state, "discarded": discarded}, "reasoner"),
            meter=state["meter"]["reasoner"],
            begun=kept,
        )
        return State(**{**self._drafted(state, draft), "discarded": discarded, "call": None})

    async def commit(self, state: State) -> State:
        """τ ← τ ⊕ (r_logic, a_t, o_t), or ⊕ r_t: the splice replaces exactly the drafted text."""
        assert state["draft"] is not None
        draft, call = state["draft"], state["call"]
        covered = draft.text + draft.block
        if call is None or state["action"] is None:
            piece, step = draft.text, Step(draft.text, discarded=state["discarded"])
        else:
            logic = state["action"].logic
            piece = logic + action(call.code) + observation(call.observation)
            step = Step(logic, call, original=covered, discarded=state["discarded"])
        text = state["text"] + piece
        response = state["response"] + await self.agents.reasoner.tokens(piece)
        steps = (*state["steps"], step)
        # A spliced step goes on after its observation, even where the reasoner had stopped.
        end = state["end"] or self._end(
            text, len(response), len(steps), draft.ended and call is None
        )
        return State(
            text=text, response=response, steps=steps, end=end,
            draft=None, action=None, call=None, discarded=(),
        )  # fmt: skip

    async def verify(self, state: State) -> State:
        """Freeze the trajectory and vet it."""
        assert state["end"] is not None
        config = self.config
        trajectory = Trajectory(
            problem_key=state["problem"].key,
            steps=state["steps"],
            text=state["text"],
            end=state["end"],
            answer=last_boxed(_visible(state["text"], config.reasoner.thinking)),
            thinking=config.reasoner.thinking,
            seed=state["seed"],
            n_tokens=len(state["response"]),
            meta={
                "reasoner": config.reasoner.endpoint.model,
                "extractor": config.extractor.endpoint.model,
                "fingerprint": config.fingerprint,
                "left": dict(state["notes"]),
                "seconds": time.monotonic() - state["started"],
            },
        )
        verdicts = await self.agents.verifier.verify(
            state["problem"], trajectory, state["meter"]["verifier"]
        )
        return State(trajectory=trajectory, verdicts=verdicts)

    # ---- edges ------------------------------------------------------------------------------

    def after_reason(self, state: State) -> str:
        """The extractor judges every step but those after the thinking is over, or over budget."""
        assert state["draft"] is not None
        if state["action"] is not None:
            return "execute"  # a block that the reasoner wrote itself
        n_calls = sum(step.call is not None for step in state["steps"])
        over = self.config.reasoner.thinking and END_THINK in prose(
            state["text"] + state["draft"].text
        )
        idle = state["end"] is not None or over or not state["draft"].text.strip()
        return "commit" if idle or n_calls >= self.config.budgets.calls else "extract"

    def after_extract(self, state: State) -> str:
        return "execute" if state["action"] is not None else "commit"

    def after_execute(self, state: State) -> str:
        assert state["call"] is not None
        correction = self.config.correction
        if state["call"].result.outcome is Outcome.OK or correction.strategy == "none":
            return "commit"
        tried = len(state["discarded"])
        total = tried + sum(len(step.discarded) for step in state["steps"])
        left = tried < correction.n_corr and total < correction.n_corr_total
        return "backtrack" if left else "commit"

    def after_commit(self, state: State) -> str:
        return "reason" if state["end"] is None else "verify"

    # ---- helpers ----------------------------------------------------------------------------

    def _seed(self, state: State, role: str) -> int:
        return seeds.derive(state["seed"], len(state["steps"]), role, len(state["discarded"]))

    def _drafted(self, state: State, draft: Draft) -> State:
        """Cut a draft at the end of thinking; look for blocks that the reasoner wrote itself."""
        blocks = parse(draft.text)
        own = next((b for b in blocks if b.kind in (Kind.PYTHON, Kind.OUTPUT)), None)
        thought = "".join(b.raw for b in blocks[: blocks.index(own)]) if own else draft.text
        head, mark, _ = thought.partition(END_THINK)
        if self.config.reasoner.thinking and mark and head.strip():
            # What precedes the mark is a step of its own; the rest is sampled again after it.
            return State(draft=Draft(head, ended=False), action=None)
        if own is None:
            return State(draft=draft, action=None)
        if own.kind is Kind.PYTHON and own.closed and self.config.reasoner.own_blocks == "execute":
            n_calls = sum(step.call is not None for step in state["steps"])
            if n_calls < self.config.budgets.calls:
                return State(
                    draft=Draft(thought, ended=False, block=own.raw),
                    action=Extraction(thought.rstrip("\n"), own.body),
                )
        return State(draft=draft, action=None, end=End.OWN_BLOCK)

    def _end(self, text: str, n_tokens: int, n_steps: int, ended: bool) -> End | None:
        """IsSolved(τ), or the budget that ran out."""
        if n_tokens > self.config.budgets.tokens:
            return End.LENGTH_BUDGET  # the last splice went over it: not even an answer counts
        if last_boxed(_visible(text, self.config.reasoner.thinking)) is not None:
            return End.ANSWERED
        if ended:
            return End.GAVE_UP
        if n_tokens >= self.config.budgets.tokens:
            return End.LENGTH_BUDGET
        return End.STEP_BUDGET if n_steps >= self.config.budgets.steps else None


def _visible(text: str, thinking: bool) -> str:
    """Where the final answer counts: outside blocks, and after the thinking if there is any."""
    said = prose(text)
    return said.partition(END_THINK)[2] if thinking else said
