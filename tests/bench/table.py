"""The README's table, made from the results of all benches."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from tests.bench.harness import Result, Row

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
_HEADER = ("| | what | ours | peer | ratio | bar | |", "|---|---|---:|---:|---:|---:|---|")


def render(results: Iterable[Result]) -> str:
    """Return results as markdown: one table for each machine and date on which benches ran, named above it."""
    lines: list[str] = []
    for (machine, date), group in groupby(results, key=lambda result: (result.machine, result.date)):
        lines += ["", f"Measured on {machine}; {date}.", "", *_HEADER]
        lines += [line for result in group for line in _lines(result)]
    return "\n".join(lines).strip()


def replace_between_markers(text: str, table: str) -> str:
    """Return a page with `table` in place of what stands between its markers.

    Raises:
        ValueError: if the page does not have each marker once, the end after the begin.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"the table stands between one {BEGIN} and one {END}, and the page has no such place")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def write_into(page: Path, results_folder: Path) -> None:
    """Put the table of all results in a folder into a markdown page."""
    results = [Result.read(path) for path in sorted(results_folder.glob("*.json"))]
    page.write_text(replace_between_markers(page.read_text(encoding="utf-8"), render(results)), encoding="utf-8")


def _lines(result: Result) -> Iterator[str]:
    for row in result.rows:
        ours, peer = (f"{_number(value)} {row.unit}".strip() for value in (row.ours, row.peer))
        cells = (result.bench, row.what, ours, f"{row.peer_name}: {peer}", _number(row.ratio), row.bar, _verdict(row))
        yield f"| {' | '.join(cells)} |"


def _verdict(row: Row) -> str:
    if not row.bar:
        return ""
    return "met" if row.met else "**not met**"


def _number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
