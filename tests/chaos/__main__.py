"""``python -m tests.chaos``: runs as long as one likes, prints what was promised and what was kept."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chaos.experiment import run_redis, run_sqlite


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--store", choices=["sqlite", "redis"], default=None, help="one of them")
    parser.add_argument("--kills", type=int, default=20, help="proxies to kill (20)")
    parser.add_argument("--clients", type=int, default=32, help="clients at once (32)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    chosen = parser.parse_args()
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    failed = False
    for name, run in (("sqlite", run_sqlite), ("redis", run_redis)):
        if chosen.store not in (None, name):
            continue
        print(f"{name}, seed {seed}, {chosen.kills} kills, {chosen.clients} clients", flush=True)
        random.seed(seed)
        with TemporaryDirectory(prefix="chaos-") as folder:
            books = asyncio.run(run(Path(folder), kills=chosen.kills, clients=chosen.clients))
        print(books.report(), flush=True)
        for problem in books.problems():
            failed = True
            print(f"BROKEN: {problem}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
