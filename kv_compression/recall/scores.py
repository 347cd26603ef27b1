"""From answers to recovered recall: what of a text's worth a compressed cache keeps, with intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from kv_compression.io.tables import Columns, estimate, figure, percent, text_table

RESAMPLES = 2000


# How a row of the summary is shown, in every table of it.
CELLS: Columns = {
    "task": lambda row: row["task"],
    "ratio": lambda row: f"{row['ratio']:g}",
    "kept": lambda row: figure(row["kept"], 1),
    "none": lambda row: figure(row.get("none")),
    "nats": lambda row: figure(row.get("nats")),
    "full": lambda row: figure(row.get("full")),
    "recovered": lambda row: estimate(row.get("recovered"), row.get("low"), row.get("high"), 2),
    "exact": lambda row: percent(row.get("exact")),
    "exact_full": lambda row: percent(row.get("exact_full")),
}


def recovered(none, nats, full) -> float:
    """(none − nats) ÷ (none − full), of means over documents: 0 is forgetting, 1 is as good as full attention.

    Arrays `(…, documents)`. (This project.)
    """
    none, nats, full = (np.mean(values, axis=-1) for values in (none, nats, full))
    return (none - nats) / (none - full)


def summarize(lines: Sequence[dict]) -> list[dict]:
    """For each task, ratio and length what the answers come to. Only what had left its original form counts.

    Nats are those of an answer's tokens of which that holds, exact answers those of documents in which it holds for the
    whole answer (`whole` of them). `recovered` has a 95% interval (bootstrap over documents), and is missing if nothing
    had left. `ask_many` says what asking one cache saves.
    """
    if not lines:
        return []
    rows = []
    for (task, ratio, length), found in pd.DataFrame(lines).groupby(["task", "ratio", "length"], sort=False):
        row = {
            "task": task,
            "ratio": ratio,
            "length": int(length),
            "documents": len(found),
            "left": int((found["left"] > 0).sum()),
        }
        if task == "ask_many":
            seconds = found[["seconds", "seconds_alone", "bytes", "bytes_full", "apart"]]
            mean = seconds.mean().to_dict() | {"apart": seconds["apart"].max()}
            rows.append(row | {name: float(value) for name, value in mean.items()})
            continue
        gone, whole = found[found["left"] > 0], found[found["left"] == 1]
        kept = found["kept"] / found["length"]
        row |= {"kept": float(found["kept"].mean()), "kept_share": float(kept.mean())}
        if len(gone):
            row |= {name: float(gone[name].mean()) for name in ("nats", "none", "full", "distance")}
            row |= {"whole": len(whole)}
            row |= {name: float(whole[name].mean()) for name in ("exact", "exact_none", "exact_full") if len(whole)}
            row |= _with_interval(gone)
        rows.append(row)
    return rows


def _with_interval(gone: pd.DataFrame) -> dict:
    columns = [gone[name].to_numpy(dtype=float) for name in ("none", "nats", "full")]
    about = {"recovered": float(recovered(*columns)), "low": None, "high": None}
    if len(gone) > 1:
        ends = stats.bootstrap(
            columns,
            lambda none, nats, full, axis: recovered(none, nats, full),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        about |= {"low": float(ends.low), "high": float(ends.high)}
    return about


def as_table(rows: list[dict]) -> str:
    """The summary as text."""
    asked = [row for row in rows if row["task"] != "ask_many"]
    many = [row for row in rows if row["task"] == "ask_many"]
    columns = {
        "task": CELLS["task"],
        "ratio": CELLS["ratio"],
        "tokens": lambda row: str(row["length"]),
        "kept": CELLS["kept"],
        "left": lambda row: f"{row['left']}/{row['documents']}",
        "whole": lambda row: str(row.get("whole", 0)),
        "none": CELLS["none"],
        "method": CELLS["nats"],
        "full": CELLS["full"],
        "recovered": CELLS["recovered"],
        "exact": CELLS["exact"],
        "exact full": CELLS["exact_full"],
    }
    parts = [text_table(columns, asked)] if asked else []
    if many:
        of_many = {
            "task": CELLS["task"],
            "ratio": CELLS["ratio"],
            "s, one cache": lambda row: figure(row["seconds"]),
            "s, read again": lambda row: figure(row["seconds_alone"]),
            "KiB held": lambda row: figure(row["bytes"] / 1024, 0),
            "KiB in full": lambda row: figure(row["bytes_full"] / 1024, 0),
            "nats apart": lambda row: figure(row["apart"], 4),
        }
        parts.append(text_table(of_many, many))
    return "\n\n".join(parts)
