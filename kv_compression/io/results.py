"""Result files: written whole or not at all, checked when read, shown as lines and tables."""

import json
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from kv_compression.io import ownership, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line, printable, run_script
from kv_compression.io.fields import OF_A_RUN, SOMETIMES_OF_A_RUN, check, has_all
from kv_compression.io.tables import figure, text_table

RESULTS = "results.json"
ADAPTER_FILE = "adapter_model.safetensors"
# Settings of training that scoring a finished run does not take over.
OF_TRAINING = {"eval_only", "lowest_bound_ratio", "model_dir", "max_train_steps"}
FILES = {"train_file", "validation_file", "test_file"}
DATASET = {"dataset_name", "dataset_config_name"}


def write_json(path: Path, content: dict) -> None:
    """Write an object as a JSON file (see `write_bytes`)."""
    write_text(path, as_json(content))


def as_json(content: dict) -> str:
    """An object as JSON; infinity and NaN, which JSON does not have, become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 (see `write_bytes`)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, folder: Path | None = None) -> None:
    """Write a file, whole or not at all. It may replace only a file that these scripts have written (`ownership`).

    It is listed in `folder`, by default its own.

    UsageError if something else is there, RunError if the disk refuses.
    """
    try:
        ownership.write(path, content, folder=folder)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_results(folder: Path) -> dict | None:
    """The results of the finished run in `folder`, None if there is no file; RunError if it holds anything else."""
    path = Path(folder) / RESULTS
    try:
        content = strict_json.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}") from error
    if not has_all(content, OF_A_RUN):
        raise RunError(f"{path} does not hold the results of a run of run_clm.py")
    try:
        check(content, OF_A_RUN, SOMETIMES_OF_A_RUN)
    except ValueError as error:
        raise RunError(f"{path} {error}") from error
    return content


def results_of_run(folder: str) -> dict:
    """The results of a finished run of run_clm.py; UsageError if the folder is not that of one."""
    results = read_results(Path(folder))
    if results is None:
        raise UsageError(f"--model_dir {folder} is not the output folder of a finished run of run_clm.py")
    if "export" in results:
        raise UsageError(f"--model_dir {folder} holds an exported model: name the folder of the run itself")
    return results


def adapter_at(step: int) -> str:
    """Where in a run's folder the adapter lies as it was after an optimizer step (`--adapter_steps`)."""
    return f"adapters/step_{step:08d}"


def recorded_in(folder: str, names: Collection[str], given: Collection[str]) -> dict:
    """The settings among `names` that a finished run was trained with, for scoring it.

    Where its text lay is not recorded if it was files: then the user has to say it again. If text is `given`, the run's
    is left out. UsageError if the folder is not that of a run.
    """
    settings = results_of_run(folder)["settings"]
    wanted = set(names) - OF_TRAINING - FILES
    if (FILES | DATASET) & set(given):
        wanted -= DATASET
    elif any(settings.get(name) for name in FILES):
        raise UsageError(f"--model_dir {folder} was trained on files: name the text to score with --test_file")
    found = {name: value for name, value in settings.items() if name in wanted and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def is_untrained(results: dict) -> bool:
    """Whether these are scores of a model that nobody has fine-tuned: an adapter that is only scored was trained."""
    return bool(results.get("eval_only")) and not results["settings"].get("model_dir")


def in_one_line(results: dict) -> str:
    """A run in one line: what was measured, then how."""
    trained = "" if _untrained(results) is None else f" (before fine-tuning {figure(_untrained(results))})"
    trained = " (without fine-tuning)" if is_untrained(results) else trained
    return (
        f"{name_of(results)} at ratio {results['bound_ratio']}: test perplexity {figure(results['perplexity'])}"
        f"{trained}, {figure(results.get('num_targets'), 0)} tokens, "
        f"removed {figure(results['removed_fraction'], 3)}, "
        f"attended {figure(results.get('attended_fraction'), 3)}, preset {results['preset']}, "
        f"protocol {results['protocol']}, seed {results['seed']}, {figure(results.get('wall_seconds'), 0)} s"
    )


def name_of(run: dict) -> str:
    """A run's method, and its recipe if that is not the paper's."""
    recipe = run["settings"].get("recipe", "paper")
    return run["method"] + ("" if recipe == "paper" else printable(f", recipe {recipe}"))


COLUMNS: dict[str, Callable[[dict], str]] = {
    "method": name_of,
    "ratio": lambda run: str(run["bound_ratio"]),
    "protocol": lambda run: run["protocol"],
    "seed": lambda run: str(run["seed"]),
    "removed": lambda run: figure(run["removed_fraction"], 3),
    "attended": lambda run: figure(run.get("attended_fraction"), 3),
    "kept": lambda run: figure(run.get("kept_keys_mean"), 1),
    "perplexity": lambda run: figure(run["perplexity"]),
    "untrained": lambda run: figure(_untrained(run)),
    "seconds": lambda run: figure(run.get("wall_seconds"), 0),
}


def table(runs: list[dict]) -> str:
    """Runs as a text table, one per line, without columns that say nothing here."""
    shown = {name: [show(run) for run in runs] for name, show in COLUMNS.items()}
    alike = {name for name, cells in shown.items() if len(set(cells)) == 1}
    idle = alike & {"protocol", "seed"} | {name for name in alike & {"kept", "untrained"} if shown[name][0] == "-"}
    return text_table({name: show for name, show in COLUMNS.items() if name not in idle}, runs)


def _untrained(run: dict) -> float | None:
    return (run.get("untrained") or {}).get("perplexity")


def main() -> None:
    """Print a table of the runs in the folders that the command line names."""
    runs = [read_results(Path(folder)) for folder in sys.argv[1:]]
    missing = [folder for folder, run in zip(sys.argv[1:], runs) if run is None]
    if missing:
        raise RunError(f"no results in {', '.join(missing)}")
    print(table(runs))


if __name__ == "__main__":
    sys.exit(run_script(main))
