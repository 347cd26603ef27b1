"""How the quick start ends: one plot, one continuation, the finding in two sentences, and what to type next.

Reads what run_clm.py and generate_c4.py have written to the folders on the command line, and computes the finding.
"""

import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kv_compression.generation import records
from kv_compression.io.errors import RunError, from_here, printable, run_script
from kv_compression.io.fields import number
from kv_compression.io.results import read_results
from kv_compression.io.tables import figure
from kv_compression.reporting import drawing, plotting
from kv_compression.reporting.collecting import label, row_of
from kv_compression.reporting.comparing import caveat

FULL, PLAIN, BEST = ("full_attention", "paper"), ("kv_compression", "paper"), ("kv_compression", "best")
SINK = ("sink_attention", "paper")
WIDTH = 100  # characters of a line
PREFIX_WORDS = 30  # the last words of a prefix, which are shown


def kind(run: dict) -> tuple[str, str]:
    """The method and the recipe of a run."""
    return run["method"], run["settings"].get("recipe", "paper")


def perplexity_of(run: dict) -> float:
    """A run's test perplexity, infinite where it has none."""
    found = number(run["perplexity"])
    return math.inf if found is None else found


def against(run: dict, others: Sequence[dict]) -> str:
    """How a run's perplexity compares with others', in words: "lower than local attention's 37.8, …"."""
    parts = {"lower than": [], "as high as": [], "higher than": []}
    for other in sorted(others, key=perplexity_of):
        own, its = perplexity_of(run), perplexity_of(other)
        words = "lower than" if own < its else "higher than" if own > its else "as high as"
        parts[words].append(f"{label(other['method'])}'s {figure(other['perplexity'], 1)}")
    names = {words: " and ".join(filter(None, [", ".join(those[:-1]), *those[-1:]])) for words, those in parts.items()}
    return ", ".join(f"{words} {those}" for words, those in names.items() if those)


def finding(runs: dict[tuple[str, str], dict]) -> str:
    """One sentence on plain KV compression, and one on `--recipe best`."""
    plain, best, full = runs[PLAIN], runs[BEST], runs[FULL]
    rivals = [run for one, run in runs.items() if one not in (PLAIN, BEST, FULL)]
    kept, sinks = (figure(run.get("kept_keys_mean"), 0) for run in (best, runs[SINK]))
    return (
        f"With {figure(100 * plain['removed_fraction'], 0)}% of the cache removed, plain KV compression has a test "
        f"perplexity of {figure(plain['perplexity'], 1)}, {against(plain, rivals)}. With --recipe best it has "
        f"{figure(best['perplexity'], 1)}, {against(best, rivals)}; while it reads it holds {kept} keys on average, "
        f"sink attention {sinks}; full attention, which keeps the whole cache, has {figure(full['perplexity'], 1)}."
    )


def continuation(path: Path) -> str:
    """The first document of a generation file: the end of its prefix, the original text, and its first continuation."""
    found = next((record for record in records.usable(records.read(path)[0]) if record["continuations"]), None)
    if found is None:
        raise RunError(f"{path} holds no continuation")
    parts = {
        "prefix": "… " + " ".join(str(found.get("prefix")).split()[-PREFIX_WORDS:]),
        "original": str(found.get("reference")),
        "sampled": str(found["continuations"][0]),
    }
    share = 100 * found["cache_length"] / found["prefix_tokens"]
    lines = [f"A continuation by --recipe best, whose cache holds {share:.0f}% of the prefix's keys:"]
    for name, text in parts.items():
        indents = {"initial_indent": f"  {name:<10}", "subsequent_indent": " " * 12}
        lines.append(textwrap.fill(printable(text), WIDTH, **indents))
    return "\n".join(lines)


def main() -> None:
    """Say what came of the runs in the folders that the command line names."""
    folders = [Path(name) for name in sys.argv[1:]]
    found = [read_results(folder) for folder in folders]
    if None in found:
        raise RunError(f"no results in {folders[found.index(None)]}")
    runs = {kind(run): run for run in found}
    rows = pd.DataFrame([row_of(str(folder), run) for folder, run in zip(folders, found)])
    folder, ratio = folders[list(runs).index(BEST)], runs[BEST]["bound_ratio"]

    drawn = folder.parent / f"perplexity_{ratio}.png"
    names = {one: label(one[0]) + ",\nrecipe best" * (one == BEST) for one in runs}
    drawing.draw(drawn, plotting.one_ratio([(one[0], names[one], perplexity_of(run)) for one, run in runs.items()]))
    print(f"Plot: {from_here(drawn)}\n")
    print(continuation(folder / "generation.jsonl"), end="\n\n")
    print(textwrap.fill(f"Finding: {finding(runs)} {caveat(rows)}", WIDTH), end="\n\n")
    print("Next: " + ("sh quickstart.sh 0.9" if ratio != 0.9 else "sh sweep.sh"))


if __name__ == "__main__":
    sys.exit(run_script(main))
