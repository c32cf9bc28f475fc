"""What was promised to clients, and what became of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Books"]


@dataclass
class Books:
    """Kept by the clients and the gateway, each from what they saw themselves."""

    accepted: dict[str, str] = field(default_factory=dict)  # job id → the text that was sent
    outcomes: dict[str, bytes] = field(default_factory=dict)  # job id → the first terminal envelope
    lost: set[str] = field(default_factory=set)  # 404 for a job that was accepted
    changed: set[str] = field(default_factory=set)  # another terminal envelope than the first
    wrong: list[str] = field(default_factory=list)  # an outcome that is not the gateway's answer
    calls: Counter[str] = field(default_factory=Counter)  # text → times that the gateway got it
    submits_again: int = 0  # submits whose answer was lost, sent again under the same key
    refused: Counter[str] = field(default_factory=Counter)  # code → times
    events: Counter[str] = field(default_factory=Counter)  # what was done to the proxies

    @property
    def stuck(self) -> set[str]:
        """Accepted, and never seen to end."""
        return self.accepted.keys() - self.outcomes.keys() - self.lost

    @property
    def twice(self) -> int:
        """Calls beyond the first for the same job."""
        return sum(times - 1 for times in self.calls.values())

    @property
    def ended(self) -> Counter[str]:
        """How many jobs ended in which way."""
        return Counter(
            "completed" if b'"status":"completed"' in envelope else "failed"
            for envelope in self.outcomes.values()
        )

    def problems(self) -> list[str]:
        """Broken promises; none if all is well."""
        found = []
        for name in ("lost", "stuck", "changed", "wrong"):
            things = getattr(self, name)
            if things:
                found.append(f"{len(things)} {name}: {sorted(things)[:3]}")
        ids_of: dict[str, str] = {}
        for job_id, text in self.accepted.items():
            if ids_of.setdefault(text, job_id) != job_id:
                found.append(f"two jobs for one key: {ids_of[text]}, {job_id}")
        return found

    def report(self) -> str:
        """The figures, a line each."""
        lines = [
            ("accepted", len(self.accepted)),
            ("completed", self.ended["completed"]),
            ("failed by the gateway's own answer", self.ended["failed"]),
            ("lost", len(self.lost)),
            ("stuck", len(self.stuck)),
            ("outcomes changed", len(self.changed)),
            ("outcomes that are not the gateway's", len(self.wrong)),
            ("gateway calls made again", self.twice),
            ("submits sent again", self.submits_again),
            *((f"answers {code}", times) for code, times in sorted(self.refused.items())),
            *((event, times) for event, times in sorted(self.events.items())),
        ]
        return "\n".join(f"{times:8}  {name}" for name, times in lines)
