"""Trajectory -> token ids as typed segments, for any Hugging Face tokenizer and chat template.

A training row is a sequence of segments, each of one kind; its ids are theirs, joined, and its loss
mask follows from the kinds alone, never from offsets in a string. What holds for every row:

- The prompt is rendered by the chat template, once. What comes after it is appended as ids and
  never rendered again, here as in a rollout: so training and inference see the same tokens.
- What the policy writes between two injected texts is tokenised as one run, as it would come out
  of the policy itself, and then cut into thought r_t and action a_t at a token boundary.
- What is injected (o_t and the template's marks around it) is tokenised by itself. The text of a
  problem or an observation never becomes a special token; a thought or code that spells one is
  refused.

Two formats. `paper` (method.md 2): one assistant turn with code and outputs as markdown fences.
`tool_call`: OpenAI's messages, every action a tool call that ends its turn, every observation a
message of role `tool`.

In the second, the template shows every turn, and one that shows the same conversation differently
once it goes on (thoughts taken out of earlier turns, text trimmed or dropped) contradicts the first
point. `Renderer` finds out before any work starts: it renders a short conversation part by part and
as a whole, and compares.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from shared.errors import ConfigError, InputError
from shared.fences import action, observation
from shared.prompts import Name, Profile, render
from shared.segments import Kind, Segment
from shared.trajectory import End, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN_THINK, END_THINK = "<think>", "</think>"
OPENING = BEGIN_THINK + "\n"  # how a stored thinking trajectory begins

PYTHON_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs a self-contained Python program and returns what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program."}},
            "required": ["code"],
        },
    },
}

_SLOT = "\ue000slot\ue000"  # stands for a text while the template renders what is around it


class Format(StrEnum):
    PAPER = "paper"
    TOOL_CALL = "tool_call"


# The tools are declared by the template in the one, by the prompt in the other.
_PROMPT: dict[Format, Name] = {Format.PAPER: "policy", Format.TOOL_CALL: "reasoner"}


class Run(NamedTuple):
    """What the policy writes between two injected texts, and what is injected after it."""

    thought: str
    code: str | None = None
    output: str | None = None


_ASKED, _SAID = "What is 6 * 7?", "Forty-two"
_PROBE = (Run("Multiply first.", "print(6 * 7)", "42"), Run("Check.", "print(42 / 7)", "6.0"))


class Renderer:
    """Renders trajectories for one tokenizer, format and mode of thinking.

    Raises ConfigError at once if the chat template is not prefix-stable in that format and mode,
    ends a turn by no token of its own, or if the tokenizer does not give back its text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        profile: Profile,
        *,
        style: Format = Format.PAPER,
        thinking: bool = False,
    ) -> None:
        self.tokenizer, self.profile = tokenizer, profile
        self.style, self.thinking = style, thinking
        self.eos = self._turn_end()  # ends the policy's turn; rollouts stop at it
        self._eos_text = self.decode([self.eos])
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple(token.content for token in added if token.special)
        # Some templates write the beginning of the thinking into the prompt themselves.
        header = self._header(_ASKED)
        done = max(n for n in range(len(OPENING) + 1) if header.endswith(OPENING[:n]))
        self._opening = OPENING[done:] if thinking and style is Format.PAPER else ""
        self._check()

    def prompt(self, problem: str) -> Segment:
        """The chat up to where the policy speaks."""
        content = render(self.profile, _PROMPT[self.style], problem=problem)
        return Segment(Kind.PROMPT, self._around(self._header(_SLOT), content))

    def observation(self, output: str) -> Segment:
        """What is injected after an action, up to where the policy speaks again.

        In the paper's format it follows the closing fence; as a tool's message it follows the EOS
        of the turn that made the call.
        """
        if self.style is Format.PAPER:
            return Segment(Kind.OBSERVATION, self._around(_SLOT, observation(output)))
        call = _PROBE[0]
        before = self._header(_ASKED) + self._turn(call) + self._eos_text
        messages = [_user(_ASKED), self._message(call), {"role": "tool", "content": _SLOT}]
        injected = self._after(before, self._template(messages, more=True))
        return Segment(Kind.OBSERVATION, self._around(injected, output))

    def split(
        self, ids: Sequence[int], thought: int, logprobs: Sequence[float] | None = None
    ) -> list[Segment]:
        """What the policy wrote in one go, as r_t and a_t: its first `thought` characters are r_t.

        A token that straddles belongs to a_t. `logprobs`: the sampler's, for a rollout.
        """
        prefixes = range(len(ids) + 1)
        at = bisect_right(prefixes, thought, key=lambda n: len(self.decode(ids[:n]))) - 1
        parts = ((Kind.THOUGHT, slice(at)), (Kind.CODE, slice(at, None)))
        return [
            Segment(kind, tuple(ids[part]), None if logprobs is None else tuple(logprobs[part]))
            for kind, part in parts
            if ids[part]
        ]

    def render(self, problem: str, trajectory: Trajectory) -> tuple[Segment, ...]:
        """The whole exchange. It ends with EOS if the policy ended its turn, not if it was cut.

        Raises InputError for a trajectory of the other mode of thinking, for one whose steps are
        not its text, where a thought or code spells a special token, and for one that was cut, if
        the template has to close its last turn.
        """
        where = f"a trajectory of problem {trajectory.problem_key[:12]}"
        if trajectory.thinking is not self.thinking:
            raise InputError(
                f"The trajectory was made with thinking={trajectory.thinking}.",
                where=where,
                remedy=f"this renderer is for thinking={self.thinking}; select trajectories by it",
            )
        runs = list(_runs(trajectory))
        said = "".join(map(_as_text, runs))
        if trajectory.text != (OPENING if self.thinking else "") + said:
            raise InputError(
                "The steps of the trajectory, joined, are not its text.",
                where=where,
                remedy="generate or import it again: its ids would not be what was stored",
            )
        written = "".join(run.thought + "\n" + (run.code or "") for run in runs)
        spelled = [name for name in self._special if name in written]
        if spelled:
            raise InputError(
                f"A thought or code spells the special token {spelled[0]}.",
                where=where,
                remedy="leave the trajectory out: the text would become that token",
            )
        ended = trajectory.end in (End.ANSWERED, End.GAVE_UP)
        if not ended and self.style is Format.TOOL_CALL:
            raise InputError(
                f"The trajectory was cut ({trajectory.end}); as messages it would look finished.",
                where=where,
                remedy="leave it out, or use the paper's format",
            )
        return (self.prompt(problem), *self._response(runs, ended=ended))

    # ---- parts of a response ----------------------------------------------------------------

    def _response(self, runs: Sequence[Run], *, ended: bool) -> Iterator[Segment]:
        for number, run in enumerate(runs):
            text, thought = self._written(run, first=number == 0)
            yield from self.split(self._encode(text), thought)
            if run.output is not None:
                if self.style is Format.TOOL_CALL:
                    yield Segment(Kind.EOS, (self.eos,))
                yield self.observation(run.output)
        if ended:
            yield Segment(Kind.EOS, (self.eos,))

    def _written(self, run: Run, *, first: bool) -> tuple[str, int]:
        """A run as the policy writes it, and how many of its characters are the thought."""
        if self.style is Format.PAPER:
            thought = (self._opening if first else "") + run.thought
            return thought + (action(run.code) if run.code is not None else ""), len(thought)
        turn = self._turn(run)
        if run.code is None:
            return turn, len(turn)
        # The action is what the tool call adds to the same turn without one.
        return turn, _agree(turn, self._turn(Run(run.thought)))

    def _turn(self, run: Run) -> str:
        """A run as an assistant's turn, from the end of the prompt to before the EOS."""
        whole = self._template([_user(_ASKED), self._message(run)])
        turn, end, _ = self._after(self._header(_ASKED), whole).rpartition(self._eos_text)
        if not end:
            raise self._refused("It ends a tool call by another token than an answer.")
        return turn

    def _message(self, run: Run) -> dict[str, Any]:
        """A run as a message of OpenAI's form; thoughts of a thinking policy are its reasoning."""
        message: dict[str, Any] = {"role": "assistant", "content": run.thought.strip()}
        if self.thinking:
            reasoning, _, content = run.thought.partition(END_THINK)
            message |= {"reasoning_content": reasoning.strip(), "content": content.strip()}
        if run.code is not None:
            function = {"name": PYTHON_TOOL["function"]["name"], "arguments": {"code": run.code}}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    # ---- the template and the tokenizer -----------------------------------------------------

    def _header(self, content: str) -> str:
        return self._template([_user(content)], more=True)

    def _template(self, messages: Sequence[dict[str, Any]], *, more: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=[PYTHON_TOOL] if self.style is Format.TOOL_CALL else None,
                add_generation_prompt=more,
                enable_thinking=self.thinking,
                tokenize=False,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise self._refused(f"It does not render a conversation: {error}") from error
        return text

    def _encode(self, text: str, *, plain: bool = False) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, special tokens written out."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _around(self, text: str, content: str) -> tuple[int, ...]:
        """Ids of a rendered text with `content` in its slot; none of it becomes a special token."""
        before, slot, after = text.partition(_SLOT)
        if not slot:
            raise self._refused("It drops or alters what a message says.")
        return (*self._encode(before), *self._encode(content, plain=True), *self._encode(after))

    # ---- the check at start -----------------------------------------------------------------

    def _turn_end(self) -> int:
        """The token that the template puts after an answer.

        Not the tokenizer's `eos_token`: base models name another one than their template writes.
        """
        whole = self._template([_user(_ASKED), {"role": "assistant", "content": _SAID}])
        ids = self._encode(whole.rpartition(_SAID)[2])
        if _SAID not in whole:
            raise self._refused("It drops or alters what a message says.")
        if not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise self._refused("It ends an answer by no special token, so a turn has no end.")
        return ids[0]

    def _check(self) -> None:
        """A short conversation, part by part, must be what the template makes of it as a whole."""
        said = f"\n{END_THINK}\n\n{_SAID}" if self.thinking else _SAID
        runs = [*_PROBE, Run(said)]
        prompt = self._around(self._header(_SLOT), _ASKED)
        response = [i for part in self._response(runs, ended=True) for i in part.ids]
        parts = self.decode([*prompt, *response])
        if self.style is Format.PAPER:  # one turn, which the template never shows again
            whole = self._header(_ASKED) + self._opening + "".join(map(_as_text, runs))
            whole += self._eos_text
        else:
            messages = [_user(_ASKED)]
            for run in runs:
                messages.append(self._message(run))
                if run.output is not None:
                    messages.append({"role": "tool", "content": run.output})
            whole = self._template(messages)
        self._after(parts, whole)
        lost = [t for run in _PROBE for t in (run.thought, run.code or "") if t not in parts]
        if lost:
            raise self._refused(f"It drops what is said beside or in a tool call ({lost[0]!r}).")

    def _after(self, begun: str, whole: str) -> str:
        """What `whole` adds to `begun`. Raises ConfigError where the template changed its mind."""
        if whole.startswith(begun):
            return whole[len(begun) :]
        at = _agree(begun, whole)
        around = slice(max(0, at - 24), at + 40)
        raise self._refused(
            "A conversation that goes on is rendered differently from what was said before it:"
            f" {begun[around]!r} became {whole[around]!r}."
        )

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"The chat template cannot be trained with. {why}",
            where=f"{self.tokenizer.name_or_path or 'tokenizer'}, {self.style} format,"
            f" thinking={self.thinking}",
            remedy="use a template that only ever appends (one made for training), another format,"
            " or the other mode of thinking",
        )


def _runs(trajectory: Trajectory) -> Iterator[Run]:
    """Steps without a call flow into the next one: the policy writes them in one go."""
    thought = ""
    for step in trajectory.steps:
        thought += step.thought
        if step.call is not None:
            yield Run(thought, step.call.code, step.call.observation)
            thought = ""
    if thought:
        yield Run(thought)


def _agree(a: str, b: str) -> int:
    """How many characters two texts share from the start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )


def _as_text(run: Run) -> str:
    """A run as it stands in `Trajectory.text`."""
    if run.code is None or run.output is None:
        return run.thought
    return run.thought + action(run.code) + observation(run.output)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}
