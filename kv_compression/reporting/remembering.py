"""The report's section on recall: a table of what was asked, and recovered recall against the kept keys."""

from collections.abc import Iterable, Sequence

from kv_compression.io.tables import figure, markdown_table
from kv_compression.methods import METHODS
from kv_compression.recall.scores import CELLS
from kv_compression.reporting.collecting import Recall, label
from kv_compression.reporting.drawing import GREY, Curve, Panel, Picture

MARKERS = "oPsD^vX"


def add_section(report, recalls: Sequence[Recall]) -> None:
    """Say in a `writing.Report` what caches remember: a picture, a table, and a CSV table."""
    report.say("## What the cache remembers")
    report.say(
        "Nats a token of the right answer: by the method, under full attention by the same weights (full), and by the "
        "method where the document says something else (none). Recovered is (none − method) ÷ (none − full), of tokens "
        "that had left their original form."
    )
    report.picture("report_recall.png", "Recovered recall against kept keys", picture(recalls))
    report.say(table(recalls))
    for recall in recalls:
        report.keep("report_recall.csv", recall.rows, folder=recall.folder, method=recall.method)


def name_of(recall: Recall, others: Sequence[Recall]) -> str:
    """A measurement's name for readers: its method, and its folder where that does not tell it from `others`."""
    same = [other for other in others if other.method == recall.method]
    return label(recall.method) + (f" ({recall.folder})" if len(same) > 1 else "")


def table(recalls: Sequence[Recall]) -> str:
    """All that was asked, as Markdown: one row for each measurement, task and ratio."""
    rows = [{"name": name_of(recall, recalls)} | row for recall in recalls for row in recall.rows if "kept" in row]
    columns = {
        "method": lambda row: row["name"],
        "task": CELLS["task"],
        "ratio": CELLS["ratio"],
        "tokens": lambda row: figure(row.get("length"), 0),
        "kept keys": CELLS["kept"],
        "had left": lambda row: f"{row['left']} of {row['documents']}",
        "none": CELLS["none"],
        "method's nats": CELLS["nats"],
        "full": CELLS["full"],
        "recovered": CELLS["recovered"],
        "exact": CELLS["exact"],
        "exact in full": CELLS["exact_full"],
    }
    return markdown_table(columns, rows)


def picture(recalls: Sequence[Recall]) -> Picture:
    """Recovered recall against the kept keys, a panel for each task; of several lengths the first."""
    tasks = dict.fromkeys(row["task"] for recall in recalls for row in recall.rows if row.get("recovered") is not None)
    below = dict.fromkeys(tasks, "") | {task: "kept keys" for task in [*tasks][-1:]}
    panels = [Panel("recovered recall", list(_curves(task, recalls)), task, below[task], log_y=False) for task in tasks]
    return Picture(panels, "bars: 95% intervals over documents", share_y=True, stacked=True)


def _curves(task: str, recalls: Sequence[Recall]) -> Iterable[Curve]:
    for number, recall in enumerate(recalls):
        rows = [row for row in recall.rows if row["task"] == task and row.get("recovered") is not None]
        rows = [row for row in rows if row.get("length") == rows[0].get("length")]
        ends = [(row.get(end), row["recovered"]) for row in rows for end in ("low", "high")]
        low, high = ([rest if end is None else end for end, rest in ends[start::2]] for start in (0, 1))
        points = sorted(zip([row["kept"] for row in rows], [row["recovered"] for row in rows], low, high))
        colour = METHODS[recall.method].colour if recall.method in METHODS else GREY
        yield Curve(name_of(recall, recalls), points, colour, MARKERS[number % len(MARKERS)])
