"""What generate_c4.py and eval_generation.py are asked for: flags, defaults, help and bounds from one definition.

Loads no torch: a wrong flag is refused at once.
"""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args

from kv_compression.io.errors import UsageError
from kv_compression.io.flags import ratio
from kv_compression.methods import NAMES


def flag(default, help: str, **how):
    """A field that is a flag; `how` is argparse's, `least` the smallest value allowed."""
    return field(default=default, metadata={"help": help, **how})


def add_flags(parser: argparse.ArgumentParser, request: type) -> None:
    """Give the parser a flag for every field of a request."""
    for each in fields(request):
        how = {name: value for name, value in each.metadata.items() if name != "least"}
        default = None if each.default is MISSING else each.default
        if each.type is bool:
            how["action"] = "store_true"
        elif "nargs" not in how:
            how = {"type": next(iter(get_args(each.type)), each.type), "required": each.default is MISSING} | how
            how["help"] += "" if default is None else f" ({default})"
        parser.add_argument(each.name if "nargs" in how else f"--{each.name}", default=default, **how)


@dataclass(frozen=True)
class GenerationRequest:
    """The flags of generate_c4.py. UsageError for values that no generation can have."""

    model_dir: str = flag(MISSING, "the output folder of a run of run_clm.py")
    method: str | None = flag(None, "whose rule the cache follows (the run's)", choices=NAMES)
    bound_ratio: float | None = flag(None, "compression ratio, from 0 to below 1 (the run's)", type=ratio)
    docs_file: str | None = flag(
        None, ".jsonl, .json, .csv or .txt with the documents (C4's English validation split; embedded: its test text)"
    )
    num_documents: int = flag(200, "how many documents to continue", least=1)
    prefix_words: int = flag(128, "words of a document to read", least=1)
    continuation_words: int = flag(64, "words to generate", least=1)
    num_continuations: int = flag(8, "continuations of each document", least=1)
    top_p: float = flag(0.9, "nucleus sampling draws from the likeliest tokens that have this share of probability")
    max_span_length: int | None = flag(None, "longest span, in words (paper) or tokens (the run's)", least=2)
    compress_generated: bool = flag(False, "keep to the ratio while text is generated, too")
    allow_eos: bool = flag(False, "let a continuation end before its last word")
    batch_size: int = flag(4, "documents at a time", least=1)
    seed: int = flag(0, "of C4's order, spans and samples", least=0)
    mixed_precision: str = flag("auto", "precision of the model", choices=["auto", "no", "bf16"])
    output_file: str | None = flag(None, "where continuations go (<model_dir>/generation.jsonl)")
    overwrite: bool = flag(False, "replace a file that other settings have made")

    def __post_init__(self):
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata.get("least")
            if None not in (value, least) and value < least:
                raise UsageError(f"--{each.name} must be at least {least}, got {value}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed >= 2**32:
            raise UsageError(f"--seed must be below 2^32, got {self.seed}")
        if self.method == "full_attention" and self.bound_ratio:
            raise UsageError("full attention compresses nothing: leave --bound_ratio away")
        if self.output_file and not self.output_file.endswith(".jsonl"):
            raise UsageError(f"--output_file {self.output_file} must end in .jsonl")

    @property
    def path(self) -> Path:
        """The generation file."""
        return Path(self.output_file or Path(self.model_dir) / "generation.jsonl")


@dataclass(frozen=True)
class ScoringRequest:
    """The flags of eval_generation.py."""

    paths: tuple[str, ...] = flag(("output",), "generation files, or folders to search (output)", nargs="*")
    bertscore_model: str | None = flag(None, "encoder for BERTScore (paper: roberta-large; embedded: all-MiniLM-L6-v2)")
    bertscore_layer: int | None = flag(None, "which of its layers to compare (bert-score's choice; embedded: 6)")
    fluency_model: str | None = flag(
        None, "language model for fluency (paper: EleutherAI/pythia-1b; embedded: SmolLM2-135M)"
    )
    csv: str | None = flag(None, "where the table goes as CSV (scores.csv in the first folder)")
    overwrite: bool = flag(False, "score files again that have scores")

    def csv_path(self, files: list[Path]) -> Path:
        """The table's file, where these generation files are scored."""
        folder = next((Path(name) for name in self.paths if Path(name).is_dir()), files[0].parent)
        return Path(self.csv or folder / "scores.csv")
