"""What is deployed: the dashboard, the alerts and their runbook, the unit, the compose file."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from asyncproxy.cli.main import _parser
from asyncproxy.config.load import load_config
from asyncproxy.config.model import Config
from asyncproxy.observe.instruments import Count, Distribution
from asyncproxy.observe.metrics import Metrics
from tests.shell import program

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
RUNBOOK = ROOT / "docs" / "operations.md"

# What Prometheus adds to each series of ours, and what prometheus-client says of the process.
ADDED = {"job", "instance"}
PROCESS = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
}


def series() -> dict[str, set[str]]:
    """The names of all series, each with its labels."""
    found: dict[str, set[str]] = {"up": ADDED, **dict.fromkeys(PROCESS, ADDED)}
    for instrument in list(Metrics().registry._collector_to_names):
        if isinstance(instrument, Distribution):
            name, labels = instrument.name, {*instrument.labels, *ADDED}
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
        elif isinstance(instrument, Count):
            found[f"{instrument.name}_total"] = {*instrument.labels, *ADDED}
        elif isinstance(instrument, MetricWrapperBase):
            found[instrument._name] = {*instrument._labelnames, *ADDED}
    return found


def alerts() -> list[dict[str, Any]]:
    file = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
    return [rule for group in file["groups"] for rule in group["rules"]]


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana.json").read_text())


def queries() -> Iterator[tuple[str, str, str]]:
    """Each query of the dashboard: the title of its panel, the expression, the legend."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]


def names_in(expression: str) -> set[str]:
    """The names of series in an expression of PromQL."""
    return set(re.findall(r"\b((?:asyncproxy|process)_\w+|up)(?=\{)", expression))


def labels_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The labels that an expression asks of each name, in selectors and in `by`."""
    selectors = re.findall(r"(\w+)\{([^}]*)\}", expression)
    for name, matchers in selectors:
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    # What an aggregation groups by has to be a label of the name that follows it.
    for group, rest in re.findall(r"\bby \(([^)]*)\)([^{]*)\{", expression):
        yield rest.split("(")[-1].strip(), {label.strip() for label in group.split(",")}


def test_a_query_asks_for_what_there_is() -> None:
    known = series()
    for expression in (*(rule["expr"] for rule in alerts()), *(expr for _, expr, _ in queries())):
        names = names_in(expression)
        assert names, expression
        # Nothing that looks like one of ours hides behind a name without a selector.
        assert set(re.findall(r"\basyncproxy_\w+", expression)) <= names, expression
        for name, labels in labels_in(expression):
            assert name in known, expression
            assert labels <= known[name], expression


def test_what_a_legend_names_is_a_label_of_its_series() -> None:
    for title, expression, legend in queries():
        grouped = {
            label.strip()
            for group in re.findall(r"\bby \(([^)]*)\)", expression)
            for label in group.split(",")
        }
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= grouped, title


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, expression, _ in queries() for name in names_in(expression)}
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series()} - {"up"}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} == families


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells


def test_the_variables_of_the_dashboard_are_those_that_it_has() -> None:
    has = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard()["panels"])))
    assert used - {"__rate_interval"} == has


def anchors() -> set[str]:
    """The headings of the runbook, as links name them."""
    headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in alerts()])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert (ROOT / page) == RUNBOOK
    assert anchor in anchors()
    assert rule["annotations"]["summary"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["for"]


def test_the_runbook_has_no_alert_that_there_is_not() -> None:
    described = set(re.findall(r"^### (Asyncproxy\w+)$", RUNBOOK.read_text(), re.M))
    assert described == {rule["alert"] for rule in alerts()}


def promtool(*arguments: str, cwd: Path = DEPLOY) -> None:
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_are_rules() -> None:
    promtool("check", "rules", "alerts.yaml")


def test_the_alerts_come_when_they_should() -> None:
    promtool("test", "rules", "alerts_test.yaml")


def test_the_queries_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, (_, expression, _) in enumerate(queries())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": rules}]}))
    promtool("check", "rules", "rules.yaml", cwd=tmp_path)


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit, each with its values in their order."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "asyncproxy.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_runs_a_command_that_there_is() -> None:
    (command,) = unit()["ExecStart"]
    program, *arguments = shlex.split(command)
    assert Path(program).name == "asyncproxy"
    parsed = _parser().parse_args(arguments)
    assert parsed.command == "serve"
    assert Path(parsed.config).is_absolute()


def test_the_unit_waits_for_longer_than_the_grace() -> None:
    grace_s = load_config({"upstreams": [{"base_url": "http://127.0.0.1:4000/v1"}]}).shutdown_grace
    (stop,) = unit()["TimeoutStopSec"]
    assert int(stop) > grace_s


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def compose_config() -> Config:
    key = b64encode(b"k" * 32).decode()
    environ = {"ASYNCPROXY_KEY": key, "GATEWAY_URL": "http://gateway.example:4000/v1"}
    return load_config(DEPLOY / "compose.config.yaml", environ=environ)


def test_the_configuration_of_compose_loads() -> None:
    config = compose_config()
    services = compose()["services"]
    store = urlsplit(config.store.url)
    assert store.hostname in services
    assert store.port == 6379
    # What other containers reach it by.
    assert config.listen == ":8080"
    assert services["proxy"]["ports"][0].endswith(":8080")


def test_compose_gives_what_its_configuration_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "compose.config.yaml").read_text()))
    assert asked <= set(compose()["services"]["proxy"]["environment"])


def test_compose_stops_no_sooner_than_the_grace_is_over() -> None:
    grace = re.fullmatch(r"(\d+)s", compose()["services"]["proxy"]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > compose_config().shutdown_grace


def test_the_redis_of_compose_keeps_what_it_is_told() -> None:
    command = compose()["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


def test_the_image_runs_a_command_that_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    (entry,) = (line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT "))
    (default,) = (line.removeprefix("CMD ") for line in lines if line.startswith("CMD "))
    command: list[str] = json.loads(entry) + json.loads(default)
    assert command[0] == "asyncproxy"
    assert _parser().parse_args(command[1:]).command == "serve"
    users = [line for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("USER root", "USER 0")


@functools.cache
def said() -> list[re.Pattern[str]]:
    """What the package can log or say when it does not start, each as a pattern."""
    found = []
    for path in (ROOT / "asyncproxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                text = "".join(".+" if part is None else re.escape(str(part)) for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"%[dgs]", ".+", re.escape(node.value))
            else:
                continue
            if len(text.replace(".+", "")) > 8:
                found.append(re.compile(text))
    return found


def quoted() -> Iterator[str]:
    """The lines that the runbook shows, from the tables under its last heading."""
    _, _, text = RUNBOOK.read_text().partition("\n## At 3 a.m.\n")
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        yield re.findall(r"`([^`]+)`", row)[0]


def test_the_lines_of_the_runbook_are_those_of_the_log() -> None:
    # What an outcome begins with is put together from its status.
    known = [*said(), re.compile("job failed"), re.compile("request")]
    lines = list(quoted())
    assert lines
    assert [line for line in lines if not any(pattern.fullmatch(line) for pattern in known)] == []
