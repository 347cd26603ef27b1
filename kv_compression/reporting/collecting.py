"""The results and scores below a folder: found, read with care, and sorted into what may be compared.

A run is a row of its group's table; a scored file is a row of its set's. Runs are compared within a group of equal
settings only, scores within a set of the same documents, scorers and generation only.
"""

import json
import math
import os
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from kv_compression.generation.records import scores_path
from kv_compression.io import fields, strict_json
from kv_compression.io.errors import UsageError, one_line, printable
from kv_compression.io.fields import number
from kv_compression.io.results import is_untrained
from kv_compression.methods import METHODS
from kv_compression.methods.sink_attention import SINKS
from kv_compression.settings import LABELS, OPTIONS_OF_METHODS, Settings

FULL, KV, SINK = "full_attention", "kv_compression", "sink_attention"
CLAIMED = ("local_attention", "scattered_attention")  # the baselines that the published claim names
BASELINES = (*CLAIMED, *(name for name in METHODS if name not in (FULL, KV, *CLAIMED)))
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
GRID = tuple(tenths / 10 for tenths in range(1, 10))
PROTOCOLS = {"paper": "nominal", "matched": "matched"}  # and the name of a comparison within each
METRIC_NAMES = {"rouge_l": "ROUGE-L", "bertscore": "BERTScore", "perplexity": "perplexity"}
OF_A_MEASUREMENT = (
    *("perplexity", "nll", "nll_per_token", "nll_per_batch", "num_targets", "num_blocks", "removed_fraction"),
    *("attended_fraction", "kept_keys_mean", "kept_keys_max", "tokens_per_second", "wall_seconds"),
)

UNTUNED = "not fine-tuned"
SPACY_MODEL = "en_core_web_sm"  # the usual parser, in any package
# Variants' settings that a sweep may give to all methods: then they make groups. With their defaults.
OF_A_SWEEP = {name: getattr(Settings, name) for name in sorted({*LABELS} - {*OPTIONS_OF_METHODS})}
PLAIN_SWEEP = json.dumps(OF_A_SWEEP)
# Settings in which the runs of one group may differ. All others make groups. A recipe is a name for other settings.
FREE_IN_GROUP = {
    *("method", "bound_ratio", "protocol", "seed", "attn_implementation", "output_dir"),
    *("preprocessing_num_workers", "preset_reason", "skip_untrained", "eval_only"),
    *LABELS,
}
OF_A_GENERATION = ("prefix_words", "words", "continuations", "top_p", "allow_eos", "seed")
# Other programs' files that lie beside results, and files of these scripts that are not results.
NOT_RESULTS = ("*config.json", "*token*.json", "vocab.json", "merges.json", "*.index.json", "*.about.json")
NOT_RESULTS += ("untrained.json",)  # of a run that is not finished
NO_SEED = -1  # of scores without a run beside them


@dataclass(eq=False)
class Group:
    """Runs that differ in method, ratio, protocol, seed and variant only; `settings` are those of the plain ones."""

    settings: dict
    runs: pd.DataFrame

    @property
    def protocols(self) -> list[str]:
        return [name for name in PROTOCOLS if (self.runs.protocol == name).any()]

    @property
    def model(self) -> str:
        name = str(self.settings.get("model_name_or_path", "unknown model")).rstrip("/").split("/")[-1]
        return EMBEDDED_MODEL if name == "embedded" else printable(name)

    @property
    def text(self) -> str:
        named = ("train_file", "test_file")
        files = [str(self.settings[name]).split(" sha256:")[0] for name in named if name in self.settings]
        name = self.settings.get("dataset_config_name") or self.settings.get("dataset_name") or "unknown text"
        return " → ".join(files) or str(name)


@dataclass
class ScoredSet:
    """Scored files that may be compared, one per row: how they were `made`, and the number of their `group` of runs."""

    made: dict
    group: int | None
    rows: pd.DataFrame


@dataclass
class Recall:
    """What a cache remembered (`recall.json`): the `folder` it lies in, the method, and the summary's rows."""

    folder: str
    method: str
    rows: list[dict]


@dataclass
class Found:
    """Everything that a folder holds; duplicates are set apart."""

    groups: list[Group] = field(default_factory=list)
    scores: list[ScoredSet] = field(default_factory=list)
    recalls: list[Recall] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path and reason
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # path and the file that is used
    unscored: list[str] = field(default_factory=list)  # continuations without scores beside them

    def tally(self) -> str:
        """What was found, in one line."""
        runs = sum(len(group.runs) for group in self.groups)
        scored = len({path for scores in self.scores for path in scores.rows.path})
        groups = f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}"
        recalls = f"{len(self.recalls)} measurement{'s' * (len(self.recalls) != 1)} of recall, " if self.recalls else ""
        return (
            f"{runs} run{'s' * (runs != 1)} in {groups} of equal settings, {scored} scored "
            f"file{'s' * (scored != 1)}, {recalls}{len(self.duplicates)} duplicate, {len(self.unreadable)} unreadable"
        )


def label(method: str) -> str:
    """A method's name for readers."""
    return METHODS[method].label if method in METHODS else method.replace("_", " ")


def uses_sentinels(content: dict) -> bool:
    """Whether the protocol changes more about a run than how its perplexity is averaged."""
    return getattr(METHODS.get(content["method"]), "uses_sentinels", False) or bool(content.get("sentinels"))


def collect(folder: Path) -> Found:
    """Everything below `folder` that runs and scorers have left. UsageError if there is nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found, runs, scores = Found(), {}, {}
    paths = {_shown(path.relative_to(folder)): path for path in folder.rglob("*.json")}
    for name, path in sorted(paths.items()):
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name.endswith(".about.json") and not hidden:
            generation = path.with_name(path.name.removesuffix(".about.json") + ".jsonl")
            if not scores_path(generation).is_file():
                found.unscored.append(name.removesuffix(".about.json") + ".jsonl")
        if hidden or not path.is_file() or any(fnmatch(path.name, pattern) for pattern in NOT_RESULTS):
            continue
        try:
            content = _read(path)
        except ValueError as error:
            found.unreadable.append((name, str(error)))
        else:
            if fields.has_all(content, fields.OF_RECALL):
                found.recalls.append(Recall(os.path.dirname(name) or ".", content["about"]["method"], content["rows"]))
                continue
            (runs if fields.has_all(content, fields.OF_A_RUN) else scores)[name] = content
    if not runs and not scores and not found.recalls:
        hint = f" ({found.unreadable[0][0]} {found.unreadable[0][1]})" if found.unreadable else ""
        raise UsageError(f"{folder}: no results of run_clm.py or eval_generation.py below it{hint}")
    _add_scores(found, scores, _add_runs(found, runs), folder)
    return found


def _shown(path: Path) -> str:
    """A path as text; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _read(path: Path) -> dict:
    """The content of a file of results or scores; ValueError, with what is wrong, if it is neither."""
    try:
        content = strict_json.read(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"is damaged: {one_line(error)}") from error
    if fields.has_all(content, fields.OF_RECALL):
        fields.check(content, fields.OF_RECALL)
        return content
    if fields.has_all(content, fields.OF_A_RUN):
        fields.check(content, fields.OF_A_RUN, fields.SOMETIMES_OF_A_RUN)
    elif fields.has_all(content, fields.OF_A_METHOD | fields.OF_SCORES):
        fields.check(content, fields.OF_A_METHOD | fields.OF_SCORES, fields.OF_A_GENERATION)
    else:
        raise ValueError("holds neither results nor scores")
    return content | {"bound_ratio": round(content["bound_ratio"], 6)}


def _add_runs(found: Found, contents: dict[str, dict]) -> dict[str, tuple[int, dict]]:
    """Sort runs into groups; returns by path the number of every run's group and its row, also for duplicates.

    A run of KV compression joins the other methods of a sweep with the same settings. Where there are none it is a
    variant beside methods with other settings.
    """
    given: dict[str, set[str]] = {}
    for content in contents.values():
        if content["method"] != KV:
            given.setdefault(_shared(content), set()).add(_of_its_sweep(content))
    groups: dict[tuple, list[dict]] = {}
    first: dict[tuple, str] = {}
    where = {}
    for path, content in contents.items():
        shared, own = _shared(content), _of_its_sweep(content)
        known = given.get(shared) or {PLAIN_SWEEP}
        sweep = own if own in known else min(known, key=lambda one: (one != PLAIN_SWEEP, one))
        row = row_of(path, content, json.loads(sweep))
        rows = groups.setdefault((shared, sweep), [])
        where[path] = (list(groups).index((shared, sweep)), row | {"settings": content["settings"]})
        same = (shared, sweep, *(row[name] for name in ("method", "ratio", "protocol", "seed", "variant")))
        if first.setdefault(same, path) == path:
            rows.append(row)
        else:
            found.duplicates.append((path, first[same]))
    for (shared, sweep), rows in groups.items():
        settings = {name: value for name, value in sorted((json.loads(shared) | json.loads(sweep)).items()) if value}
        found.groups.append(Group(settings, _numbered(pd.DataFrame(rows))))
    return where


def _shared(content: dict) -> str:
    """The settings that all runs of a group share, as JSON. Settings that an older version lacked were off."""
    settings = {"num_processes": 1} | content["settings"]
    if settings.get("documents") == "auto":
        settings["documents"] = None
    return json.dumps({name: value for name, value in sorted(settings.items()) if name not in FREE_IN_GROUP and value})


def _of_its_sweep(content: dict) -> str:
    """A run's settings of `OF_A_SWEEP`, as JSON. The protocol paper always draws spans once."""
    found = {name: content["settings"].get(name) or plain for name, plain in OF_A_SWEEP.items()}
    return json.dumps(found | {"fixed_spans": content["protocol"] == "matched" and bool(found["fixed_spans"])})


def row_of(path: str, content: dict, sweep: dict = OF_A_SWEEP) -> dict:
    """One results.json as a row; `sweep` holds what its whole group was given.

    `nats_…` and `untrained_…` are nats per token as each protocol averages them, NaN if they were not recorded.
    """
    hashes = content.get("blocks_sha256")
    row = {"path": path, "method": content["method"], "variant": variant_of(content, sweep)}
    row |= {"ratio": content["bound_ratio"], "protocol": content["protocol"], "seed": content["seed"]}
    row |= {name: _float(content.get(name)) for name in OF_A_MEASUREMENT}
    row["device"] = printable(str(content.get("device") or ""))
    row |= {"fine_tuned": not is_untrained(content), "sentinels": uses_sentinels(content)}
    for protocol in PROTOCOLS:
        row[f"nats_{protocol}"] = _nats(content, content["protocol"], protocol)
        row[f"untrained_{protocol}"] = _nats(content.get("untrained"), content["protocol"], protocol)
    row["trained_blocks"] = trained_blocks(content)
    row["test_text"] = str(hashes.get("test")) if isinstance(hashes, dict) else None
    return row


def _float(value) -> float:
    return math.nan if number(value) is None else float(value)


def _nats(measured: dict | None, protocol: str, averaging: str) -> float:
    """Nats per token as `averaging` averages them, from what a run of `protocol` measured; NaN if unknown."""
    if not isinstance(measured, dict):
        return math.nan
    value = _float(measured.get("nll_per_batch" if averaging == "paper" else "nll_per_token"))
    if not value >= 0 and protocol == averaging:
        value, perplexity = _float(measured.get("nll")), _float(measured.get("perplexity"))
        if not value >= 0 and perplexity >= 1:
            return math.log(perplexity)
    return value if value >= 0 else math.nan


def trained_blocks(content: dict) -> float:
    """The blocks of 256 tokens that a run has trained on, counted as often as they were seen; NaN if unknown."""
    training, settings = content.get("training"), {"num_processes": 1} | content["settings"]
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "block_size")
    steps = training.get("steps") if isinstance(training, dict) else None
    return math.prod(map(_float, [steps, *(settings.get(name) for name in names)])) / 256


def _numbered(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, with a number for each fine-tuned variant of KV compression at a ratio, as tables and plots show it."""
    nats = runs.nats_matched.where(runs.protocol == "matched", runs.nats_paper)
    counted = runs[(runs.method == KV) & (runs.variant != "") & runs.fine_tuned & nats.notna()]
    return runs.assign(number=counted.groupby(["protocol", "variant", "ratio"]).ngroup() + 1)


def variant_of(content: dict, sweep: dict = OF_A_SWEEP) -> str:
    """How a run differs from its plain method in words, "" if it does not; `sweep` holds what its group was given."""
    method = content["method"]
    settings = dict(content["settings"])
    if settings.get("span_unit") not in (None, Settings.span_unit):  # its label says the sampler as well
        settings["span_sampler"] = None
    if str(settings.get("spacy_model")).startswith(SPACY_MODEL):
        settings["spacy_model"] = None
    counts = {name for name, methods in OPTIONS_OF_METHODS.items() if method in methods}
    if uses_sentinels(content):  # settings of spans mean nothing to a method without them
        counts = {*LABELS} - ({"fixed_spans"} if content["protocol"] == "paper" else set())
    parts = []
    for name, form in LABELS.items():
        value = settings.get(name)
        plain = (0, SINKS) if method == SINK and name == "sink_tokens" else (sweep.get(name, getattr(Settings, name)),)
        if name in counts - {"recipe"} and value is not None and value not in plain:
            parts.append(form.format(_words(value)))
    return ", ".join(parts + [UNTUNED] * is_untrained(content))


def _words(value) -> str:
    """A setting's value, which may come from a file, in words."""
    if isinstance(value, bool):
        return "once" if value else "anew"
    return f"{value:g}" if isinstance(value, float) else printable(str(value))[:40].replace("_", "-")


def _add_scores(found: Found, contents: dict[str, dict], runs: dict[str, tuple[int, dict]], folder: Path) -> None:
    """Sort scores into sets that may be compared: the same documents, scorers, generation and group of runs.

    KV compression that folds what it generates, and that does not, are in two sets; other methods are in both.
    """
    sets: dict[str, tuple[dict, int | None, list[dict]]] = {}
    first: dict[tuple, str] = {}
    for path, content in contents.items():
        made, group, row = _score(path, content, runs, folder)
        key = json.dumps([made, group], default=str)
        same = (key, *(row[name] for name in ("method", "ratio", "protocol", "variant", "seed", "folds")))
        if first.setdefault(same, path) == path:
            sets.setdefault(key, (made, group, []))[2].append(row)
        else:
            found.duplicates.append((path, first[same]))
    for made, group, rows in sets.values():
        for way in sorted({row["folds"] for row in rows} - {None}) or [None]:
            alike = pd.DataFrame([row for row in rows if row["folds"] in (way, None)])
            found.scores.append(ScoredSet(made | {"folds": way}, group, alike))


def _score(path: str, content: dict, runs: dict, folder: Path) -> tuple[dict, int | None, dict]:
    """What made a scored file, the number of its run's group, and its row."""
    beside, _, name = path.rpartition("/")
    group, run = runs.get(f"{beside}/results.json".lstrip("/"), (None, None))
    stem = name.removesuffix(".json").removesuffix(".scores").removeprefix("scores_")
    try:
        about = strict_json.read(folder / beside / f"{'generation' if stem == 'scores' else stem}.about.json")
        generation = [about.get(key) for key in OF_A_GENERATION]
    except (OSError, ValueError, AttributeError):
        about, generation = {}, []  # scores may have been moved away from what they were made of
    made = {"documents": content.get("documents_sha256") or path}  # unknown documents compare with no others
    made |= {name: content.get(name) for name in ("preset", "bertscore_model", "fluency_model", "bertscore_layer")}
    made |= {"convention": content.get("convention"), "generation": generation}
    row = {"path": path, "method": content["method"], "variant": _variant_of_scores(content, run, about)}
    row |= {"ratio": content["bound_ratio"], "protocol": content["protocol"], "seed": run["seed"] if run else NO_SEED}
    row |= {"documents": len(content["documents"]), "cache_fraction": _float(content.get("cache_fraction"))}
    for metric in METRIC_NAMES:
        values = content[metric]
        row |= {metric: _float(values["mean"])} | {f"{metric}_{end}": _float(values[end]) for end in ("low", "high")}
    folds = bool(about.get("compress_generated")) if uses_sentinels(content) else None
    row |= {"sentinels": uses_sentinels(content), "folds": folds, "by_document": content["documents"]}
    return made, group, row


def _variant_of_scores(content: dict, run: dict | None, about: dict) -> str:
    """The run's variant, and how its model generated differently from how it was trained."""
    if run is None:
        return ""
    if run["method"] != content["method"]:
        return f"trained as {label(run['method'])}"
    words = [run["variant"]] + [f"trained at {run['ratio']:g}"] * (run["ratio"] != content["bound_ratio"])
    if run["sentinels"] and about:
        recorded = {"recent_tokens": 0} | about  # a file without a window does not name it
        trained = {name: run["settings"].get(name) for name in ("recent_tokens", "max_span_length")}
        for name, value in (trained | {"recent_tokens": trained["recent_tokens"] or 0}).items():
            if value is not None and (used := recorded.get(name, value)) != value:
                words.append(LABELS[name].format(_words(used)) + " generating")
    return ", ".join(filter(None, words))


def of_protocol(rows: pd.DataFrame, protocol: str, first: str | None = None) -> pd.DataFrame:
    """Runs or scored files of a protocol, one per method, variant, ratio and seed.

    Methods without sentinels differ between protocols only in the average: their runs serve both, those of the protocol
    `first` (`protocol` itself if not given) before others.
    """
    own = rows[(rows.protocol == protocol) | ~rows.sentinels]
    own = own.assign(other=own.protocol != (first or protocol)).sort_values(["other", "path"])
    keys = ["method", "variant", "ratio", "seed"]
    return own.drop_duplicates(keys).sort_values(keys, ignore_index=True)


@lru_cache(maxsize=64)
def points(group: Group, protocol: str, averaging: str | None = None) -> pd.DataFrame:
    """The runs of a protocol, one per method, variant, ratio and seed, with `nll` as `averaging` averages.

    `averaging` is by default the protocol's own. With "matched", runs of the protocol paper are weighted by tokens, and
    marked as `foreign`.
    """
    averaging = averaging or protocol
    found = of_protocol(group.runs.dropna(subset=f"nats_{averaging}"), protocol, averaging)
    nll = found[f"nats_{averaging}"]
    columns = {"nll": nll, "perplexity": perplexity(nll), "untrained": found[f"untrained_{averaging}"]}
    return found.assign(**columns, foreign=found.sentinels & (found.protocol != averaging))


def perplexity(nll):
    """exp(nll), of a number or a series, within the range of a float."""
    return np.exp(np.minimum(nll, 700))
