"""Async clients of OpenAI-compatible servers: admission, retries, deadlines, usage.

    config = EndpointConfig(base_url="http://127.0.0.1:8000/v1", model="nano")
    meter = UsageMeter()
    async with Endpoint(config) as policy:
        await policy.check()
        reply = await policy.chat(messages, Sampling(), seed=7, meter=meter["reasoner"])

`client.py` states what always holds; docs/endpoints.md says how it is set.
"""

from shared.endpoints.client import Endpoint, Learned
from shared.endpoints.config import EndpointConfig, Sampling
from shared.endpoints.replies import Completion
from shared.endpoints.usage import Usage, UsageMeter

__all__ = ["Completion", "Endpoint", "EndpointConfig", "Learned", "Sampling", "Usage", "UsageMeter"]
