"""Engines that sample from the policy, behind `shared.policy.Engine`.

LocalEngine   torch in this process: no server, bit for bit the same whatever else is sampled
HttpEngine    vLLM, or the nano server, over HTTP
"""

from rl.rollout.local import LocalEngine

__all__ = ["LocalEngine"]
