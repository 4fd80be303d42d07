"""What is deployed: valid by Kubernetes' own schemas, the same in every place, and documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tirgen.cli import app
from tirgen.metrics import FAMILIES

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.29", "1.33", "1.37")
Object = dict[str, Any]


def documents(file: Path) -> list[Object]:
    return [one for one in yaml.safe_load_all(file.read_text()) if one]


def manifests() -> list[Object]:
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    return [one for name in kustomization["resources"] for one in documents(KUBERNETES / name)]


def named(kind: str, name: str) -> Object:
    (found,) = (m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def pod(name: str) -> Object:
    kind = "Job" if name == "migrate" else "Deployment"
    spec: Object = named(kind, name)["spec"]["template"]["spec"]
    return spec


def container(name: str) -> Object:
    (found,) = pod(name)["containers"]
    assert isinstance(found, dict)
    return found


def compose() -> Object:
    found = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(version: str) -> None:
    """Strictly: a field that does not exist is an error, as the control shows."""
    own = [m for m in manifests() if "keda" not in m["apiVersion"]]
    own += documents(KUBERNETES / "secret.example.yaml")
    assert {m["kind"] for m in own} == {"Namespace", "Job", "Deployment", "Service", "Secret"}
    for manifest in own:
        kubernetes_validate.validate(manifest, version, strict=True)
    wrong = named("Deployment", "worker")
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_every_file_is_deployed_but_the_secrets_example() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    there = {file.name for file in KUBERNETES.glob("*.yaml")}
    assert there - set(listed) == {"kustomization.yaml", "secret.example.yaml"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_it() -> None:
    """Names of generated settings reach those who use them."""
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rendered = list(yaml.safe_load_all(said))
    assert {m["kind"] for m in rendered} == {m["kind"] for m in manifests()} | {"ConfigMap"}
    (settings,) = (m for m in rendered if m["kind"] == "ConfigMap")
    used = re.findall(r"configMapRef:\s*name: (\S+)", said)
    assert set(used) == {settings["metadata"]["name"]}
    assert len(used) == 3


def test_compose_and_kubernetes_start_the_same() -> None:
    services = compose()["services"]
    for name in ("migrate", "worker", "metrics"):
        assert container(name)["args"] == services[name]["command"], name
        assert container(name)["image"] == "tirgen"
    grace = pod("worker")["terminationGracePeriodSeconds"]
    assert services["worker"]["stop_grace_period"] == f"{grace}s"


def test_compose_and_kubernetes_set_the_same_variables() -> None:
    """And each of them is one that the program reads."""
    settings = dict(
        line.split("=", 1) for line in (KUBERNETES / "settings.env").read_text().splitlines()
    )
    (secret,) = documents(KUBERNETES / "secret.example.yaml")
    addresses = compose()["x-tirgen"]["environment"]
    assert settings.keys() | secret["stringData"].keys() == addresses.keys()
    assert {name: addresses[name] for name in settings} == settings
    code = "".join(
        f.read_text() for part in ("tirgen", "shared") for f in (ROOT / part).rglob("*.py")
    )
    assert [name for name in addresses if f'"{name}"' not in code] == []
    for name in ("migrate", "worker", "metrics"):
        sources = [name for source in container(name)["envFrom"] for name in source]
        assert sources == ["configMapRef", "secretRef"]


def test_commands_exist_with_these_options() -> None:
    from typer.main import get_command

    root = get_command(app)
    for name in ("migrate", "worker", "metrics"):
        command, words = root, list(container(name)["args"])
        while words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        command.make_context(name, words)


def test_workers_are_scaled_by_a_query_that_runs(db: Any) -> None:
    """The fields are those of KEDA 2.10 and later; the query counts open items."""
    from sqlalchemy import text

    from tests import stored

    spec = named("ScaledObject", "worker")["spec"]
    assert spec.keys() == {
        "scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval",
        "cooldownPeriod", "triggers",
    }  # fmt: skip
    assert spec["scaleTargetRef"]["name"] == "worker"
    assert "replicas" not in named("Deployment", "worker")["spec"], "that would undo the scaling"
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "postgresql"
    metadata = trigger["metadata"]
    assert metadata.keys() == {"query", "targetQueryValue", "activationTargetQueryValue"}
    authentication = named("TriggerAuthentication", trigger["authenticationRef"]["name"])
    (reference,) = authentication["spec"]["secretTargetRef"]
    assert reference["parameter"] == "connection"
    (secret,) = documents(KUBERNETES / "secret.example.yaml")
    assert reference["name"] == secret["metadata"]["name"]
    assert reference["key"] in secret["stringData"]
    stored.fill(db)
    with db.session() as session:
        assert session.scalar(text(metadata["query"])) == 2


# Metrics: who draws or judges one must name one that exists.

OURS = {family.name for family in FAMILIES} | {"tirgen_database_up", "tirgen_scrape_seconds"}


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\btirgen_\w+", expression))


def test_the_dashboard_draws_metrics_that_exist_and_all_of_them() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "tirgen.json").read_text())
    drawn = {
        metric
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for metric in metrics_of(target["expr"])
    }
    assert drawn - OURS == set()
    assert OURS - drawn == {"tirgen_run_running"}, "which is what the runs are chosen by"
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_every_alarm_is_on_metrics_that_exist_and_is_explained() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/alarms.yaml").read_text())["groups"]
    guide = (ROOT / "docs" / "operations.md").read_text()
    rules = group["rules"]
    assert len(rules) >= 10
    for rule in rules:
        assert metrics_of(rule["expr"]), rule
        assert metrics_of(rule["expr"]) - OURS == set(), rule["alert"]
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert f"`{rule['alert']}`" in guide, "an alarm at night needs a page that explains it"
    explained = set(re.findall(r"`(Tirgen\w+)`", guide))
    assert explained == {rule["alert"] for rule in rules}
