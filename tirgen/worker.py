"""What a Celery task of the `generate` queue does with its leased items.

One slice of a run opens the endpoints, the sandbox and the compiled graph once, and then turns
every item into a trajectory with verdicts, or into a failure with a class and its raw text. Nothing
that goes wrong with one item reaches another (shared/work/slices.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from celery import signals

from shared.endpoints import Endpoint, EndpointConfig, UsageMeter
from shared.errors import EndpointError, SandboxError
from shared.grading import Grader
from shared.sandbox.backend import backend
from shared.store.database import Database
from shared.store.trajectories import Completed, RoleUsage
from shared.telemetry import log_json
from shared.version import code_version
from shared.work import celery_app
from shared.work.items import Failed, LeasedItem
from shared.work.slices import Handler, RunInfo, SliceSettings
from tirgen.agents.code_extractor import CodeExtractor
from tirgen.agents.reasoner import Reasoner
from tirgen.agents.verifier import Judge, Verifier
from tirgen.config import RunConfig, parse
from tirgen.graph import Agents, Graph
from tirgen.runs import KIND, endpoints
from tirgen.seeds import derive

GRACE_SECONDS = 20.0  # for items in flight, after SIGTERM
END_SECONDS = 10.0  # more, for what comes after: then the worker is ended by force


def serve(
    db: Database,
    processes: int,
    *,
    grace: float = GRACE_SECONDS,
    json_logs: bool = False,
    events: bool = False,
) -> int:
    """Be a Celery worker until SIGTERM, then drain; returns the exit code.

    It ends within `grace` + END_SECONDS of the signal, whatever hangs. `events`: send what Flower
    shows.
    """
    if json_logs:
        log_json()
        signals.setup_logging.connect(lambda **_: None, weak=False)  # Celery's own go there, too
    app = celery_app.make_app(db)
    celery_app.prepare_broker(db, app)
    celery_app.check_broker(app)

    def settings_of(run: RunInfo) -> SliceSettings:
        return SliceSettings(in_flight=_config(run).in_flight, grace_seconds=grace)

    celery_app.register_slices(app, db, KIND, generator, settings_of)
    drain = grace + END_SECONDS
    return celery_app.run_worker(app, db, [KIND], processes, drain_seconds=drain, events=events)


@asynccontextmanager
async def generator(run: RunInfo) -> AsyncIterator[Handler]:
    """Everything that the items of one slice share; closed when the slice ends."""
    config = _config(run)
    async with AsyncExitStack() as stack:
        clients: dict[EndpointConfig, Endpoint] = {
            address: await stack.enter_async_context(Endpoint(address))
            for address in endpoints(config)
        }
        tier = config.tool.minimum_tier
        sandbox = await stack.enter_async_context(backend(config.tool.sandbox_url, tier))
        grader = await stack.enter_async_context(Grader(zygotes=1, minimum_tier=tier))
        judge = None
        if config.judge is not None:
            judge = Judge(clients[config.judge.endpoint], config.judge, config.prompts)
        agents = Agents(
            config=config,
            reasoner=Reasoner(clients[config.reasoner.endpoint], config.reasoner, config.prompts),
            extractor=CodeExtractor(
                clients[config.extractor.endpoint], config.extractor, config.prompts
            ),
            sandbox=sandbox,
            verifier=Verifier(config, sandbox, grader, judge),
        )
        yield _Generator(config, Graph(agents)).__call__


def _config(run: RunInfo) -> RunConfig:
    return parse(run.config, f"run {run.name}")


class _Generator:
    def __init__(self, config: RunConfig, graph: Graph) -> None:
        self.config, self.graph, self.code_version = config, graph, code_version()

    async def __call__(self, item: LeasedItem) -> Completed | Failed:
        meter, started = UsageMeter(), time.monotonic()
        seed = derive(self.config.seed, item.problem.key, item.sample_index)
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
                endpoint=role.endpoint.base_url,
                requests=spent.requests,
                prompt_tokens=spent.prompt_tokens,
                completion_tokens=spent.completion_tokens,
                retries=spent.retries,
                duration=spent.seconds,
            )
            for name, spent in meter.items()
            if (role := roles[name]) is not None and spent.requests
        )
