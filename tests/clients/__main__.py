"""Runs every client through every case, prints the table, and exits with 1 if anything failed.

``python -m tests.clients --python .venv-clients/bin/python --node .clients [CLIENT …]``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.clients.cases import CASES, CLIENTS, INPUT, Case, Client, Seen, wrong
from tests.clients.lab import Lab, cutting, lab, nginx_binary

HERE = Path(__file__).parent
NODE_SCRIPT = "node_client.mjs"

# The whole of it, and one call of a client. No client waits for ever: what does is a failure.
_ALL_S = 330.0
_ONE_S = 60.0

# Clients at once: enough that the waiting overlaps, few enough that starting them does not take seconds.
_AT_ONCE = 8

# Nothing leaves this machine: whatever is not on it is asked of a proxy that is not there.
_NOWHERE = "http://127.0.0.1:9"
_LOOPBACK = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}


class Runner:
    """Runs clients as processes."""

    def __init__(self, lab: Lab, python: Path, node_script: Path) -> None:
        self._lab = lab
        self._python = python
        self._node_script = node_script
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def run(self, client: Client, case: Case) -> str | None:
        """What is wrong with a client in a case, or None."""
        async with self._slots:
            try:
                async with asyncio.timeout(_ONE_S):
                    return wrong(client, case, await self._see(client, case))
            except TimeoutError:
                return f"no answer in {_ONE_S:g} s"

    async def _see(self, client: Client, case: Case) -> Seen:
        entry = self._lab.few_hops if case.few_hops else self._lab.proxied
        key = f"sk-{client.name}-{case.name}".replace(" ", "-")
        model = case.model
        if case.way == "header" and not client.own_paths:
            model = "quick"  # it cannot poll, so all it can use is an answer that comes in time
        call = {
            "way": case.way,
            "base_url": entry + case.path,
            "key": key,
            "model": model,
            "input": INPUT,
            "retries": case.retries,
            "timeout_s": case.timeout_s,
        }
        calls = [call]
        if case.status is not None and case.by_upstream:
            model = case.model.replace("slow", "quick")
            calls.append({**call, "base_url": f"{self._lab.direct}/v1", "key": "sk", "model": model})
        if case.cut_s is None:
            outcomes, cut = await self._process(client, calls), 0
        else:
            async with cutting(entry, case.cut_s) as (url, cutter):
                call["base_url"] = url + case.path
                outcomes = await self._process(client, calls)
                cut = cutter.cut
        upstream = self._lab.upstream.calls[f"Bearer {key}"]
        return Seen(outcomes[0], upstream, outcomes[1] if len(outcomes) > 1 else None, cut)

    async def _process(self, client: Client, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if client.name == "openai (npm)":
            command = ["node", str(self._node_script)]
        else:
            command = [str(self._python), str(HERE / "python_client.py"), client.name]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **_LOOPBACK},
        )
        try:
            out, err = await process.communicate(json.dumps(calls).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        lines = [json.loads(line) for line in out.splitlines()]
        if len(lines) != len(calls):
            return [{"raised": "nothing", "body": err.decode()[-300:]}] * len(calls)
        return lines


def table(clients: list[Client], problems: dict[tuple[str, str], str | None]) -> str:
    """Client by case, in columns: ok, or the number of a problem that stands below."""
    numbers = {key: n for n, key in enumerate((k for k, v in problems.items() if v), 1)}
    rows = [["", *(case.name for case in CASES)]]
    for client in clients:
        keys = [(client.name, case.name) for case in CASES]
        cells = [
            "-" if key not in problems else f"[{numbers[key]}]" if key in numbers else "ok"
            for key in keys
        ]
        rows.append([client.name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"[{n}] {key[0]}, {key[1]}: {problems[key]}" for key, n in numbers.items()]
    return "\n".join(lines)


async def run_all(folder: Path, python: Path, clients: list[Client]) -> bool:
    """Whether everything was right, with the table on stdout. ``folder`` has the npm client."""
    wanted = [
        (client, case)
        for case in CASES
        for client in clients
        if client.own_paths or case.way != "async"
    ]
    async with asyncio.timeout(_ALL_S), lab(folder) as running:
        runner = Runner(running, python, folder / NODE_SCRIPT)
        seen = await asyncio.gather(*(runner.run(*each) for each in wanted))
    problems = {
        (client.name, case.name): problem for (client, case), problem in zip(wanted, seen, strict=True)
    }
    print(table(clients, problems))
    return not any(problems.values())


def missing(python: Path, node: Path) -> list[str]:
    """What has to be there and is not."""
    tools = [name for name in ("curl", "node") if shutil.which(name) is None]
    if nginx_binary() is None:
        tools.append("nginx")
    return tools + [str(p) for p in (python, node / "node_modules" / "openai") if not p.exists()]


async def supervised(folder: Path, python: Path, clients: list[Client]) -> bool:
    """:func:`run_all`, that a SIGTERM ends as Ctrl-C does: with everything it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run_all(folder, python, clients)


def main() -> int:
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(prog="python -m tests.clients")
    parser.add_argument(
        "--python", type=Path, required=True, help="an interpreter that has the clients"
    )
    parser.add_argument("--node", type=Path, required=True, help="a folder with node_modules/openai")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(names)}; all")
    arguments = parser.parse_args()
    if unknown := set(arguments.clients) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    if lacking := missing(arguments.python, arguments.node):
        print(f"make clients needs {', '.join(lacking)}", file=sys.stderr)
        return 2
    clients = [c for c in CLIENTS if not arguments.clients or c.name in arguments.clients]
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="asyncproxy-clients-") as name:
            folder = Path(name)  # Node looks for packages beside the script, and nowhere else
            (folder / "node_modules").symlink_to((arguments.node / "node_modules").resolve())
            shutil.copy(HERE / NODE_SCRIPT, folder)
            good = asyncio.run(supervised(folder, arguments.python, clients))
    except TimeoutError:
        print(f"not done in {_ALL_S:g} s", file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return 1
    print(f"\n{'all as it should be' if good else 'FAILED'}, in {time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
