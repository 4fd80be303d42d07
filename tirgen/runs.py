"""A run from its problems to its end; what the CLI and the Client have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shared.endpoints import Endpoint, EndpointConfig
from shared.errors import ConfigError
from shared.store.database import Database
from shared.store.models import RunRow
from shared.store.queries import find_run
from shared.store.trajectories import import_problems
from shared.trajectory import Problem
from shared.version import code_version
from shared.work.celery_app import check_broker, make_app, prepare_broker, publish
from shared.work.items import create_items
from shared.work.runs import create_run
from shared.work.slots import open_slots
from shared.work.slots import ring as ring_slots
from tirgen.config import RunConfig, differences, parse

KIND = "generate"  # of the run, hence of its queue and its task


def start(
    db: Database,
    name: str,
    config: RunConfig,
    problems: Sequence[Problem],
    samples: int,
    slots: int,
) -> int:
    """Create the run with all its work items, in one transaction; returns its id.

    Raises InputError if the name is taken.
    """
    unique = list({problem.key: problem for problem in problems}.values())
    with db.begin() as session:
        import_problems(session, unique)
        run_id = create_run(
            session,
            name=name,
            kind=KIND,
            config=config.model_dump(mode="json"),
            fingerprint=config.fingerprint,
            code_version=code_version(),
        )
        keys = [problem.key for problem in unique]
        create_items(session, run_id, keys, samples, config.fingerprint)
        open_slots(session, run_id, slots)
    return run_id


def stored_config(run: RunRow) -> RunConfig:
    """The run's own configuration; raises ConfigError if this version cannot read it."""
    return parse(run.config, f"run {run.name}")


def check_unchanged(run: RunRow, config: RunConfig) -> None:
    """Refuse a configuration that would generate something else under the same name."""
    changed = differences(stored_config(run).identity(), config.identity())
    if changed:
        raise ConfigError(
            f"Run {run.name!r} was started with another configuration:\n    "
            + "\n    ".join(changed),
            where=f"run {run.name}",
            remedy="resume it without these settings, or start a new run with --run NAME",
        )


def reconfigure(db: Database, name: str, config: RunConfig) -> None:
    """Store what may change under a run's name: where requests go, and how patiently.

    Raises ConfigError, naming the fields, where `config` would generate something else.
    """
    run = find(db, name)
    check_unchanged(run, config)
    with db.begin() as session:
        find_run(session, run.name).config = config.model_dump(mode="json")


def find(db: Database, name: str) -> RunRow:
    """Raises InputError, naming the runs that there are."""
    with db.session() as session:
        return find_run(session, name)


def ring(db: Database) -> None:
    """Tell the workers that there is something to do. Raises BrokerError, but loses nothing."""
    app = make_app(db)
    prepare_broker(db, app)
    publish(app, ring_slots(db))


def endpoints(config: RunConfig) -> list[EndpointConfig]:
    """The distinct endpoints of all roles."""
    return list({address: None for _, address in _addresses(config)})


def roles(config: RunConfig, endpoint: EndpointConfig) -> list[str]:
    """Those that are played there."""
    return [role for role, address in _addresses(config) if address == endpoint]


def _addresses(config: RunConfig) -> list[tuple[str, EndpointConfig]]:
    found = [("reasoner", config.reasoner.endpoint), ("extractor", config.extractor.endpoint)]
    return [*found, *([("judge", config.judge.endpoint)] if config.judge else [])]


def preflight(db: Database, config: RunConfig) -> None:
    """Ask the broker, and every endpoint for its models, before any work starts.

    The reasoner's server must also answer /tokenize, which only vLLM and its like have.
    Raises BrokerError or EndpointError.
    """
    app = make_app(db)
    prepare_broker(db, app)
    check_broker(app)

    async def ask() -> None:
        for address in endpoints(config):
            async with Endpoint(address) as endpoint:
                await endpoint.check()
                if address == config.reasoner.endpoint:
                    await endpoint.tokenize("1")

    asyncio.run(ask())
