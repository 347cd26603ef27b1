"""What generate_c4.py and eval_generation.py are asked for: flags, defaults, help and bounds from one definition.

Loads no torch: a wrong flag is refused at once.
"""

from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

from kv_compression.io import flags
from kv_compression.io.errors import UsageError
from kv_compression.io.flags import option
from kv_compression.methods import NAMES

REQUIRED = {"in_words": "required"}
OF_RUN = {"in_words": "that of the run"}


of_model, of_documents, of_text, of_work, of_scorers, of_output = (
    partial(option, group=group)
    for group in ("model", "documents", "continuations", "computation", "scoring models", "output")
)


@dataclass(frozen=True)
class GenerationRequest:
    """The flags of generate_c4.py. UsageError for values that no generation can have."""

    model_dir: str = of_model(MISSING, "the output folder of a run of run_clm.py", metavar="FOLDER", **REQUIRED)
    method: str | None = of_model(None, "which tokens see which", choices=NAMES, **OF_RUN)
    bound_ratio: float | None = of_model(
        None, "compression ratio: the share of keys to drop", least=0, below=1, **OF_RUN
    )
    docs_file: str | None = of_documents(
        None,
        "the documents: .jsonl, .json or .csv with a column text, or .txt",
        in_words="C4's English validation split; preset embedded: its test text",
        metavar="FILE",
    )
    num_documents: int = of_documents(200, "documents to continue", least=1)
    prefix_words: int = of_documents(128, "words of a document to read", least=1)
    continuation_words: int = of_text(64, "words to generate", least=1)
    num_continuations: int = of_text(8, "continuations of each document", least=1)
    top_p: float = of_text(
        0.9, "nucleus sampling: draw from the likeliest tokens with this probability in sum", above=0
    )
    max_span_length: int | None = of_model(
        None, "longest span: words in protocol paper, tokens in matched", least=2, **OF_RUN
    )
    compress_generated: bool = of_text(False, "keep to the ratio while text is generated, too")
    allow_eos: bool = of_text(False, "let a continuation end before its last word")
    batch_size: int = of_work(4, "documents at a time", least=1)
    seed: int = of_text(0, "seed of C4's order, of spans and of samples", least=0)
    mixed_precision: str = of_work(
        "auto", "bf16: compute in bfloat16; auto: if the hardware can", choices=("auto", "no", "bf16")
    )
    output_file: str | None = of_output(
        None, "where continuations go", in_words="<model_dir>/generation.jsonl", metavar="FILE"
    )
    overwrite: bool = of_output(False, "replace a file that other settings have made")

    def __post_init__(self):
        for one in fields(self):
            flags.check(one.name, getattr(self, one.name), one.type, one.metadata["about"])
        if self.top_p > 1:
            raise UsageError(f"--top_p must be at most 1, got {self.top_p}")
        if self.method == "full_attention" and self.bound_ratio:
            raise UsageError("full attention compresses nothing: leave out --bound_ratio")
        if self.output_file and not self.output_file.endswith(".jsonl"):
            raise UsageError(f"--output_file {self.output_file} must end in .jsonl")

    @property
    def path(self) -> Path:
        """The generation file."""
        return Path(self.output_file or Path(self.model_dir) / "generation.jsonl")


@dataclass(frozen=True)
class ScoringRequest:
    """The flags of eval_generation.py."""

    paths: tuple[str, ...] = option(("output",), "generation files, or folders to search", in_words="output")
    bertscore_model: str | None = of_scorers(
        None, "encoder for BERTScore", in_words="preset paper: roberta-large; embedded: all-MiniLM-L6-v2"
    )
    bertscore_layer: int | None = of_scorers(
        None, "which of its layers to compare", in_words="bert-score's choice; preset embedded: 6"
    )
    fluency_model: str | None = of_scorers(
        None, "language model for fluency", in_words="preset paper: EleutherAI/pythia-1b; embedded: SmolLM2-135M"
    )
    csv: str | None = of_output(
        None, "where the table goes as CSV", in_words="scores.csv in the first folder", metavar="FILE"
    )
    overwrite: bool = of_output(False, "score files again that have scores")

    def csv_path(self, files: list[Path]) -> Path:
        """The table's file, where these generation files are scored."""
        folder = next((Path(name) for name in self.paths if Path(name).is_dir()), files[0].parent)
        return Path(self.csv or folder / "scores.csv")
