"""Prompts as data: one folder of Jinja templates per profile.

`full` is for capable models (unproven until somebody runs it on one); `compact` is what nano was
trained on. They live in `shared` because the service renders them to generate, the trainer to train
and nano's recipe to make demonstrations: one template across SFT, RL and inference.

reasoner         problem                 -> the reasoner's turn (THOR 4.1, actor)
policy           problem                 -> a tool-using policy's turn: training and evaluation
extractor        step                    -> one JSON reply: judge + extract + convert
extractor_judge, extractor_logic, extractor_code: the same as three calls (Alg. 1 as published)
judge            reference, answer       -> a model's opinion on the final answer
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Literal

import jinja2

Profile = Literal["full", "compact"]
Name = Literal[
    "reasoner",
    "policy",
    "extractor",
    "extractor_judge",
    "extractor_logic",
    "extractor_code",
    "judge",
]


@cache
def _template(profile: Profile, name: Name) -> jinja2.Template:
    source = files(__package__).joinpath(profile, f"{name}.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    return env.from_string(source.rstrip("\n"))


def render(profile: Profile, name: Name, **values: str) -> str:
    """The user message of one request. Raises jinja2.UndefinedError for a missing value."""
    return _template(profile, name).render(values)


@cache
def version(profile: Profile) -> str:
    """First 12 hex digits of the SHA-256 over a profile's templates: part of a run's identity."""
    folder = files(__package__).joinpath(profile)
    digest = hashlib.sha256()
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        digest.update(item.name.encode() + b"\0" + item.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
