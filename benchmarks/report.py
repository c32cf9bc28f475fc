"""The table, as Markdown, and a bar chart of the ratios, as SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lab import Sample
from benchmarks.rounds import Row

__all__ = ["chart", "table", "write"]

_HEADINGS = (
    "figure",
    "ours",
    "baseline's",
    "baseline",
    "ratio (min-max)",
    "by CPU",
    "goal",
    "p50 / p99, ms",
    "baseline's",
    "added p50, ms",
    "CPU per request, µs",
    "busy, server+load, %",
)

_NOTES = """\
Subject and baseline take turns: a tenth of a second for each, in which the other stands still,
{seconds} s each in all, and {rounds} rounds of fresh processes (fewer for durable stores and heavy
loads). Answers of 3 MB, memory and latencies are measured one after the other. Numbers are medians; a
ratio is the median of the rounds' ratios, with the least and the greatest. The one by CPU is that of
the servers' processor time per request, user and system: it does not count what a Redis uses. Of the
pairs in the last two columns the first is ours. Busy is the part of its core that a server used, plus
that of the load generator. A ratio with a (!) is not only about the servers: one of them left its core
idle for more than a tenth of the time. Growth is measured once, in one process without sockets. A
figure that is a latency is in µs; where its bar is longer than the chart, the chart is cut, and the
table has its ratio. The log level of the proxy was {log_level}.
"""


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that can be read as it is."""
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    cells.insert(1, tuple("-" * width for width in widths))
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _cells(row: Row) -> tuple[str, ...]:
    ours, other, unit = row.subject, row.other, row.figure.unit
    return (
        row.figure.title,
        f"{ours.value:,.0f} {unit}",
        f"{other.value:,.0f} {unit}",
        row.baseline.name,
        f"{row.ratio:.3f} ({min(row.ratios):.2f}-{max(row.ratios):.2f}){_mark(row)}",
        "" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}",
        _goal(row),
        _pair(_ms(ours.p50_ms), _ms(ours.p99_ms)),
        _pair(_ms(other.p50_ms), _ms(other.p99_ms)),
        _ms(row.added_p50_ms),
        _pair(_us(ours.cpu_us), _us(other.cpu_us)),
        _pair(_busy(ours), _busy(other)),
    )


def _mark(row: Row) -> str:
    return " (!)" if row.limited_elsewhere else ""


def _goal(row: Row) -> str:
    parts = []
    if row.baseline.goal is not None:
        parts.append(f"{'≤' if row.figure.lower_is_better else '≥'} {row.baseline.goal:.3g}")
    if row.baseline.added_p50_goal_ms is not None:
        parts.append(f"+{row.baseline.added_p50_goal_ms:g} ms")
    if row.baseline.p99_goal is not None and row.p99_ratio is not None:
        parts.append(f"p99 ≤ {row.baseline.p99_goal:g} ({row.p99_ratio:.2f})")
    if row.reached is not None:
        parts.append("yes" if row.reached else "no")
    return ", ".join(parts)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pair(ours: str, other: str) -> str:
    return f"{ours} / {other}" if other else ours


def _busy(sample: Sample) -> str:
    used = (sample.busy, sample.load_busy)
    return "+".join(f"{100 * part:.0f}" for part in used if part is not None)


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def write(
    rows: Sequence[Row],
    facts: Mapping[str, str],
    *,
    folder: Path,
    date: str,
    rounds: int,
    seconds: int,
    log_level: str,
    missing: Sequence[str] = (),
) -> Path:
    """Write ``<date>.md`` and ``<date>.svg`` into ``folder``; the path of the first.

    ``missing`` says what was not measured, and why. Then the files are ``<date>-incomplete``: they do
    not take the place of a run that has everything.
    """
    folder.mkdir(exist_ok=True)
    name = f"{date}-incomplete" if missing else date
    (folder / f"{name}.svg").write_text(chart(rows), encoding="utf-8")
    notes = _NOTES.format(rounds=rounds, seconds=seconds, log_level=log_level)
    parts = [
        f"# Benchmarks, {date}",
        *(f"**Incomplete**: {reason}" for reason in missing),
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        table(rows),
        notes.strip(),
        f"![Ratios to the baselines]({name}.svg)",
    ]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


# The chart, in pixels.
_LABELS, _BARS, _NUMBERS, _LINE, _TOP = 330, 420, 70, 40, 34

# The ratio at which a bar is cut: all others would be too short to tell apart.
_LONGEST = 2.0

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.small { fill: #777; font-size: 11px }
.bar { fill: #4c78a8 } .missed { fill: #d98a3d }
.grid { stroke: #ddd } .one { stroke: #888 } .goal { stroke: #c33; stroke-width: 2 }
.spread { stroke: #222 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .small { fill: #999 } .grid { stroke: #444 } .spread { stroke: #eee }
}
"""


def chart(rows: Sequence[Row]) -> str:
    """Bars of the ratios, a line across each for its spread, and a red one for its goal."""
    most = min(_LONGEST, max(1.2, *(max(row.ratios) for row in rows))) if rows else 1.2
    width, height = _LABELS + _BARS + _NUMBERS, _TOP + _LINE * len(rows) + 10

    def x(ratio: float) -> float:
        return _LABELS + _BARS * min(ratio, most) / most

    def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
        return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

    def bar(kind: str, y: float, ratio: float) -> str:
        size = f'width="{x(ratio) - _LABELS:.1f}" height="{_LINE - 20}"'
        return f'<rect class="{kind}" x="{_LABELS}" y="{y:.1f}" {size}/>'

    def text(where: str, words: str, kind: str = "") -> str:
        return f'<text class="{kind}" {where}>{html.escape(words)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Ratio of the proxy to each baseline</title>",
        f"<style>{_STYLE}</style>",
    ]
    for tenth in range(0, int(most * 10) + 1, 2):
        at = x(tenth / 10)
        parts.append(line("one" if tenth == 10 else "grid", at, _TOP - 8, at, height - 10))
        where = f'x="{at:.1f}" y="{_TOP - 14}" text-anchor="middle"'
        parts.append(text(where, f"{tenth / 10:g}", "small"))
    for number, row in enumerate(rows):
        top = _TOP + number * _LINE
        middle = top + _LINE / 2 - 4
        kind = "missed" if row.reached is False else "bar"
        parts += [
            text(f'x="8" y="{top + 14}"', row.figure.title),
            text(f'x="8" y="{top + 28}"', f"to {row.baseline.name}", "small"),
            bar(kind, top + 6, row.ratio),
            line("spread", x(min(row.ratios)), middle, x(max(row.ratios)), middle),
            text(f'x="{x(max(row.ratios)) + 6:.1f}" y="{middle + 4}"', f"{row.ratio:.2f}"),
        ]
        if row.baseline.goal is not None:
            goal = x(row.baseline.goal)
            parts.append(line("goal", goal, top + 3, goal, top + _LINE - 11))
    return "\n".join([*parts, "</svg>", ""])
