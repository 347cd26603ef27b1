"""What eval_recall.py is asked for: flags, defaults, help and bounds from one definition. Loads no torch."""

from dataclasses import dataclass, fields
from pathlib import Path

from kv_compression.io import flags
from kv_compression.io.errors import UsageError
from kv_compression.io.flags import option
from kv_compression.io.results import adapter_at
from kv_compression.methods import NAMES

TASKS = ("repeat", "passkey", "key_value", "variables", "copy", "ask_many")
OF_RUN = {"in_words": "that of the run"}


@dataclass(frozen=True)
class RecallRequest:
    """The flags of eval_recall.py. UsageError for values that no measurement can have."""

    model_dir: str | None = option(
        None, "the output folder of a run of run_clm.py", group="model", metavar="FOLDER", in_words="an untrained model"
    )
    step: int | None = option(
        None,
        "ask the adapter as it was after this step, if the run kept it (--adapter_steps)",
        group="model",
        least=1,
        in_words="the last",
    )
    model_name_or_path: str | None = option(
        None, "an untrained model: its name, its folder, or embedded", group="model", in_words="embedded"
    )
    method: str | None = option(None, "which tokens see which", group="method", choices=NAMES, **OF_RUN)
    ratios: tuple[str, ...] | None = option(
        None, "compression ratios: shares of keys to drop", group="method", metavar="X", **OF_RUN
    )
    sink_tokens: int | None = option(None, "first tokens that all later ones see", group="method", least=0, **OF_RUN)
    max_span_length: int | None = option(None, "longest span, in tokens", group="method", least=2, **OF_RUN)
    tasks: tuple[str, ...] = option(TASKS, "what to ask", group="questions", in_words=" ".join(TASKS))
    documents: int = option(20, "documents of each task, length and ratio", group="questions", least=5)
    lengths: tuple[str, ...] = option(
        ("256", "512", "1024"),
        "tokens of a document; all tasks but passkey take the first",
        group="questions",
        metavar="N",
        in_words="256 512 1024",
    )
    text_file: str | None = option(
        None,
        "text between the facts, none that was trained on: .jsonl, .json, .csv or .txt",
        group="questions",
        in_words="the embedded test text",
        metavar="FILE",
    )
    seed: int = option(0, "seed of documents, questions and spans", group="questions", least=0)
    batch_size: int = option(4, "documents at a time", group="computation", least=1)
    mixed_precision: str = option(
        "auto",
        "bf16: compute in bfloat16; auto: if the hardware can",
        group="computation",
        choices=("auto", "no", "bf16"),
    )
    output_dir: str | None = option(
        None, "where the answers go", group="output", in_words="<model_dir>", metavar="FOLDER"
    )
    overwrite: bool = option(False, "measure again what other settings have measured", group="output")

    def __post_init__(self):
        for one in fields(self):
            flags.check(one.name, getattr(self, one.name), one.type, one.metadata["about"])
        if self.model_dir and self.model_name_or_path:
            raise UsageError("give either --model_dir or --model_name_or_path, not both")
        if self.step and not self.model_dir:
            raise UsageError("--step needs --model_dir: an untrained model has no steps")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UsageError(f"--tasks {unknown[0]}: choose from {', '.join(TASKS)}")
        self.asked_lengths()
        self.asked_ratios(0.0)
        if self.model_dir is None and self.method is None:
            raise UsageError("an untrained model has no method: name one with --method, or a run with --model_dir")
        if self.model_dir is None and self.output_dir is None:
            raise UsageError("say where the answers go: --output_dir")
        if self.method == "full_attention" and any(self.asked_ratios(0.0)):
            raise UsageError("full attention compresses nothing: leave out --ratios")

    def asked_lengths(self) -> list[int]:
        """The documents' lengths in tokens. UsageError if one is no number or too small to say anything."""
        found = [_number("lengths", text, int) for text in self.lengths]
        if min(found) < 128:
            raise UsageError(f"--lengths must be at least 128, got {min(found)}")
        return found

    def asked_ratios(self, trained: float) -> list[float]:
        """The ratios to compress at, those of the run by default. UsageError if one is no ratio."""
        found = [trained] if self.ratios is None else [_number("ratios", text, float) for text in self.ratios]
        if wrong := [ratio for ratio in found if not 0 <= ratio < 1]:
            raise UsageError(f"--ratios must be at least 0 and below 1, got {wrong[0]}")
        return found

    @property
    def folder(self) -> Path:
        """Where the answers go."""
        return Path(self.output_dir or self.adapter or self.model_dir)

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that --step names."""
        return None if self.step is None else Path(self.model_dir) / adapter_at(self.step)


def _number(name: str, text: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"--{name} {text}: give {'whole ' if kind is int else ''}numbers") from None
