"""What a Celery task of the `generate` queue does with its leased items.

One slice of a run opens the endpoints, the sandbox and the compiled graph once, and then turns
every item into a trajectory with verdicts, or into a failure with a class and its raw text. Nothing
that goes wrong with one item reaches another (shared/work/slices.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NoReturn

import openai  # noqa: F401  (here, so that the pool's processes are forked with it)
from celery import signals

from shared import tracing
from shared.endpoints import Endpoint, EndpointConfig, Learned, UsageMeter, balancer
from shared.errors import EndpointError, SandboxError
from shared.grading import Grader
from shared.sandbox.backend import backend
from shared.store.database import Database
from shared.store.trajectories import Completed, RoleUsage
from shared.telemetry import log_json
from shared.version import code_version
from shared.work import celery_app
from shared.work.items import Failed, LeasedItem
from shared.work.slices import GRACE_SECONDS, Handler, OpenHandler, RunInfo, SliceSettings
from tirgen.agents.code_extractor import CodeExtractor
from tirgen.agents.reasoner import Reasoner
from tirgen.agents.verifier import Judge, Verifier
from tirgen.config import RunConfig, parse
from tirgen.graph import Agents, Graph
from tirgen.live import Tool, watched
from tirgen.runs import KIND, endpoints, roles
from tirgen.seeds import derive

END_SECONDS = 10.0  # more, for what comes after: then the worker is ended by force


def serve(
    db: Database,
    processes: int,
    *,
    grace: float = GRACE_SECONDS,
    json_logs: bool = False,
    events: bool = False,
) -> NoReturn:
    """Be a Celery worker until SIGTERM, then drain and end this process.

    It ends within `grace` + END_SECONDS of the signal, whatever hangs. `events`: send what Flower
    shows.
    """
    if json_logs:
        log_json()
        signals.setup_logging.connect(lambda **_: None, weak=False)  # Celery's own go there, too
    tracing.check()
    signals.worker_process_init.connect(_start_tracing)
    signals.worker_process_shutdown.connect(_stop_tracing)
    app = celery_app.make_app(db)
    celery_app.prepare_broker(db, app)
    celery_app.check_broker(app)

    def settings_of(run: RunInfo) -> SliceSettings:
        return SliceSettings(in_flight=_config(run).in_flight, grace_seconds=grace)

    celery_app.register_slices(app, db, KIND, generator(db), settings_of)
    drain = grace + END_SECONDS
    celery_app.run_worker(app, db, [KIND], processes, drain_seconds=drain, events=events)


def _start_tracing(**_: object) -> None:
    tracing.start()


def _stop_tracing(**_: object) -> None:
    tracing.stop()


_learned: Learned = {}  # of the endpoints, from one slice of this process to the next


def generator(db: Database) -> OpenHandler:
    """What opens everything that the items of one slice share."""

    @asynccontextmanager
    async def opened(run: RunInfo) -> AsyncIterator[Handler]:
        config = _config(run)
        async with AsyncExitStack() as stack:
            clients = {
                address: await stack.enter_async_context(Endpoint(address, _learned))
                for address in endpoints(config)
            }
            played = {", ".join(roles(config, address)): clients[address] for address in clients}
            agents = await _agents(config, clients, stack)
            graph = Graph(agents)
            tool = Tool(agents.sandbox, config.tool.sandbox_url)
            await stack.enter_async_context(watched(db, run.id, played, tool))
            yield _Generator(config, graph).__call__

    return opened


async def _agents(
    config: RunConfig, clients: Mapping[EndpointConfig, Endpoint], stack: AsyncExitStack
) -> Agents:
    tier = config.tool.minimum_tier
    sandbox = await stack.enter_async_context(backend(config.tool.sandbox_url, tier))
    grader = await stack.enter_async_context(Grader(zygotes=1, minimum_tier=tier))
    judge = None
    if config.judge is not None:
        judge = Judge(clients[config.judge.endpoint], config.judge, config.prompts)
    reasoner, extractor = config.reasoner, config.extractor
    return Agents(
        config=config,
        reasoner=Reasoner(clients[reasoner.endpoint], reasoner, config.prompts),
        extractor=CodeExtractor(clients[extractor.endpoint], extractor, config.prompts),
        sandbox=sandbox,
        verifier=Verifier(config, sandbox, grader, judge),
    )


def _config(run: RunInfo) -> RunConfig:
    return parse(run.config, f"run {run.name}")


class _Generator:
    def __init__(self, config: RunConfig, graph: Graph) -> None:
        self.config, self.graph, self.code_version = config, graph, code_version()

    async def __call__(self, item: LeasedItem) -> Completed | Failed:
        meter, started = UsageMeter(), time.monotonic()
        seed = derive(self.config.seed, item.problem.key, item.sample_index)
        balancer.trajectory.set(f"{item.problem.key}/{item.sample_index}")
        try:
            trajectory, verdicts = await self.graph.run(item.problem, seed, meter)
        except EndpointError as error:
            return Failed(error.kind, str(error), error.retryable, error.raw, self._usage(meter))
        except SandboxError as error:
            return Failed("infrastructure", str(error), True, None, self._usage(meter))
        return Completed(
            trajectory=trajectory,
            verdicts=verdicts,
            rejected_by=self.graph.agents.verifier.rejected_by(verdicts),
            duration=time.monotonic() - started,
            reasoner_model=self.config.reasoner.endpoint.model,
            extractor_model=self.config.extractor.endpoint.model,
            code_version=self.code_version,
            usage=self._usage(meter),
        )

    def _usage(self, meter: UsageMeter) -> tuple[RoleUsage, ...]:
        config = self.config
        roles = {
            "reasoner": config.reasoner,
            "extractor": config.extractor,
            "verifier": config.judge,
        }
        return tuple(
            RoleUsage(
                role=name,
                model=role.endpoint.model,
                endpoint=spent.base_url or role.endpoint.base_url,
                requests=spent.requests,
                prompt_tokens=spent.prompt_tokens,
                completion_tokens=spent.completion_tokens,
                retries=spent.retries,
                duration=spent.seconds,
            )
            for name, spent in meter.items()
            if (role := roles[name]) is not None and spent.requests
        )
