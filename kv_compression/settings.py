"""The settings of a run, and the presets `paper` and `embedded`: model, data and recipe in one place.

A setting is the user's flag if given, else the preset's, else the paper's recipe. Importing this module, and checking
settings, loads neither torch nor what stands on it: a wrong flag is refused at once.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, NamedTuple, get_args, get_origin

from kv_compression.data.embedded import (
    embedded_encoder,
    embedded_model,
)
from kv_compression.io.errors import UsageError
from kv_compression.io.whole_files import file_name
from kv_compression.methods.ratio import check_ratio

if TYPE_CHECKING:
    from kv_compression.methods.rule import Rule
    from kv_compression.spans.plan import SpanPlan

# The names of `visibility.METHODS`.
METHOD_NAMES = ("full_attention", "kv_compression", "local_attention", "scattered_attention", "sink_attention")
DOCUMENTS = ("auto", "rows", "articles")  # what a document is
GIB = 1 << 30
PAPER_MEMORY = 16 * GIB  # RedPajama-3B in bf16, LoRA, 4 blocks of 256
EMBEDDED = "embedded"  # stands for the embedded model and the embedded text


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does. The defaults are the paper's recipe (section 4.1)."""

    preset: str = "paper"
    preset_reason: str = "asked for"
    method: str = "kv_compression"
    bound_ratio: float = 0.0
    protocol: str = "paper"
    model_name_or_path: str = "togethercomputer/RedPajama-INCITE-Base-3B-v1"
    tokenizer_name: str | None = None  # the model's own
    dataset_name: str | None = "Salesforce/wikitext"
    dataset_config_name: str | None = "wikitext-2-raw-v1"
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    validation_split_percentage: int | None = None
    block_size: int = 256
    max_span_length: int = 25
    span_sampler: str = "random"
    span_unit: str = "token"
    spacy_model: str | None = None
    recipe: str = "paper"
    sink_tokens: int = 0
    cr_tokens: int = 1
    cr_visibility: str = "span"
    recent_tokens: int = 0
    distill_weight: float = 0.0
    sentinel_learning_rate: float | None = None
    isolate_documents: bool = False
    position_ids_by_document: bool = False
    documents: str = "auto"
    fixed_spans: bool = False
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 3
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    num_train_epochs: int = 3
    max_train_steps: int | None = None
    num_warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    published_schedule: bool = False  # the scheduler plans for updates × accumulation, and steps once per update
    max_eval_blocks: int | None = None
    r: int = 16
    lora_target_modules: tuple[str, ...] | None = None
    seed: int = 0
    attn_implementation: str = "sdpa"
    mixed_precision: str = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    num_processes: int = 1
    eval_only: bool = False
    skip_untrained: bool = False
    preprocessing_num_workers: int | None = None
    checkpointing_steps: str = "10m"
    checkpoints_to_keep: int = 2
    output_dir: str = ""

    def identity(self) -> dict:
        """What makes two runs the same: all settings that decide the result. A file is what it holds, not its place."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_OF_THE_RESULT}
        files = {name: _identity_of(settings[name]) for name in settings if name.endswith("_file")}
        return settings | files | {"lora_target_modules": list(self.lora_target_modules or []) or None}

    @staticmethod
    def regardless_of_processes(identity: dict) -> dict:
        """An identity in which it is the same, by how many processes a batch is shared."""
        identity = dict(identity)
        shares = identity.pop("per_device_train_batch_size", None), identity.pop("num_processes", 1)
        trained = all(isinstance(share, int) for share in shares) and not identity.get("eval_only")
        return identity | {"blocks a micro-batch": shares[0] * shares[1] if trained else None}

    def check(self, in_blocks: bool = True) -> None:
        """Raise UsageError for values that no run can have, and unless not `in_blocks`, if its spans do not fit one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_of_type(value, field.type):
                raise UsageError(f"--{field.name} cannot be {value!r}")
        for name, choices in {"method": METHOD_NAMES, "preset": PRESETS, **_choices()}.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} {getattr(self, name)}: choose from {', '.join(choices)}")
        try:
            check_ratio(self.bound_ratio)
        except ValueError as error:
            raise UsageError(f"--bound_ratio: {error}") from error
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UsageError(f"--{name} must be at least {least}, got {value}")
            if isinstance(value, int) and value >= 2**32:
                raise UsageError(f"--{name} must be below 2^32, got {value}")
        if self.method == "full_attention" and self.bound_ratio:
            raise UsageError("full attention compresses nothing: leave --bound_ratio away")
        if self.protocol == "paper" and self.block_size < 8:
            raise UsageError(f"--block_size must be at least 8 in the protocol paper, got {self.block_size}")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning_rate must be above 0, got {self.learning_rate}")
        if self.sentinel_learning_rate is not None and not self.sentinel_learning_rate < float("inf"):
            raise UsageError(f"--sentinel_learning_rate must be finite, got {self.sentinel_learning_rate}")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UsageError(f"--lr_scheduler_type polynomial ends at {POLYNOMIAL_END}: raise --learning_rate")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"--weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.validation_split_percentage is not None and not 1 <= self.validation_split_percentage <= 99:
            raise UsageError(
                f"--validation_split_percentage must be from 1 to 99, got {self.validation_split_percentage}"
            )
        if not 0 <= self.distill_weight <= 1:
            raise UsageError(f"--distill_weight must be from 0 to 1, got {self.distill_weight}")
        if self.checkpoint_interval() == (None, None):
            raise UsageError(
                f"--checkpointing_steps {self.checkpointing_steps}: give a number of steps (100), of minutes (10m) "
                "or epoch"
            )
        self._check_options()
        if in_blocks and self.method == "kv_compression" and self.protocol == "matched":
            self._check_spans()

    def _check_spans(self) -> None:
        """Raise UsageError for spans, sinks and a window that a block has no room for."""
        from kv_compression.spans.exact import entries_to_remove

        first, last = self.sink_tokens, self.block_size - self.recent_tokens
        try:
            if first > last:
                raise ValueError(f"{first} sinks and {self.recent_tokens} recent tokens are more than a block has")
            entries_to_remove(self.block_size, self.bound_ratio, self.max_span_length, self.cr_tokens, first, last)
        except ValueError as error:
            options = "--bound_ratio, --max_span_length, --sink_tokens, --recent_tokens and --cr_tokens"
            raise UsageError(f"{options} do not fit a block of {self.block_size}: {error}") from error

    def _check_options(self) -> None:
        """Raise UsageError for options of a method or protocol that this run does not have."""
        changed = [name for name in OF_KV_COMPRESSION if getattr(self, name) != getattr(Settings, name)]
        if self.method == "sink_attention":
            changed = [name for name in changed if name != "sink_tokens"]
        if self.method != "kv_compression" and changed:
            raise UsageError(f"--{changed[0]} is an option of --method kv_compression, not of {self.method}")
        if self.protocol == "paper":
            for name in ("span_sampler", "span_unit", "cr_tokens"):
                if getattr(self, name) != getattr(Settings, name):
                    raise UsageError(f"--{name} needs --protocol matched: the paper's draws spans on words")
        if self.span_unit != "token" and self.span_sampler != "self_information":
            raise UsageError(f"--span_unit {self.span_unit} needs --span_sampler self_information")
        if self.spacy_model is not None and self.span_unit == "token":
            raise UsageError("--spacy_model needs --span_unit phrase or sentence")
        if self.documents != "auto" and not (self.isolate_documents or self.position_ids_by_document):
            raise UsageError(f"--documents {self.documents} needs --isolate_documents or --position_ids_by_document")
        if self.method == "kv_compression" and self.max_span_length <= self.cr_tokens:
            raise UsageError(
                f"--max_span_length {self.max_span_length} must be above --cr_tokens {self.cr_tokens}: a span leaves "
                "as many entries as it has <CR>"
            )

    def checkpoint_interval(self, steps_per_epoch: int = 1) -> tuple[int | None, float | None]:
        """The steps or the minutes between checkpoints; neither if the setting is neither."""
        text = str(self.checkpointing_steps)
        if text == "epoch":
            return steps_per_epoch, None
        try:
            if text.endswith("m"):
                minutes = float(text[:-1])
                return None, minutes if 0 <= minutes < float("inf") else None
            return (int(text), None) if int(text) > 0 else (None, None)
        except ValueError:
            return None, None

    def span_plan(self) -> "SpanPlan":
        """How this run draws spans."""
        from kv_compression.methods import METHODS
        from kv_compression.spans.plan import SpanPlan

        return SpanPlan(
            METHODS[self.method].uses_sentinels,
            self.bound_ratio,
            self.max_span_length,
            self.seed,
            self.span_sampler,
            self.sink_tokens,
            self.recent_tokens,
            self.cr_tokens,
        )

    def rule(self, cl_id: int, cr_id: int) -> "Rule":
        """The method's rule for these sentinels."""
        from kv_compression.methods import METHODS

        method, settings = METHODS[self.method], asdict(self)
        given = {"cl_id": cl_id, "cr_id": cr_id, "ratio": self.bound_ratio}
        options = {field.name: settings[field.name] for field in fields(method) if field.name in settings}
        return method(**options | given)


def _is_of_type(value, kind: type | UnionType) -> bool:
    """Whether a setting's value, which a file may have told, is of its type; text has to be Unicode."""
    kinds = [get_origin(one) or one for one in get_args(kind) or (kind,)]
    if isinstance(value, list | tuple):
        return tuple in kinds and all(_is_of_type(item, str) for item in value)
    if isinstance(value, str):
        return str in kinds and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return type(value) in kinds or (type(value) is int and float in kinds)


@cache
def _identity_of(path: str | None) -> str | None:
    """A file's name and the beginning of its SHA-256, the name alone if it cannot be read."""
    if path is None:
        return None
    name = file_name(Path(path).name)
    try:
        with open(path, "rb") as file:
            return f"{name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError:
        return name


_LEAST = {
    "block_size": 2,
    "max_span_length": 2,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "num_warmup_steps": 0,
    "max_eval_blocks": 1,
    "r": 1,
    "checkpoints_to_keep": 1,
    "seed": 0,
    "sink_tokens": 0,
    "recent_tokens": 0,
    "cr_tokens": 1,
    "distill_weight": 0,
    "sentinel_learning_rate": 0,
}

_NOT_OF_THE_RESULT = {
    *("output_dir", "preprocessing_num_workers", "preset_reason", "skip_untrained"),
    *("checkpointing_steps", "checkpoints_to_keep", "compile", "gradient_checkpointing"),
}
OF_KV_COMPRESSION = (
    "recipe",
    "span_sampler",
    "span_unit",
    "spacy_model",
    "sink_tokens",
    "cr_tokens",
    "cr_visibility",
    "recent_tokens",
    "sentinel_learning_rate",
)
# Those of transformers that need nothing but the steps of warm-up and the steps in all.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
LR_SCHEDULERS += ("inverse_sqrt",)
POLYNOMIAL_END = 1e-7  # where transformers' polynomial decay ends


def _choices() -> dict[str, Collection[str]]:
    """What settings that are words may be."""
    from kv_compression.spans.exact import SPAN_SAMPLERS, UNITS

    return {
        "protocol": ("paper", "matched"),
        "lr_scheduler_type": LR_SCHEDULERS,
        "span_sampler": SPAN_SAMPLERS,
        "span_unit": UNITS,
        "cr_visibility": ("span", "context"),
        "recipe": ("paper", "best"),
        "documents": DOCUMENTS,
        "attn_implementation": ("grouped", "sdpa", "flex_attention", "sorted_flex_attention", "eager"),
        "mixed_precision": ("no", "bf16"),
    }


BEST_SINKS, BEST_SENTINEL_RATE = 1, 20


def best_recipe(settings: Settings, chosen: Collection[str]) -> Settings:
    """KV compression with the options that worked best here, but for those whose names are `chosen` already.

    One sink, the widest recent window that leaves room for the spans, and sentinels that learn 20 times as fast as
    the rest. (This project.)
    """
    from kv_compression.spans.exact import widest_window

    options = {"sink_tokens": BEST_SINKS, "sentinel_learning_rate": BEST_SENTINEL_RATE * settings.learning_rate}
    settings = replace(settings, **{name: value for name, value in options.items() if name not in chosen})
    if "recent_tokens" not in chosen and settings.bound_ratio:
        shape = (settings.max_span_length, settings.cr_tokens, settings.sink_tokens)
        settings = replace(settings, recent_tokens=widest_window(settings.block_size, settings.bound_ratio, *shape))
    return settings


PRESETS: dict[str, dict] = {
    "paper": {},
    "embedded": {
        "model_name_or_path": EMBEDDED,
        "dataset_name": EMBEDDED,
        "dataset_config_name": None,
        "protocol": "matched",
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_train_steps": 16,
        "max_eval_blocks": 24,
    },
}


def choose_preset(asked: str) -> tuple[str, str]:
    """The preset that runs, and why: `auto` is `paper` where a CUDA GPU has the memory for it."""
    if asked != "auto":
        return asked, "asked for"
    import torch

    if not torch.cuda.is_available():
        return "embedded", "no CUDA GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    gpu = f"the GPU has {memory / GIB:.0f} GiB, RedPajama-3B needs {PAPER_MEMORY / GIB:.0f} GiB"
    return ("paper" if memory >= PAPER_MEMORY else "embedded"), gpu


def has_bf16() -> bool:
    """Whether this machine computes in bf16: a CUDA GPU or a CPU that reports it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(cpu())


def fitting_this_machine() -> dict[str, str]:
    """The values of the settings that are left to the machine."""
    import torch

    return {
        "mixed_precision": "bf16" if has_bf16() else "no",
        "attn_implementation": "sdpa" if torch.cuda.is_available() else "grouped",
    }


def resolve(explicit: dict) -> Settings:
    """Settings from the flags that were given (by name; `preset`, `mixed_precision` and
    `attn_implementation` may be "auto").

    Raises UsageError for values that cannot be.
    """
    given = {name: value for name, value in explicit.items() if value is not None}
    preset, reason = choose_preset(given.pop("preset", "auto"))
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: choose from auto, {', '.join(PRESETS)}")
    chosen = {"preset": preset, "preset_reason": reason} | PRESETS[preset]
    files = [name for name in ("train_file", "validation_file", "test_file") if name in given]
    if files and "dataset_name" in given:
        raise UsageError(f"give either --dataset_name or --{files[0]}, not both")
    if files:
        chosen |= {"dataset_name": None, "dataset_config_name": None}
    elif "dataset_name" in given:
        chosen |= {"dataset_config_name": None}
    chosen |= given
    left = [name for name in ("mixed_precision", "attn_implementation") if chosen.get(name, "auto") == "auto"]
    automatic = fitting_this_machine() if left or not chosen.get("output_dir") else {}
    chosen |= {name: value for name, value in automatic.items() if chosen.get(name, "auto") == "auto"}
    # The published code draws spans once, before training.
    if chosen.get("protocol", Settings.protocol) == "paper":
        chosen["fixed_spans"] = True
    if not chosen.get("output_dir"):
        plain = {field.name: field.default for field in fields(Settings)} | PRESETS[preset] | automatic
        chosen["output_dir"] = default_output_dir(chosen, given, plain)
    unknown = set(chosen) - {field.name for field in fields(Settings)}
    assert not unknown, unknown
    settings = Settings(**chosen)
    settings.check()
    if settings.span_unit != "token":
        from kv_compression.spans.self_information import find_spacy_model

        settings = replace(settings, spacy_model=find_spacy_model(settings.span_unit, settings.spacy_model))
    if settings.protocol == "paper":  # without accumulation both schedules are the same
        settings = replace(settings, published_schedule=settings.gradient_accumulation_steps > 1)
    if settings.recipe == "best" and settings.method == "kv_compression":
        settings = best_recipe(settings, given)
        settings.check()
    return settings


def check_flags(explicit: dict) -> None:
    """Raise the UsageError of `resolve` if it would on any machine. Asks no machine, and so loads no torch."""
    anywhere = {"mixed_precision": "no", "attn_implementation": "sdpa", "output_dir": "output"}
    given = {name: value for name, value in explicit.items() if value is not None}
    given |= {name: value for name, value in anywhere.items() if given.get(name, "auto") == "auto"}
    asked = given.get("preset", "auto")
    presets = PRESETS if asked == "auto" else [asked]
    refused = []
    for preset in presets:
        try:
            resolve(given | {"preset": preset})
        except UsageError as error:
            refused.append(error)
    if len(refused) == len(presets):
        raise refused[-1]


def default_output_dir(chosen: dict, given: dict, plain: dict) -> str:
    """`output/<preset>/<method>_<ratio>`, with all that the user has `given`, decides the result and is not `plain`."""
    protocol = chosen.get("protocol", Settings.protocol)
    name = f"{chosen.get('method', Settings.method)}_{chosen.get('bound_ratio', Settings.bound_ratio)}"
    if protocol != PRESETS[chosen["preset"]].get("protocol", Settings.protocol):
        name += f"_{protocol}"
    if chosen.get("seed", Settings.seed) != Settings.seed:
        name += f"_seed{chosen['seed']}"
    if chosen.get("eval_only"):
        name += "_untrained"
    unnamed = {"method", "bound_ratio", "protocol", "seed", "eval_only", "num_processes", *_NOT_OF_THE_RESULT}
    unnamed |= {"fixed_spans"} if protocol == "paper" else set()
    for option in plain:  # in one order, whatever that of the flags
        if option in given and option not in unnamed and given[option] not in (plain[option], "auto"):
            name += f"_{_as_name(option, given[option])}"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"output/{chosen['preset']}/{name}"


_LONGEST_NAME = 150


def _as_name(option: str, value) -> str:
    """A setting as a part of a folder's name: a file by its stem, a model or a dataset by the last part of its name."""
    if option == "recipe":
        return str(value)
    if value is True:
        return option
    short = re.sub("^(per_device|num|max)_|_(name_or_path|name|file|size|type)$", "", option)
    if option.endswith("_file"):
        value = Path(str(value)).stem or value
    elif option in ("model_name_or_path", "dataset_name"):
        value = Path(str(value)).name or value
    elif isinstance(value, list | tuple):
        value = "-".join(map(str, value))
    return f"{short}-{file_name(str(value))}"


# How texts become scores. Scores that were made otherwise are made again, and compare with no others.
CONVENTION = "stripped texts, Unicode words"


class ScorerModels(NamedTuple):
    """The models that continuations are scored with; the encoder's `layer` is None where bert-score knows the best."""

    bertscore: str
    layer: int | None
    fluency: str

    def record(self) -> dict:
        """What scores are made with, as scores.json holds it."""
        models = {"bertscore_model": self.bertscore, "bertscore_layer": self.layer, "fluency_model": self.fluency}
        return models | {"convention": CONVENTION}


SCORERS = {
    "paper": ScorerModels("roberta-large", None, "EleutherAI/pythia-1b"),
    "embedded": ScorerModels(EMBEDDED, 6, EMBEDDED),
}


def scorers(preset: str, bertscore: str | None, fluency: str | None, layer: int | None = None) -> ScorerModels:
    """A preset's scorers, with the models, or the encoder's `layer`, that are named in their place."""
    chosen = SCORERS.get(preset, SCORERS["embedded"])
    if bertscore:
        chosen = chosen._replace(bertscore=bertscore, layer=None)
    if layer is not None:
        chosen = chosen._replace(layer=layer)
    return chosen._replace(fluency=fluency) if fluency else chosen


def load_scorers(models: ScorerModels) -> tuple:
    """The models as `scoring.BertScorer` and `scoring.Fluency`, on this process's device. RunError if one is not
    to be had."""
    from kv_compression.generation import scoring
    from kv_compression.io import processes

    device = processes.state().device
    encoder = embedded_encoder() if models.bertscore == EMBEDDED else models.bertscore
    language_model = embedded_model() if models.fluency == EMBEDDED else models.fluency
    return scoring.BertScorer(encoder, models.layer, device), scoring.Fluency(language_model, device)
