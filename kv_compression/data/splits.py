"""The splits of a run, from the place that its settings name to blocks."""

from pathlib import Path

import torch
from torch import Tensor, nn

from kv_compression.data import embedded
from kv_compression.data.asking import Asking
from kv_compression.data.blocks import SPLITS, Blocks, cut_blocks, tokenize
from kv_compression.data.reading import load_file, load_hub_split
from kv_compression.io import processes
from kv_compression.io.errors import UsageError
from kv_compression.io.tensor_files import digest
from kv_compression.methods import METHODS, rule_of
from kv_compression.methods.rule import Rule
from kv_compression.model.vocabulary import add_sentinels
from kv_compression.settings import EMBEDDED, Settings
from kv_compression.spans.plan import plan_of
from kv_compression.spans.self_information import cached_self_information


def read_splits(
    settings: Settings, tokenizer, model: nn.Module | None, device: torch.device, revision: str | None = None
) -> tuple[Rule, dict[str, Blocks]]:
    """The method's rule and the blocks of every split; tokenizer and `model` get the sentinels if the method has any.

    `device` is where `model`, of this `revision`, computes self-information if the spans need it. UsageError if a split
    is missing, or too short, or the spans do not fit a block.
    """
    rows = load_rows(settings)
    uses_sentinels, plan = METHODS[settings.method].uses_sentinels, plan_of(settings)
    in_text = settings.protocol == "paper"
    # Sentinels in the text must be in the vocabulary before the text is tokenized. If there are none, the vocabulary
    # grows last: all methods then share one token stream, and the untouched model can be asked.
    cr_like = "." if settings.sentinel_init == "period" else None
    cl_id, cr_id = add_sentinels(tokenizer, model, cr_like) if uses_sentinels and in_text else (-1, -1)
    columns = {split: _columns(settings, texts, tokenizer, split) for split, texts in rows.items()}
    information = {}
    if plan.compress and plan.sampler == "self_information":
        identity = f"{settings.model_name_or_path} {revision or weights_digest(settings)} {model.dtype}"
        model.to(device)
        for split, column in columns.items():
            asked = (model, identity, column["input_ids"])
            information[split] = processes.main_first(cached_self_information, *asked)
    if uses_sentinels and not in_text:
        cl_id, cr_id = add_sentinels(tokenizer, model, cr_like)
    by_document = settings.isolate_documents or settings.position_ids_by_document
    splits = {
        split: Blocks(
            column["input_ids"],
            split,
            None if in_text else plan,
            cl_id,
            cr_id,
            documents=column["documents"] if by_document else None,
            information=information.get(split),
            unit_starts=column.get("unit_starts"),
            seed=settings.seed,
            asking=asking_of(settings, tokenizer) if split == "train" else None,
            answer_weight=settings.answer_weight,
        )
        for split, column in columns.items()
    }
    if (plan.compress and by_document and not in_text) or settings.fact_share:
        for blocks in splits.values():
            _check_blocks(blocks)
    return rule_of(settings, cl_id, cr_id), splits


def _columns(settings: Settings, texts, tokenizer, split: str) -> dict[str, Tensor]:
    """The blocks of a split as `cut_blocks` returns them; only the first `max_eval_blocks` of those to be scored."""
    plan = plan_of(settings) if settings.protocol == "paper" else None
    how = (plan, settings.preprocessing_num_workers, settings.span_unit, settings.spacy_model, settings.documents)
    stream = processes.main_first(tokenize, texts, tokenizer, split, *how)
    most = None if split == "train" else settings.max_eval_blocks
    return {name: column[:most] for name, column in cut_blocks(stream, settings.block_size, split).items()}


def asking_of(settings: Settings, tokenizer) -> Asking | None:
    """How the training blocks of a run ask for what they said, None if they do not."""
    shares = settings.echo_share, settings.fact_share
    return Asking(tokenizer, *shares) if any(shares) else None


def _check_blocks(blocks: Blocks) -> None:
    """Raise UsageError for the first block in which the share to remove does not fit its documents, or facts do not."""
    for index in range(len(blocks)):
        try:
            blocks[index]
        except ValueError as error:
            raise UsageError(f"block {index} of the {blocks.split} split: {error}") from error


def load_rows(settings: Settings) -> dict:
    """The rows of every split that the run needs. UsageError if the test split, or one to train on, is missing."""
    percentage = settings.validation_split_percentage
    wanted = [split for split in SPLITS if split != "train" or percentage or not settings.eval_only]
    rows = {split: found for split in wanted if (found := _load_split(settings, split)) is not None}
    for split in wanted:
        if split not in rows and split != "validation":
            source = settings.dataset_name or "the local files"
            raise UsageError(f"{source}: there is no {split} split; name one with --{split}_file")
    if percentage:
        rows |= split_off_validation(rows, percentage)
    if settings.eval_only:
        rows.pop("train", None)
    return rows


def _load_split(settings: Settings, split: str):
    """The rows of one split, None if there is no such split."""
    if settings.dataset_name is None:
        path = getattr(settings, f"{split}_file")
        return load_file(path, split) if path else None
    if settings.dataset_name == EMBEDDED:
        return embedded.embedded_text().get(split)
    return load_hub_split(settings.dataset_name, settings.dataset_config_name, split)


def split_off_validation(rows: dict, percentage: int) -> dict:
    """The first rows of the train split for validation and the rest for training, as the published scripts do.

    UsageError if there is a validation split already, or one part would be empty.
    """
    if "validation" in rows:
        raise UsageError("--validation_split_percentage: there is a validation split already")
    count, first = len(rows["train"]), round(percentage * len(rows["train"]) / 100)
    if not 0 < first < count:
        raise UsageError(f"--validation_split_percentage {percentage}: too few training rows ({count})")
    return {
        "validation": rows["train"].select(range(first)),
        "train": rows["train"].select(range(first, count)),
    }


def weights_digest(settings: Settings) -> str:
    """SHA-256 over the configuration and the weights in a local model's folder."""
    folder = Path(settings.model_name_or_path)
    found = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors", ".bin"))
    return digest(*(part for path in found for part in (path.name, path.read_bytes())))
