"""Claims of bench/scaling: the model obeys the utilisation law, its constants are measured ones,
and the simulation that checks it agrees with queueing theory where that has a closed form.

Figures here are made up; nothing depends on what was measured.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from bench.scaling.constants import NAMES, SI, Constants, lines, measured
from bench.scaling.model import BEAT, Cluster, Workload, order, outlook, resources
from bench.scaling.simulation import simulate

FREE = Constants(**dict.fromkeys((field.name for field in fields(Constants)), 0.0))
ENDLESS = Cluster(
    hosts=4, cores=2, processes=2, in_flight=8, endpoints=math.inf, database_cores=math.inf,
    wal_bytes_per_second=math.inf, max_connections=math.inf, messages_per_second=math.inf,
    disk=math.inf, scans=False,
)  # fmt: skip
QUICK = Workload(items=1000, calls=1, tokens=100, seconds=1e-6)


def test_every_constant_is_a_line_of_the_results() -> None:
    """Of a known unit, and finite; a name that is not there is an error, not a default."""
    there = lines()
    assert {field.name for field in fields(Constants)} == set(NAMES)
    for key in NAMES.values():
        assert key in there, key
        assert there[key].unit in SI
        assert there[key].date.startswith("20")
    assert all(math.isfinite(getattr(measured(), name)) for name in NAMES)
    assert ("scale", "no such metric") not in there


def test_with_endless_models_the_workers_cpu_is_full_first() -> None:
    """8 cores at half a second each: 16 a second; nothing else is used at all."""
    found = outlook(replace(FREE, worker_cpu=0.5), QUICK, ENDLESS)
    assert found.bottleneck == "worker CPU"
    assert found.rate == pytest.approx(16)
    assert found.utilisation["worker CPU"] == pytest.approx(1)
    assert found.seconds == pytest.approx(1000 / 16)


def test_the_bottleneck_is_full_and_nothing_else_is_over_full() -> None:
    c = replace(FREE, worker_cpu=0.01, lease_cpu=0.001, complete_cpu=0.002, complete_wal=1e4)
    at = replace(ENDLESS, endpoints=3, tokens_per_second=1000, database_cores=2,
                 wal_bytes_per_second=1e6)  # fmt: skip
    found = outlook(c, QUICK, at)
    assert found.bottleneck == "models"
    assert found.rate == pytest.approx(30)
    assert found.utilisation[found.bottleneck] == pytest.approx(1)
    assert max(found.utilisation.values()) <= 1 + 1e-9
    assert found.utilisation["database log"] == pytest.approx(30 * 1e4 / 1e6)


def test_twice_the_hosts_are_twice_the_rate_until_the_database_is_full() -> None:
    """Every host brings 1 000 tokens a second, that is 10 trajectories; the database can end 100,
    but pays 0.5 % of its core for the leases of each host. So it is full at n hosts where
    10 n / 100 + 0.005 n = 1: between 9 and 10, which `order` must find."""
    held = ENDLESS.processes * ENDLESS.in_flight
    c = replace(FREE, complete_cpu=0.01, beat_cpu=0.005 * BEAT / held)

    def at(hosts: int) -> Cluster:
        return replace(ENDLESS, hosts=hosts, endpoints=hosts, tokens_per_second=1000,
                       database_cores=1.0)  # fmt: skip

    rates = {hosts: outlook(c, QUICK, at(hosts)).rate for hosts in (1, 2, 4, 8, 16, 32)}
    for hosts in (1, 2, 4):
        assert rates[2 * hosts] == pytest.approx(2 * rates[hosts])
    assert outlook(c, QUICK, at(8)).bottleneck == "models"
    assert outlook(c, QUICK, at(16)).bottleneck == "database CPU"
    assert rates[32] < rates[16] < 100, "more hosts only cost more"
    assert order(c, QUICK, at(1))[0] == ("database CPU", 10.0)


def test_hosts_alone_can_fill_a_resource() -> None:
    c = replace(FREE, beat_cpu=1.0)
    found = outlook(c, QUICK, replace(ENDLESS, database_cores=1.0))
    assert (found.bottleneck, found.rate) == ("database CPU", 0.0)
    assert math.isinf(found.seconds)


def test_places_in_flight_bound_what_slow_models_allow() -> None:
    """Little's law: 64 places at 10 seconds each."""
    found = outlook(FREE, replace(QUICK, seconds=10.0), ENDLESS)
    assert (found.bottleneck, found.rate) == ("places in flight", pytest.approx(6.4))


def test_batches_move_the_price_from_one_to_two_hundred() -> None:
    c = replace(FREE, complete_cpu=1.0, batched_cpu=0.2)

    def price(batch: int) -> float:
        (one,) = (r for r in resources(c, replace(QUICK, batch=batch), ENDLESS)
                  if r.name == "database CPU")  # fmt: skip
        return one.price

    assert price(1) == 1.0
    assert price(200) == pytest.approx(0.2)
    assert price(200) == price(1000) < price(100) < price(1)


def test_the_simulation_agrees_with_the_machine_repairman() -> None:
    """8 places that think for 1 second and ask one core for 0.2, both exponential: M/M/1//N, whose
    throughput is (1 - p0) / S with p0 = 1 / sum over n of N! / (N - n)! (S / Z)^n (Gross & Harris,
    2.8). The control, without a queue, is a third off."""
    n, think, service = 8, 1.0, 0.2
    c = replace(FREE, worker_cpu=service)
    at = replace(ENDLESS, hosts=1, cores=1, processes=1, in_flight=n)
    work = replace(QUICK, seconds=think)
    terms = (math.perm(n, k) * (service / think) ** k for k in range(n + 1))
    expected = (1 - 1 / sum(terms)) / service
    seen = simulate(c, work, at, 4000.0, seed=1)
    assert seen.rate == pytest.approx(expected, rel=0.02)
    assert seen.rate != pytest.approx(n / (think + service), rel=0.2)
    assert seen.lost == 0
    assert simulate(c, work, at, 200.0, seed=2) == simulate(c, work, at, 200.0, seed=2)


def test_the_simulation_loses_leases_where_their_renewal_takes_longer_than_they_last() -> None:
    """A process' heartbeat takes 40 seconds of the only core, a lease lasts 30. With a tenth of
    that it loses none. A host that dies takes with it what it holds."""
    at = replace(ENDLESS, hosts=2, processes=1, database_cores=1.0)
    work = replace(QUICK, seconds=1.0)
    slow = replace(FREE, beat_cpu=40.0 / at.in_flight, worker_cpu=0.01)
    assert simulate(slow, work, at, 600.0).lost > 0
    quick = replace(slow, beat_cpu=0.4 / at.in_flight)
    seen = simulate(quick, work, at, 100.0, dying=0.5)
    assert (seen.lost, seen.died) == (0, at.processes * at.in_flight)
