"""A run as one full model: the adapter merged into the weights, for people without peft."""

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.hub import repository_name
from kv_compression.io.ownership import open_up
from kv_compression.io.results import RESULTS, as_json, read_results, results_of_run
from kv_compression.sharing.model_card import write_card
from kv_compression.training.loading import load_run


def export(run: str, output: Path, mixed_precision: str = "auto") -> dict | None:
    """Write the merged model of a run, its tokenizer, results.json and card to the folder `output`, or nothing at all.

    The weights are safetensors, in bf16 or fp32 ("no"), as in the run with `mixed_precision` "auto". Returns the
    content of the new results.json, None if `output` holds this very export already. UsageError if it holds anything
    else or `run` is no run, RunError if the disk refuses.
    """
    results = results_of_run(run)
    precision = results["settings"].get("mixed_precision", "no") if mixed_precision == "auto" else mixed_precision
    exported = results | {"export": {"dtype": "bfloat16" if precision == "bf16" else "float32"}}
    if Path(run).resolve() in output.resolve().parents:
        raise UsageError(f"--output_dir {output} is inside the folder of the run: choose another")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output_dir {output} is a file")
    if output.exists() and any(output.iterdir()):
        if read_results(output) == exported:
            return None
        raise UsageError(f"--output_dir {output} holds something else already: choose another")
    tokenizer, model, _ = load_run(run, precision)
    partial = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}"))
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_card(partial, exported, repository_name(output.resolve().name))
        (partial / RESULTS).write_text(as_json(exported), encoding="utf-8")
        open_up(partial)
        os.replace(partial, output)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write to --output_dir {output}: {one_line(error)}") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    return exported
