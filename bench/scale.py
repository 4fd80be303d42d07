"""What breaks first when one database serves many hosts, and where (docs/scale.md).

    python bench/scale.py measure [PART...]    what is missing in bench/results
    python bench/scale.py constants    every constant, with the line that it is read from
    python bench/scale.py check        one process of this machine: predicted, and as measured
    python bench/scale.py model        the worked example: utilisations, and what is full when
    python bench/scale.py simulate     the model against a simulation, 1 to 400 hosts; a host dies
    python bench/scale.py simulate --plot FILE.png --hosts 50 100 200

`--set key=value` changes a field of Cluster or Workload (bench/scaling/model.py), for instance
`--set hosts=20 --set database_cores=8`. One JSON object a line; all but `measure` only reads
bench/results. `simulate` needs simpy, `--plot` matplotlib.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.scaling import model
from bench.scaling.constants import NAMES, SI, lines, measured
from bench.scaling.model import Cluster, Workload
from bench.scaling.report import report

HOSTS = (1, 2, 5, 10, 20, 50, 100, 200, 400)
SECONDS = 200.0  # simulated; the second half counts
MACHINE_CORES = 2  # of the machine of bench/results


def constants() -> None:
    there, values = lines(), asdict(measured())
    for name, key in NAMES.items():
        line = there[key]
        scaled = round(values[name] / SI[line.unit], 6)
        report(f"constant {name}", scaled, line.unit, source=" / ".join(key), date=line.date)


def check() -> None:
    """A process is one thread, a machine two cores that everything shares."""
    c = measured()
    thread = 1 / c.process_cpu
    machine = MACHINE_CORES / (c.worker_cpu + c.service_server_cpu)
    predicted = min(thread, machine)
    report(
        "trajectories at zero latency, one process: predicted", predicted, "1/s",
        measured=c.one_process, deviation=round(predicted / c.one_process - 1, 3),
        by="its thread" if thread < machine else "the machine's cores",
    )  # fmt: skip
    cpu, wal = model.server_price(c, Workload())
    for name, told, seen, unit in (
        ("server CPU", 1e3 * cpu, 1e3 * c.service_server_cpu, "ms"),
        ("log", wal, c.service_wal, "bytes"),
    ):
        report(
            f"{name} of a trajectory: of its statements", told, unit,
            measured=seen, deviation=round(told / seen - 1, 3),
        )  # fmt: skip


def show(work: Workload, at: Cluster) -> None:
    c = measured()
    found = model.outlook(c, work, at, wall=False)
    seen = {name: round(value, 4) for name, value in found.utilisation.items()}
    report("trajectories a second", found.rate, "1/s", bottleneck=found.bottleneck, hosts=at.hosts)
    report("time for all items", found.seconds / 86400, "days", items=work.items)
    report("utilisation", max(seen.values()), "", of=seen)
    for name, hosts in model.order(c, work, at):
        report(f"full: {name}", hosts if math.isfinite(hosts) else None, "hosts")
    for name, value in asdict(model.amounts(c, work, at)).items():
        report(f"whole run: {name}", value if math.isfinite(value) else None, "")


def simulate(work: Workload, at: Cluster, many: list[int], plot: Path | None) -> None:
    """One server of models for every host, as in `at`."""
    from bench.scaling.simulation import simulate as run

    c, share = measured(), at.endpoints / at.hosts
    rows: list[dict[str, Any]] = []
    for hosts in many:
        grown = replace(at, hosts=hosts, endpoints=share * hosts)
        said, seen = model.outlook(c, work, grown, wall=False), run(c, work, grown, SECONDS)
        rows.append(
            {"hosts": hosts, "rate": said.rate, "simulated": seen.rate, "used": said.utilisation}
        )
        report(
            f"simulated at {hosts} hosts", seen.rate, "1/s", predicted=round(said.rate, 3),
            ratio=round(seen.rate / said.rate, 4) if said.rate else None,
            bottleneck=said.bottleneck, complete_mean_ms=round(1e3 * seen.complete_mean, 2),
            complete_p99_ms=round(1e3 * seen.complete_p99, 2), database=round(seen.database, 4),
            leases_lost=seen.lost,
        )  # fmt: skip
    dead = run(c, work, at, SECONDS, dying=0.1)
    report("simulated while a tenth of the hosts dies", dead.rate, "1/s", in_flight_lost=dead.died,
           hosts=at.hosts, leases_lost=dead.lost)  # fmt: skip
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    hosts = [row["hosts"] for row in rows]
    left.loglog(hosts, [row["rate"] for row in rows], label="model")
    left.loglog(hosts, [row["simulated"] for row in rows], "o", label="simulation")
    left.set(xlabel="hosts", ylabel="trajectories a second")
    left.legend()
    for name in rows[0]["used"]:
        right.loglog(hosts, [max(1e-4, row["used"][name]) for row in rows], label=name)
    right.axhline(1.0, color="black", linewidth=0.8)
    right.set(xlabel="hosts", ylabel="utilisation")
    right.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def settings(given: list[str]) -> tuple[Workload, Cluster]:
    work: dict[str, Any] = {}
    at: dict[str, Any] = {}
    for one in given:
        key, _, value = one.partition("=")
        for kind, into in ((Workload, work), (Cluster, at)):
            for field in fields(kind):
                if field.name == key:
                    of = {"int": int, "float": float, "bool": lambda v: v == "true"}
                    into[key] = of[str(field.type)](value)
        if key not in work and key not in at:
            raise SystemExit(f"--set {key}: no such field")
    return Workload(**work), Cluster(**at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "constants", "check", "model", "simulate"))
    parser.add_argument("parts", nargs="*", help="of measure")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--hosts", nargs="+", type=int, default=list(HOSTS), help="of simulate")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    work, at = settings(args.set)
    if args.what == "measure":
        from bench.scaling import measure

        for part in args.parts or measure.PARTS:
            measure.PARTS[part]()
    elif args.what == "model":
        show(work, at)
    elif args.what == "simulate":
        simulate(work, at, args.hosts, args.plot)
    else:
        {"constants": constants, "check": check}[args.what]()


if __name__ == "__main__":
    main()
