"""What a user sets about an endpoint, and what is sampled from it."""

from __future__ import annotations

import ipaddress
import os
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared.errors import ConfigError

StopString = Annotated[str, Field(min_length=1)]

NO_KEY = "EMPTY"
"""What vLLM and its peers expect from a client that has no key."""


class EndpointConfig(BaseModel):
    """One model on one OpenAI-compatible server, or on several. Times are seconds.

    The key itself is never part of a config: only the name of the variable that holds it. Limits
    are those of one server and of one worker process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(
        description="Ends in /v1 on almost every server. Several servers of the same model: a "
        "list, or one string with commas."
    )
    model: str = Field(min_length=1)
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    # httpx has been seen to hang above about 2 000 requests in flight (NeMo-Skills).
    concurrency: int = Field(
        default=256,
        ge=1,
        le=2000,
        description="Requests in flight, at most; how many there are below that is found out.",
    )
    start_concurrency: int = Field(
        default=16, ge=1, description="Requests in flight at first, before anything is known."
    )
    min_concurrency: int = Field(default=1, ge=1, description="Requests in flight, at least.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Prompt and completion, on average."
    )
    prompt_price: float = Field(default=0.0, ge=0, description="Money per million prompt tokens.")
    completion_price: float = Field(
        default=0.0, ge=0, description="Money per million completion tokens."
    )
    timeout: float = Field(
        default=600.0, gt=0, description="For one try, to the last byte of its reply."
    )
    connect_timeout: float = Field(default=10.0, gt=0)
    deadline: float = Field(
        default=1800.0, gt=0, description="For a request with its retries and waits."
    )
    max_retries: int = Field(default=5, ge=0)

    @field_validator("base_url", mode="before")
    @classmethod
    def _as_one_string(cls, given: object) -> object:
        listed = isinstance(given, (list, tuple)) and all(isinstance(url, str) for url in given)
        return ",".join(given) if listed else given  # type: ignore[arg-type]

    @field_validator("base_url")
    @classmethod
    def _is_plain_http(cls, given: str) -> str:
        urls = [url.strip().rstrip("/") for url in given.split(",")]
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("not an http(s) URL such as http://127.0.0.1:8000/v1")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    "must not carry credentials, a query or a fragment (see api_key_env)"
                )
        if len(set(urls)) < len(urls):
            raise ValueError("names a server twice")
        return ",".join(urls)

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.deadline < self.timeout:
            raise ValueError(f"deadline ({self.deadline} s) is shorter than timeout of one try")
        if self.min_concurrency > self.concurrency:
            raise ValueError("min_concurrency is above concurrency")
        return self

    @property
    def base_urls(self) -> tuple[str, ...]:
        return tuple(self.base_url.split(","))

    @property
    def root_url(self) -> str:
        """Where one server (ConfigError if there are several) keeps what is not OpenAI's."""
        if len(self.base_urls) > 1:
            raise ConfigError(
                "There are several servers where one is needed.",
                where=f"base_url = {self.base_url}",
                remedy="name one: what is sent there is for a single server",
            )
        return self.base_url.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        return all(map(is_loopback, self.base_urls))

    def read_key(self) -> str:
        """The key, from the environment. Raises ConfigError if it cannot be sent as a header."""
        key = os.environ.get(self.api_key_env, "").strip() or NO_KEY
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                "The API key has characters that no HTTP header can carry.",
                where=f"environment variable {self.api_key_env}",
                remedy="Set it again: it may hold a line break or a typographic quote.",
            )
        return key


class Sampling(BaseModel):
    """How a reply is drawn.

    What is None is not sent, and the server's own default holds: vLLM takes top_k from the model's
    generation_config.json then (-1 switches it off), OpenAI refuses a top_k at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=1.0, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    max_tokens: int = Field(default=1024, ge=1)
    stop: tuple[StopString, ...] = ()
    include_stop: bool = Field(
        default=False, description="Keep the stop string in the text (vLLM, nano)."
    )

    def request_fields(self, seed: int | None) -> dict[str, object]:
        """The fields of a request body; None means that the field is not sent."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop) or None,
            "include_stop_str_in_output": True if self.include_stop and self.stop else None,
            "seed": seed,
        }


# Where a request goes, how patiently and at what price: all but the model.
NOT_IDENTITY = frozenset(EndpointConfig.model_fields) - {"model"}


def is_loopback(url: str) -> bool:
    """Does it name this machine?"""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
