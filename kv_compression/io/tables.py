"""Numbers and tables as they are shown: aligned text, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from kv_compression.io.errors import printable
from kv_compression.io.fields import number

Columns = Mapping[str, Callable]  # a column's title, and what it shows of a row


def figure(value: float | None, digits: int = 2, sign: str = "") -> str:
    """A number with this many decimals, "-" if it is missing or not finite; `sign` "+" always shows the sign."""
    return "-" if number(value) is None else f"{value:{sign}.{digits}f}"


def figures(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """The ends of an interval: "[1.00, 2.00]"."""
    return f"[{', '.join(figure(value, digits, sign) for value in values)}]"


def estimate(mean: float | None, low: float | None, high: float | None, digits: int) -> str:
    """A mean with its interval, if it has one: "1.50 [1.00, 2.00]"."""
    ends = "" if None in map(number, (low, high)) else " " + figures((low, high), digits)
    return figure(mean, digits) + ends


def percent(share: float | None) -> str:
    """A share in percent, "-" if it is missing."""
    return "-" if number(share) is None else f"{100 * share:.0f}%"


def escaped(text: str) -> str:
    """Text that may come from a file as one line of Markdown: no markup, and no table column of its own."""
    line = printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return line.replace("](", "]\\(")


def _cells(columns: Columns, rows: Iterable) -> list[list[str]]:
    return [[str(show(row)) for show in columns.values()] for row in rows]


def text_table(columns: Columns, rows: Iterable) -> str:
    """A table as aligned text: the first column to the left, numbers to the right."""
    lines = [list(columns), *_cells(columns, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def markdown_table(columns: Columns, rows: Iterable) -> str:
    """A table as Markdown, "" without rows."""
    lines = [[escaped(cell) for cell in line] for line in _cells(columns, rows)]
    head = [list(columns), ["---"] * len(columns)]
    return "\n".join("| " + " | ".join(line) + " |" for line in head + lines) if lines else ""


def csv_table(rows: Sequence[Mapping]) -> str:
    """Rows as CSV, with the columns of all of them; numbers have ten digits, and missing ones are empty."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _in_csv(value) for name, value in row.items()})
    return text.getvalue()


def _in_csv(value):
    if isinstance(value, float):
        return f"{value:.10g}" if math.isfinite(value) else ""
    return value
