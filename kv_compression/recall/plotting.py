"""A heat map of length and depth: where in a text of which length a code is still known."""

import io
import re

import pandas as pd


def name_of(ratio: float) -> str:
    """The name of the picture of a ratio."""
    return f"passkey_{ratio:g}.png"


def is_ours(name: str) -> bool:
    """Whether a path can be that of one of these pictures."""
    return re.search(r"(^|/)passkey_[\d.e-]+\.png$", name) is not None


def heat_maps(lines: list[dict], label: str) -> dict[str, bytes]:
    """A PNG by name for each ratio at which codes were asked: exact answers by length and depth."""
    asked = pd.DataFrame([line for line in lines if line["task"] == "passkey"])
    if asked.empty:
        return {}
    from matplotlib.figure import Figure

    pictures = {}
    for ratio, found in asked.groupby("ratio"):
        grid = found.pivot_table(index="depth", columns="length", values="exact", aggfunc="mean").astype(float)
        left = found.pivot_table(index="depth", columns="length", values="left", aggfunc="mean").astype(float)
        figure = Figure(figsize=(2.6 + 0.9 * len(grid.columns), 3.6), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(grid.to_numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, depth in enumerate(grid.index):
            for column, length in enumerate(grid.columns):
                share = grid.loc[depth, length]
                held = "" if left.loc[depth, length] else "\nstill held"
                colour = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{100 * share:.0f}%{held}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(grid.columns)), map(str, grid.columns))
        axes.set_yticks(range(len(grid.index)), [f"{depth:g}" for depth in grid.index])
        axes.set_xlabel("tokens of the document")
        axes.set_ylabel("depth of the code (1: the end)")
        axes.set_title(f"{label} at {ratio:g}\ncodes answered exactly", fontsize=9)
        figure.colorbar(image, ax=axes, label="share of documents")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        pictures[name_of(ratio)] = file.getvalue()
    return pictures
