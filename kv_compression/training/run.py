"""One run of claim 1, from settings to results.json: load, attach, evaluate, fine-tune, evaluate, save."""

import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import accelerate
import torch
import transformers

from kv_compression.data.blocks import Blocks
from kv_compression.data.embedded import EMBEDDED_BASE
from kv_compression.data.splits import read_splits
from kv_compression.io import processes
from kv_compression.io.machine import commit_of_project
from kv_compression.io.results import RESULTS, adapter_at, write_json
from kv_compression.methods.rule import Rule
from kv_compression.model.attention import Patch
from kv_compression.model.lora import LORA_ALPHA, LORA_DROPOUT, add_lora, lora_targets
from kv_compression.settings import EMBEDDED, Settings
from kv_compression.training import run_folder
from kv_compression.training.checkpoints import Checkpoint, Checkpoints, trained
from kv_compression.training.evaluation import evaluate
from kv_compression.training.loading import check_length, load_adapter, load_model
from kv_compression.training.loop import OPTIMIZER, Prepared, prepare, train
from kv_compression.training.scalars import Scalars
from kv_compression.training.schedule import Schedule

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def run(
    settings: Settings,
    resume: bool = False,
    source: Path | None = None,
    write_card: Callable[[Path, dict], None] | None = None,
) -> dict:
    """Carry out a run and return the content of its results.json.

    With `resume` it continues from its newest checkpoint, if it has one, or from the newest of the run in the folder
    `source`. Otherwise what an earlier run has written in the output folder is removed, once model and data are loaded.
    `write_card` is called when the results are on disk (`run_folder.finish`). RunError if another process works in the
    output folder.
    """
    folder = Path(settings.output_dir)
    with run_folder.only_run_in(folder):
        start, commit = time.perf_counter(), commit_of_project()  # before anybody can check out another
        loaded = load(settings)
        accelerator = loaded.accelerator
        schedule = Schedule(settings, len(loaded.splits.get("train", ())), accelerator.num_processes)
        checkpoints = run_folder.checkpoints_of(settings, schedule.steps_per_epoch)
        checkpoint = run_folder.read_checkpoint(replace(checkpoints, folder=source or folder)) if resume else None
        if accelerator.is_main_process:
            if checkpoint is None or source is not None:
                run_folder.clear(folder)
            run_folder.log_to(folder / run_folder.LOG)
        accelerator.wait_for_everyone()
        log.info("preset %s: %s; %s", settings.preset, settings.preset_reason, settings.identity())
        writer = Scalars(folder / "tensorboard") if accelerator.is_main_process else None
        untrained = processes.on_main(run_folder.read_untrained, source or folder) if checkpoint else None
        measured = score_and_train(loaded, untrained, writer, checkpoints, checkpoint)
        results = measured | {"wall_seconds": time.perf_counter() - start} | description(loaded) | {"commit": commit}
        model = loaded.prepared.model
        weights = trained(model)
        if accelerator.is_main_process:
            if settings.model_name_or_path == EMBEDDED:  # its folder in this user's cache means nothing to others
                model.peft_config["default"].base_model_name_or_path = EMBEDDED_BASE
            run_folder.save_model(model, loaded.tokenizer, folder, weights)
            write_json(folder / RESULTS, results)  # the run is finished: all that follows can be repeated
            run_folder.finish(settings, results, write_card, writer)
        return results


@dataclass
class Loaded:
    """Everything a run works with, loaded into memory."""

    settings: Settings
    accelerator: accelerate.Accelerator
    tokenizer: transformers.PreTrainedTokenizerBase
    revision: str | None
    targets: list[str]
    prepared: Prepared
    rule: Rule
    splits: dict[str, Blocks]


def load(settings: Settings) -> Loaded:
    """The model with its adapter, the method's rule and the blocks of all splits."""
    processes.load_whole_models()
    transformers.set_seed(settings.seed)
    accelerator = processes.accelerator(settings.mixed_precision)
    tokenizer, model, revision = load_model(settings)
    check_length(model, settings.block_size)
    targets = lora_targets(model, settings.lora_target_modules)
    rule, splits = read_splits(settings, tokenizer, model, accelerator.device, revision)
    sentinel_ids = (rule.cl_id, rule.cr_id) if rule.uses_sentinels else ()
    model = add_lora(model, targets, settings.r, sentinel_ids)
    if settings.model_dir:
        load_adapter(model, settings.model_dir)
    prepared = prepare(model, accelerator, settings)
    return Loaded(settings, accelerator, tokenizer, revision, targets, prepared, rule, splits)


def score_and_train(
    loaded: Loaded,
    untrained: dict | None,
    writer: Scalars | None,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
) -> dict:
    """Score the model before training, train it, and score it again; returns the measured part of results.json.

    `untrained` holds the scores before training if an interrupted run has left them. With `eval_only` there is no
    training, with `skip_untrained` no score before it.
    """
    settings, accelerator, prepared = loaded.settings, loaded.accelerator, loaded.prepared
    rule, splits = loaded.rule, loaded.splits

    def score(split: str, note: str) -> dict:
        options = {"batch_size": settings.per_device_eval_batch_size, "protocol": settings.protocol, "note": note}
        scores = evaluate(prepared.token_losses, splits[split], rule, accelerator, **options)
        log.info("%s: %s", note, scores)
        return asdict(scores)

    def keep_adapter(step: int) -> None:
        weights = trained(prepared.model)
        if accelerator.is_main_process:
            run_folder.save_adapter(prepared.model, Path(settings.output_dir), weights, adapter_at(step))

    report = None
    with Patch(prepared.model, rule) as patch:
        if untrained is None and not (settings.eval_only or settings.skip_untrained):
            untrained = score("test", "test split, untrained")
            if accelerator.is_main_process:
                write_json(Path(settings.output_dir) / run_folder.UNTRAINED, untrained)
        if not settings.eval_only:
            written = (writer, checkpoints, checkpoint, keep_adapter)
            report = train(prepared, splits["train"], patch, accelerator, settings, *written)
        # The test split last: train.log ends with its perplexity.
        scores = {split: score(split, f"{split} split") for split in ("validation", "test") if split in splits}
    return {
        "method": settings.method,
        "bound_ratio": settings.bound_ratio,
        "protocol": settings.protocol,
        "preset": settings.preset,
        "preset_reason": settings.preset_reason,
        "seed": settings.seed,
        "eval_only": settings.eval_only,
        **{name: value for name, value in scores["test"].items() if name != "seconds"},
        "validation": scores.get("validation"),
        "untrained": scores["test"] if settings.eval_only else untrained,
        "training": asdict(report) if report else None,
        "tokens_per_second": report.tokens_per_second if report else None,
    }


def description(loaded: Loaded) -> dict:
    """What a run was made with: the rest of results.json."""
    settings, rule, model = loaded.settings, loaded.rule, loaded.prepared.model
    return {
        "settings": settings.identity(),
        "lora_target_modules": loaded.targets,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": LORA_DROPOUT,
        "optimizer": OPTIMIZER | {"weight_decay": settings.weight_decay},
        "model": settings.model_name_or_path,
        "model_revision": loaded.revision,
        "sentinels": {"cl_id": rule.cl_id, "cr_id": rule.cr_id} if rule.uses_sentinels else None,
        "blocks_sha256": {split: blocks.fingerprint() for split, blocks in loaded.splits.items()},
        "num_processes": loaded.accelerator.num_processes,
        "device": device_name(loaded.accelerator.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads or the name of the GPU."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
