"""What runs and scorers have left below a folder: collected, and sorted into what may be compared.

Reads `results.json` and `scores.json` as the scripts write them, whatever a file is called. Runs are compared within a
group of equal settings only.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from kv_compression.generation.records import scores_path
from kv_compression.io import fields, strict_json
from kv_compression.io.errors import UsageError, one_line, printable
from kv_compression.io.fields import number
from kv_compression.reporting.plotting import label

FULL, KV, SINK = "full_attention", "kv_compression", "sink_attention"
CLAIMED = ("local_attention", "scattered_attention")  # the published claim says nothing of sinks
BASELINES = (*CLAIMED, SINK)
METHODS = (FULL, KV, *BASELINES)
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
GRID = tuple(tenths / 10 for tenths in range(1, 10))
PROTOCOLS = {"paper": "nominal", "matched": "matched"}  # and what a comparison within each is called
METRICS = {"rouge_l": "ROUGE-L", "bertscore": "BERTScore", "perplexity": "perplexity"}

UNTUNED = "not fine-tuned"
# Settings that make a variant of a method: what the plain method has, and how another value is told.
VARIANTS = {
    "sink_tokens": (0, "sinks {}"),
    "cr_tokens": (1, "{} CR tokens"),
    "cr_visibility": ("span", "CR sees {}"),
    "recent_tokens": (0, "window {}"),
    "distill_weight": (0, "distilled {}"),
    "sentinel_learning_rate": (None, "sentinel learning rate {}"),
    "span_sampler": ("random", "{} sampler"),
    "span_unit": ("token", "by {}"),
    "spacy_model": (None, "{}"),
    "max_span_length": (25, "spans to {}"),
    "fixed_spans": (False, "spans drawn {}"),
    "eval_only": (False, UNTUNED),
}
# Settings of these that a sweep may give to all methods: then they make groups.
OF_A_SWEEP = {name: VARIANTS[name][0] for name in ("distill_weight", "max_span_length", "fixed_spans")}
PLAIN_SWEEP = json.dumps(OF_A_SWEEP)
PLAIN_SINKS = (0, 4)  # sink attention always has sinks: 4 unless told otherwise
# Settings in which runs of one group may differ. All others make groups. A recipe is a name for other settings.
OF_A_RUN = {
    *("method", "bound_ratio", "protocol", "seed", "attn_implementation", "output_dir"),
    *("preprocessing_num_workers", "preset_reason", "skip_untrained", "recipe"),
    *VARIANTS,
}
OF_A_GENERATION = ("prefix_words", "words", "continuations", "top_p", "allow_eos", "seed")
# Other programs' files that lie beside results, and files of these scripts that are no results.
NOT_RESULTS = ("*config.json", "*token*.json", "vocab.json", "merges.json", "*.index.json", "*.about.json")
NOT_RESULTS += ("untrained.json",)  # of a run that goes on


class File:
    """One file of results or scores: `path` is relative to the folder that was searched."""

    path: str
    content: dict

    @property
    def method(self) -> str:
        return self.content["method"]

    @property
    def ratio(self) -> float:
        return self.content["bound_ratio"]

    @property
    def protocol(self) -> str:
        return self.content["protocol"]

    @property
    def has_sentinels(self) -> bool:
        """Whether the protocol changes more than the average."""
        return self.method == KV or bool(self.content.get("sentinels"))


@dataclass(frozen=True)
class Run(File):
    """One results.json."""

    path: str
    content: dict
    variant: str  # "" for the plain method

    @property
    def seed(self) -> int:
        return self.content["seed"]

    def nll(self, protocol: str, part: str | None = None) -> float | None:
        """Nats per token as `protocol` averages, of the run or of one `part` ("untrained"), None if not recorded."""
        measured = self.content if part is None else self.content.get(part)
        if not isinstance(measured, dict):
            return None
        value = _nats(measured.get("nll_per_batch" if protocol == "paper" else "nll_per_token"))
        if value is not None or self.protocol != protocol:
            return value
        value, found = _nats(measured.get("nll")), number(measured.get("perplexity"))
        return math.log(found) if value is None and found and found >= 1 else value


@dataclass(frozen=True)
class Score(File):
    """One scores.json. Which run it is of is known where results.json lies beside it."""

    path: str
    content: dict
    variant: str
    seed: int | None
    made: tuple  # what has to be equal for two to be compared
    compress_generated: bool | None = None  # None for methods that drop by their rule whatever they read


@dataclass
class Group:
    """Runs that differ in method, ratio, protocol, seed and variant only; `settings` are those of the plain ones."""

    settings: dict
    runs: list[Run] = field(default_factory=list)

    @property
    def protocols(self) -> list[str]:
        return [name for name in PROTOCOLS if any(run.protocol == name for run in self.runs)]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

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


@dataclass(frozen=True)
class Point:
    """One method, variant and ratio: its runs by seed, under one protocol's average."""

    method: str
    variant: str
    ratio: float
    averaging: str
    runs: dict[int, Run]

    @cached_property
    def nlls(self) -> dict[int, float]:
        return {seed: run.nll(self.averaging) for seed, run in self.runs.items()}

    @property
    def perplexities(self) -> list[float]:
        return [perplexity(nll) for nll in self.nlls.values()]

    @property
    def name(self) -> str:
        """What its curve is called."""
        method = "" if self.method == KV and self.variant else label(self.method)
        return ", ".join(filter(None, [method, self.variant, self.foreign and "protocol paper"]))

    @property
    def first(self) -> Run:
        """The run of the first seed."""
        return next(iter(self.runs.values()))

    @property
    def foreign(self) -> bool:
        """Whether these are runs of `paper` averaged as in `matched`."""
        return self.first.has_sentinels and self.first.protocol != self.averaging

    @property
    def fine_tuned(self) -> bool:
        return not self.first.content.get("eval_only")

    def recorded(self, name: str) -> list[float]:
        """What the runs recorded under `name`, as far as they did."""
        return [value for run in self.runs.values() if (value := number(run.content.get(name))) is not None]

    def mean(self, name: str) -> float | None:
        """The mean over seeds of what the runs recorded under `name`."""
        return mean(self.recorded(name))


@dataclass
class Found:
    """All that a folder holds, sorted, each thing once."""

    groups: list[Group] = field(default_factory=list)
    scores: list[list[Score]] = field(default_factory=list)  # comparable ones together
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)  # continuations without scores beside them

    def summary(self) -> str:
        """What was found, in one line."""
        runs = sum(len(group.runs) for group in self.groups)
        scores = len({score.path for some in self.scores for score in some})
        groups = f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}"
        return (
            f"{runs} run{'s' * (runs != 1)} in {groups} of equal settings, {scores} scored "
            f"file{'s' * (scores != 1)}, {len(self.duplicates)} duplicate, {len(self.unreadable)} unreadable"
        )


def _nats(value) -> float | None:
    """`value` if it is a negative log-likelihood, else None."""
    return value if number(value) is not None and value >= 0 else None


def perplexity(nll: float) -> float:
    """exp(nll), kept within what a float holds."""
    return math.exp(min(nll, 700))


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation, None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def collect(folder: Path) -> Found:
    """Everything below `folder` that a run or a scorer has left. UsageError if there is no such thing."""
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
            (runs if fields.has_all(content, fields.OF_A_RUN) else scores)[name] = content
    if not runs and not scores:
        hint = f" ({found.unreadable[0][0]} {found.unreadable[0][1]})" if found.unreadable else ""
        raise UsageError(f"{folder}: no results of run_clm.py or eval_generation.py below it{hint}")
    _add_scores(found, scores, _add_runs(found, runs), folder)
    return found


def _shown(path: Path) -> str:
    """A path as text, whatever bytes its names hold."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _read(path: Path) -> dict:
    """What a file holds if it is results or scores; ValueError, with what is wrong, if not."""
    try:
        content = strict_json.read(path)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"is damaged: {one_line(error)}") from error
    if fields.has_all(content, fields.OF_A_RUN):
        fields.check(content, fields.OF_A_RUN, fields.SOMETIMES_OF_A_RUN)
    elif fields.has_all(content, fields.OF_A_METHOD | fields.OF_SCORES):
        fields.check(content, fields.OF_A_METHOD | fields.OF_SCORES, fields.OF_A_GENERATION)
    else:
        raise ValueError("holds neither results nor scores")
    return content | {"bound_ratio": round(content["bound_ratio"], 6)}


def _add_runs(found: Found, contents: dict[str, dict]) -> dict[str, tuple[int, Run]]:
    """Sort runs into groups; returns every run and its group's number by path, duplicates among them.

    A run of KV compression belongs to the methods that were given the same settings of a sweep. Where there are none,
    it is a variant beside those with other settings.
    """
    given: dict[str, set[str]] = {}
    for content in contents.values():
        if content["method"] != KV:
            given.setdefault(_shared(content), set()).add(_of_its_sweep(content))
    keys: dict[tuple, int] = {}
    first: dict[tuple, str] = {}
    where = {}
    for path, content in contents.items():
        shared, own = _shared(content), _of_its_sweep(content)
        known = given.get(shared) or {PLAIN_SWEEP}
        sweep = own if own in known else min(known, key=lambda one: (one != PLAIN_SWEEP, one))
        group = keys.setdefault((shared, sweep), len(keys))
        if group == len(found.groups):
            settings = json.loads(shared) | json.loads(sweep)
            found.groups.append(Group({name: value for name, value in sorted(settings.items()) if value}))
        run = Run(path, content, variant_of(content, json.loads(sweep)))
        where[path] = (group, run)
        same = (group, run.method, run.ratio, run.protocol, run.seed, run.variant)
        if first.setdefault(same, path) == path:
            found.groups[group].runs.append(run)
        else:
            found.duplicates.append((path, first[same]))
    return where


def _shared(content: dict) -> str:
    """The settings that all runs of a group share, as JSON. What an older version did not know was off, one or auto."""
    settings = {"num_processes": 1} | content["settings"]
    if settings.get("documents") == "auto":
        settings["documents"] = None
    return json.dumps({name: value for name, value in sorted(settings.items()) if name not in OF_A_RUN and value})


def _of_its_sweep(content: dict) -> str:
    """A run's settings of `OF_A_SWEEP`, as JSON. The protocol paper draws spans once, whatever the sweep was told."""
    found = {name: content["settings"].get(name) or plain for name, plain in OF_A_SWEEP.items()}
    return json.dumps(found | {"fixed_spans": content["protocol"] == "matched" and bool(found["fixed_spans"])})


def variant_of(content: dict, sweep: dict = OF_A_SWEEP) -> str:
    """How a run differs from the plain method in words, "" if it does not; `sweep` is what its group was given."""
    method, settings = content["method"], content["settings"] | {"eval_only": bool(content.get("eval_only"))}
    counts = set(VARIANTS) - ({"fixed_spans"} if content["protocol"] == "paper" else set())
    if method != KV:  # what a setting of spans is does not matter to a method without them
        counts = {"eval_only"} | ({"sink_tokens"} if method == SINK else set())
    words = []
    for name, (plain, form) in VARIANTS.items():
        value = settings.get(name)
        unchanged = PLAIN_SINKS if method == SINK and name == "sink_tokens" else (sweep.get(name, plain),)
        if name in counts and value is not None and value not in unchanged:
            if isinstance(value, bool):
                value = "once" if value else "anew"
            told = f"{value:g}" if isinstance(value, float) else printable(str(value))[:40].replace("_", "-")
            words.append(form.format(told))
    return ", ".join(words)


def _add_scores(found: Found, contents: dict[str, dict], runs: dict[str, tuple[int, Run]], folder: Path) -> None:
    """Sort scores into sets that may be compared: the same documents, scorers, generation and group of runs.

    KV compression that folds what it generates, and that does not, are in two sets; other methods are in both.
    """
    alike: dict[str, list[Score]] = {}
    first: dict[tuple, str] = {}
    for path, content in contents.items():
        score = _score(path, content, runs, folder)
        key = json.dumps(score.made, default=str)
        same = (key, score.method, score.ratio, score.protocol, score.variant, score.seed, score.compress_generated)
        if first.setdefault(same, path) == path:
            alike.setdefault(key, []).append(score)
        else:
            found.duplicates.append((path, first[same]))
    for scores in alike.values():
        ways = sorted({score.compress_generated for score in scores} - {None}) or [None]
        found.scores += [[score for score in scores if score.compress_generated in (way, None)] for way in ways]


def _score(path: str, content: dict, runs: dict[str, tuple[int, Run]], folder: Path) -> Score:
    beside, _, name = path.rpartition("/")
    group, run = runs.get(f"{beside}/results.json".lstrip("/"), (None, None))
    stem = name.removesuffix(".json").removesuffix(".scores").removeprefix("scores_")
    try:
        about = strict_json.read(folder / beside / f"{'generation' if stem == 'scores' else stem}.about.json")
        generation = [about.get(key) for key in OF_A_GENERATION]
    except (OSError, ValueError, AttributeError):
        about, generation = {}, []  # not told: scores may be moved away from what they were made of
    documents = content.get("documents_sha256") or path  # unknown documents compare with no others
    scorers = ("bertscore_model", "fluency_model", "bertscore_layer", "convention")
    models = [content.get(key) for key in ("preset", *scorers)]
    made = (documents, *models, *generation, group)
    folds = bool(about.get("compress_generated")) if content["method"] == KV else None
    return Score(path, content, _variant_of_scores(content, run, about), run.seed if run else None, made, folds)


def _variant_of_scores(content: dict, run: Run | None, about: dict) -> str:
    """The run's variant, and in what its model generated otherwise than it was trained, as `about` tells."""
    if run is None:
        return ""
    if run.method != content["method"]:
        return f"trained as {label(run.method)}"
    words = [run.variant] + [f"trained at {run.ratio:g}"] * (run.ratio != content["bound_ratio"])
    if run.method == KV and about:
        settings, told = run.content["settings"], {"recent_tokens": 0} | about  # no window is not told
        trained = {
            "recent_tokens": settings.get("recent_tokens") or 0,
            "max_span_length": settings.get("max_span_length"),
        }
        for name, value in trained.items():
            if value is not None and (used := told.get(name, value)) != value:
                words.append(VARIANTS[name][1].format(printable(str(used))[:40]) + " generating")
    return ", ".join(filter(None, words))


def points(group: Group, protocol: str, averaging: str | None = None) -> list[Point]:
    """What was measured for one protocol, by method, variant and ratio.

    Methods without sentinels know no protocol but the average: a run of either serves both. `averaging` (the
    protocol's own if not given) "matched" shows runs of the protocol `paper` token-weighted.
    """
    averaging = averaging or protocol
    by_point: dict[tuple, dict[int, Run]] = {}
    for run in sorted(group.runs, key=lambda run: (run.protocol != averaging, run.path)):
        if (run.protocol == protocol or not run.has_sentinels) and run.nll(averaging) is not None:
            key = (run.method, run.variant, run.ratio)
            by_point.setdefault(key, {}).setdefault(run.seed, run)
    found = [Point(*key, averaging, dict(sorted(runs.items()))) for key, runs in by_point.items()]
    return sorted(found, key=lambda point: (rank(point.method), point.variant, point.ratio))


def rank(method: str) -> tuple[int, str]:
    """Where a method stands in tables and legends."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def variants(found: Iterable[Point]) -> list[Point]:
    """The fine-tuned variants of KV compression."""
    return [point for point in found if point.method == KV and point.variant and point.fine_tuned]


def number_variants(group: Group) -> dict[tuple[str, str, float], int]:
    """A number, for tables and plots, for each of a group's `variants`, by protocol, variant and ratio."""
    found = {protocol: variants(points(group, protocol)) for protocol in ("matched", "paper")}
    keys = [(protocol, point.variant, point.ratio) for protocol, those in found.items() for point in those]
    return {key: number for number, key in enumerate(keys, start=1)}


def select(found: Iterable[Point], method: str, variant: str = "") -> dict[float, Point]:
    """The points of one curve, by ratio."""
    return {point.ratio: point for point in found if (point.method, point.variant) == (method, variant)}
