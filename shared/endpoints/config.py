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
    """One model on one OpenAI-compatible server. Times are seconds.

    The key itself is never part of a config: only the name of the variable that holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(description="Ends in /v1 on almost every server.")
    model: str = Field(min_length=1)
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    # httpx has been seen to hang above about 2 000 requests in flight (NeMo-Skills).
    concurrency: int = Field(default=64, ge=1, le=2000, description="Requests in flight, at most.")
    timeout: float = Field(
        default=600.0, gt=0, description="For one try, to the last byte of its reply."
    )
    connect_timeout: float = Field(default=10.0, gt=0)
    deadline: float = Field(
        default=1800.0, gt=0, description="For a request with its retries and waits."
    )
    max_retries: int = Field(default=5, ge=0)

    @field_validator("base_url")
    @classmethod
    def _is_plain_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http(s) URL such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not carry credentials, a query or a fragment (see api_key_env)")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _deadline_holds_a_try(self) -> Self:
        if self.deadline < self.timeout:
            raise ValueError(f"deadline ({self.deadline} s) is shorter than timeout of one try")
        return self

    @property
    def root_url(self) -> str:
        """Where vLLM keeps what is not OpenAI's (/tokenize, /detokenize)."""
        return self.base_url.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        host = urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

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
