"""One run of claim 1, from settings to results.json: load, attach, evaluate, fine-tune, evaluate, save."""

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path

import filelock
import huggingface_hub
import peft
import torch
import transformers
from torch import nn

from kv_compression.data import embedded
from kv_compression.data.blocks import SPLITS, Blocks, cut_blocks, tokenize
from kv_compression.data.embedded import EMBEDDED_BASE
from kv_compression.data.reading import OFFLINE, load_file, load_hub_split
from kv_compression.io import ownership, processes, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.fields import is_measured
from kv_compression.io.hub import check_hub
from kv_compression.io.machine import commit_of_project
from kv_compression.io.results import RESULTS, read_results, results_of_run, write_json
from kv_compression.io.tensor_files import digest
from kv_compression.methods import METHODS, rule_of
from kv_compression.methods.rule import Rule
from kv_compression.model.attention import FLEX, SORTED_FLEX, compressed_attention
from kv_compression.model.loading import cast, merge_adapter, stored_dtype
from kv_compression.model.lora import LORA_ALPHA, LORA_DROPOUT, add_lora, lora_targets
from kv_compression.model.vocabulary import add_sentinels
from kv_compression.settings import EMBEDDED, Settings
from kv_compression.sharing.model_card import CARD, write_card
from kv_compression.spans.plan import plan_of
from kv_compression.spans.self_information import cached_self_information
from kv_compression.training.checkpoints import FOLDER, Checkpoint, Checkpoints
from kv_compression.training.evaluation import Evaluation, evaluate
from kv_compression.training.loop import OPTIMIZER, Schedule, prepare, train, trained
from kv_compression.training.scalars import Scalars

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def finished(settings: Settings, overwrite: bool, resume: bool = True) -> dict | None:
    """Results of the very same settings in the output folder, if there are any.

    Raises UsageError if the folder holds a run of other settings, unless `overwrite`; anything that no run has written,
    or that was changed since; or, without `resume`, checkpoints that a new run would replace.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file")
    results = None if overwrite else _results_in(folder)
    differing = "" if results is None else _differences(results["settings"], settings.identity())
    if results is not None and not differing:
        return results
    there = [f"results of other settings ({differing})"] if differing else []
    foreign = list(islice(ownership.others(folder, but={LOCK}), 3)) if folder.is_dir() else []
    if foreign:
        there.append(f"files that no run has written there, or that were changed since ({', '.join(foreign)})")
    if there:
        instead = "move them away" if foreign else "replace them with --overwrite"
        raise UsageError(f"{folder} holds {' and '.join(there)}: choose another --output_dir, or {instead}")
    made = [] if overwrite else _made_of_a_run(folder)
    if made:
        raise UsageError(
            f"{folder} holds what was made of an earlier run ({', '.join(made[:3])}): choose another --output_dir, or "
            "replace it with --overwrite"
        )
    step = None if resume or overwrite else checkpoints_of(settings).newest_step()
    if step is not None:
        raise UsageError(
            f"{folder} holds a run that was broken off after step {step} or later: --resume_from_checkpoint goes on, "
            "--overwrite starts again"
        )
    return None


LOCK, LOG, UNTRAINED = "run.lock", "train.log", "untrained.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def _results_in(folder: Path) -> dict | None:
    """`read_results` of an output folder. UsageError if its results.json is no run's."""
    try:
        results = read_results(folder)
    except RunError as error:
        raise UsageError(f"{error}: choose another --output_dir, or move it away") from error
    if results is not None and "export" in results:
        raise UsageError(f"{folder} holds an exported model: choose another --output_dir")
    return results


def _made_of_a_run(folder: Path) -> list[str]:
    """What was made of a finished run whose results.json is gone: the files that were listed after it."""
    names = list(ownership.listed(folder))
    after = names[names.index(RESULTS) + 1 :] if RESULTS in names else []
    return [name for name in after if name != LOG and (folder / name).exists()]


def _differences(old, new: dict) -> str:
    """The first settings that differ, "" if none does. What an older version did not know had its default."""
    old = Settings.regardless_of_processes(Settings().identity() | (old if isinstance(old, dict) else {}))
    new = Settings.regardless_of_processes(new)
    changed = [f"{name} {old.get(name)} there, {new.get(name)} here" for name in old if old[name] != new.get(name)]
    return "; ".join(changed[:3])


def run(settings: Settings, resume: bool = False, source: Path | None = None) -> dict:
    """Carry out a run and return what its results.json holds.

    What an earlier run has written in the output folder is removed once model and data are there, but with `resume` the
    run resumes from its newest checkpoint, if it has one, or from the newest of the run in another folder, `source`.
    RunError if another process works in the folder.
    """
    with only_run_in(Path(settings.output_dir)):
        return _run(settings, resume, source)


def other_run(asked: str, output_dir: str) -> Path | None:
    """The folder of the run that --resume_from_checkpoint names, None if it is the run's own; UsageError if it has no
    checkpoint."""
    folder = Path(asked)
    folder = folder.parent if folder.name == FOLDER else folder
    if folder.resolve() == Path(output_dir).resolve():
        return None
    if Checkpoints(folder, {}).newest_step() is None:
        raise UsageError(f"--resume_from_checkpoint {asked}: no checkpoint is there; name the folder of a run")
    return folder


def _run(settings: Settings, resume: bool, source: Path | None = None) -> dict:
    start = time.perf_counter()
    processes.load_whole_models()
    transformers.set_seed(settings.seed)
    accelerator = processes.accelerator(settings.mixed_precision)
    folder = Path(settings.output_dir)
    commit = commit_of_project()  # of the code that is running, whatever is checked out meanwhile
    tokenizer, model, revision = load_model(settings)
    check_length(model, settings.block_size)
    targets = lora_targets(model, settings.lora_target_modules)
    rule, splits = read_blocks(settings, tokenizer, model, accelerator, revision)
    trained_on = len(splits.get("train", ()))
    checkpoints = checkpoints_of(settings, Schedule(settings, trained_on, accelerator.num_processes).steps_per_epoch)
    checkpoint = read_checkpoint(replace(checkpoints, folder=source or folder)) if resume else None
    own = checkpoint is not None and source is None
    if accelerator.is_main_process:
        if not own:
            _clear(folder)
        _log_to(folder / LOG)
    accelerator.wait_for_everyone()
    log.info("preset %s: %s; %s", settings.preset, settings.preset_reason, settings.identity())
    sentinel_ids = (rule.cl_id, rule.cr_id) if rule.uses_sentinels else ()
    prepared = prepare(add_lora(model, targets, settings.r, sentinel_ids), accelerator, settings)
    model = prepared.model

    def score(split: str, note: str) -> dict:
        losses, blocks, size = prepared.token_losses, splits[split], settings.per_device_eval_batch_size
        score = evaluate(losses, blocks, rule, accelerator, batch_size=size, protocol=settings.protocol, note=note)
        log.info("%s: %s", note, score)
        return asdict(score)

    writer = Scalars(folder / "tensorboard") if accelerator.is_main_process else None
    with compressed_attention(model, rule=rule) as patch:
        untrained = processes.on_main(read_untrained, source or folder) if checkpoint else None
        if untrained is None and not (settings.eval_only or settings.skip_untrained):
            untrained = score("test", "test split, untrained")
            if accelerator.is_main_process:
                write_json(folder / UNTRAINED, untrained)
        report = None
        if not settings.eval_only:
            report = train(prepared, splits["train"], patch, accelerator, settings, writer, checkpoints, checkpoint)
        # The test split last: train.log ends with its perplexity.
        scores = {split: score(split, f"{split} split") for split in ("validation", "test") if split in splits}
        untrained = scores["test"] if settings.eval_only else untrained
    results = {
        "method": settings.method,
        "bound_ratio": settings.bound_ratio,
        "protocol": settings.protocol,
        "preset": settings.preset,
        "preset_reason": settings.preset_reason,
        "seed": settings.seed,
        "eval_only": settings.eval_only,
        **{name: value for name, value in scores["test"].items() if name != "seconds"},
        "validation": scores.get("validation"),
        "untrained": untrained,
        "training": asdict(report) if report else None,
        "tokens_per_second": report.tokens_per_second if report else None,
        "wall_seconds": time.perf_counter() - start,
        "settings": settings.identity(),
        "lora_target_modules": targets,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": LORA_DROPOUT,
        "optimizer": OPTIMIZER | {"weight_decay": settings.weight_decay},
        "model": settings.model_name_or_path,
        "model_revision": revision,
        "sentinels": {"cl_id": rule.cl_id, "cr_id": rule.cr_id} if rule.uses_sentinels else None,
        "blocks_sha256": {split: blocks.fingerprint() for split, blocks in splits.items()},
        "num_processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit,
    }
    weights = trained(model)
    if accelerator.is_main_process:
        if settings.model_name_or_path == EMBEDDED:  # its place in a cache folder means nothing elsewhere
            model.peft_config["default"].base_model_name_or_path = EMBEDDED_BASE
        save_model(model, tokenizer, folder, weights)
        write_json(folder / RESULTS, results)  # the run is finished: what follows can be made again
        finish(settings, results, writer)
    return results


def read_checkpoint(checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint to go on from, None if there is none: the same in every process, whatever files each sees."""
    newest = processes.run_everywhere(checkpoints.read, here=processes.state().is_main_process)
    step = processes.on_main(lambda: newest and newest.step)

    def same() -> Checkpoint | None:
        found = newest or (checkpoints.read(step) if step else None)
        if step and found is None:
            raise RunError(f"not every process can read the checkpoint of step {step}: they must share --output_dir")
        return found

    return processes.run_everywhere(same)


def finish(settings: Settings, results: dict, writer: Scalars | None = None) -> None:
    """What is left to do when the results are on disk: write the card, remove what was needed on the way.

    Whatever goes wrong is a line on stderr: the results are there, and the same command tries again.
    """
    folder = Path(settings.output_dir)
    try:
        if writer is not None:
            for split, scores in (("test", results), ("validation", results["validation"])):
                if scores:
                    step = (results["training"] or {"steps": 0})["steps"]
                    writer.add(f"{split}/perplexity", scores["perplexity"], step)
            writer.flush()
        if not (folder / CARD).exists():
            write_card(folder, results)
        checkpoints_of(settings).clear()
        ownership.remove(folder, lambda name: name == UNTRAINED or ownership.is_partial(name))
        if ownership.LOG in ownership.listed(folder).get(LOG, ()):
            ownership.announce(folder, {LOG: ownership.sha256((folder / LOG).read_bytes())})
    except Exception as error:  # a card is made by a library that raises what it likes
        line = f"warning: the run is finished, but {one_line(error)}: the same command tries again"
        print(line, file=sys.stderr, flush=True)


def save_model(model: peft.PeftModel, tokenizer, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter, and the tokenizer with its sentinels, to `folder`. RunError if the disk refuses.

    `weights` are what `training.trained` has gathered, the model's own by default. UsageError if another's file has the
    name of one of theirs.
    """
    if isinstance(tokenizer.chat_template, dict):  # their names, which are anybody's, would become names of files
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    staged = None
    try:
        staged = ownership.stage(folder)
        model.save_pretrained(staged, save_embedding_layers=False, state_dict=weights)
        (staged / CARD).unlink(missing_ok=True)  # peft's; `write_card` writes a better one
        tokenizer.save_pretrained(staged)
        ownership.move_in(staged, folder)
    except UsageError:
        raise
    except Exception as error:  # the savers raise whatever their writers do
        raise RunError(f"cannot save the adapter in {folder}: {one_line(error)}") from error
    finally:
        if staged:
            shutil.rmtree(staged, ignore_errors=True)


def checkpoints_of(settings: Settings, steps_per_epoch: int = 1) -> Checkpoints:
    """The checkpoints of a run with these settings."""
    steps, minutes = settings.checkpoint_interval(steps_per_epoch)
    identity, defaults = (Settings.regardless_of_processes(one.identity()) for one in (settings, Settings()))
    return Checkpoints(Path(settings.output_dir), identity, steps, minutes, settings.checkpoints_to_keep, defaults)


def read_untrained(folder: Path) -> dict | None:
    """The scores before fine-tuning that a run which was broken off has left, None if it has not."""
    try:
        found = strict_json.read(folder / UNTRAINED)
    except (OSError, ValueError):
        return None
    names = {field.name for field in fields(Evaluation)}
    whole = isinstance(found, dict) and found.keys() == names and all(map(is_measured, found.values()))
    return found if whole else None


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of an output folder, but not those of the same launch.

    The lock goes with the process, however it ends. RunError if another holds it, or the folder cannot be written.
    """
    main = processes.state().is_main_process
    is_new = [path for path in (folder / LOCK, folder) if not path.exists()] if main else []
    lock = processes.run_everywhere(_lock, folder, here=main)
    try:
        yield
    finally:
        if lock is not None:
            if not (folder / ownership.LIST).exists():  # nothing came of it
                with suppress(OSError):
                    for path in is_new:
                        path.rmdir() if path.is_dir() else path.unlink()
            lock.release()


def _lock(folder: Path) -> filelock.BaseFileLock:
    """A lock that no other process can have; RunError as in `only_run_in`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise RunError(f"cannot write to --output_dir {folder}: {error.strerror or error}") from error
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise RunError(f"another run is at work in {folder}: wait, or choose another --output_dir") from error
    except OSError as error:  # some network file systems have no locks
        log.warning(
            "%s cannot be locked (%s): see to it that no other run works there", folder, error.strerror or error
        )
    return lock


def load_model(
    settings: Settings, as_stored: bool = False
) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module, str | None]:
    """The tokenizer, the model (bf16 weights under bf16 autocast) and the model's revision.

    With `as_stored` weights are in the precision of their files, whatever the settings say, if `stored_dtype` knows it.
    """
    name = settings.model_name_or_path
    local = embedded.embedded_model() if name == EMBEDDED else name
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    for flag, place in (("model_name_or_path", local), ("tokenizer_name", settings.tokenizer_name or local)):
        if place.startswith(("/", ".", "~")) and not os.path.isdir(place):
            raise UsageError(f"--{flag} {place}: no such folder")
        if not os.path.isdir(place):
            check_hub(place, "model", f"{OFFLINE} with --{flag}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            settings.tokenizer_name or local, trust_remote_code=False
        )
        if as_stored:
            dtype = stored_dtype(Path(local) if os.path.isdir(local) else _snapshot(name))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            local, dtype=dtype, attn_implementation=settings.attn_implementation, trust_remote_code=False
        )
    except Exception as error:  # loaders raise whatever their parsers do
        raise RunError(f"the model {local} cannot be loaded: {one_line(error)}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if settings.tokenizer_name and len(tokenizer) > rows:
        raise UsageError(f"--tokenizer_name {settings.tokenizer_name}: {len(tokenizer)} tokens, the model has {rows}")
    attention = settings.attn_implementation
    if attention in (FLEX, SORTED_FLEX) and not torch.cuda.is_available() and not settings.eval_only:
        raise UsageError(f"{attention} cannot train on a CPU: use --attn_implementation sdpa")
    if name == EMBEDDED:
        return tokenizer, model, embedded.embedded_revision()
    snapshot = None if os.path.isdir(local) else _snapshot(name)
    return tokenizer, model, snapshot and snapshot.name


def _snapshot(name: str) -> Path | None:
    """Where a hub model lies in the hub's cache, in a folder named by its commit, if it has been loaded."""
    path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(path).parent if isinstance(path, str) else None


def load_run(folder: str, mixed_precision: str) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module, Settings]:
    """The tokenizer, the model with its adapter merged in and the settings of a finished run of run_clm.py.

    Merging happens in fp32, a layer at a time; under bf16 the merged weights are rounded once.
    """
    settings = recorded_settings(results_of_run(folder), folder)
    exact = replace(settings, mixed_precision="no", eval_only=True)
    tokenizer, model, _ = load_model(exact, as_stored=True)
    if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in model.buffers()):
        del model  # what it reckons with is to stay exact
        tokenizer, model, _ = load_model(exact)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            cast(embedding, torch.float32)  # new rows are means
    if METHODS[settings.method].uses_sentinels:
        add_sentinels(tokenizer, model)
    # Left to itself, peft looks for another file, which may be pickled, and then on the hub.
    for name in ADAPTER:
        if not (Path(folder) / name).is_file():
            raise RunError(f"the adapter in {folder} cannot be loaded: there is no {name}")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if type(config) is not peft.LoraConfig or config.megatron_config:  # which names a module to import
            raise ValueError("it is not of run_clm.py")
        model = peft.PeftModel.from_pretrained(model, folder, config=config)
        model = merge_adapter(model, torch.bfloat16 if mixed_precision == "bf16" else torch.float32).eval()
    except Exception as error:  # the loader raises whatever its parsers do
        raise RunError(f"the adapter in {folder} cannot be loaded: {one_line(error)}") from error
    return tokenizer, model, settings


def recorded_settings(results: dict, folder: str) -> Settings:
    """The settings of a finished run; RunError if they cannot be those of one."""
    names = {field.name for field in fields(Settings)}
    recorded = {name: value for name, value in results["settings"].items() if name in names}
    try:
        settings = Settings(**recorded)
        settings.check()
    except (TypeError, ValueError) as error:
        raise RunError(f"the settings in {folder}/results.json are damaged: {one_line(error)}") from error
    return settings


def check_length(model: nn.Module, block_size: int) -> None:
    """Raise UsageError if the model has fewer positions than a block has tokens."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise UsageError(f"--block_size {block_size} is longer than the model's {positions} positions")


def read_blocks(settings: Settings, tokenizer, model, accelerator, revision=None) -> tuple[Rule, dict[str, Blocks]]:
    """The method's rule, with its sentinels in tokenizer and model, and the blocks of every split there is."""
    method = METHODS[settings.method]
    percentage = settings.validation_split_percentage
    wanted = [split for split in SPLITS if split != "train" or percentage or not settings.eval_only]
    rows = {split: found for split in wanted if (found := load_rows(settings, split)) is not None}
    for split in set(wanted) - {"validation"}:
        if split not in rows:
            source = settings.dataset_name or "the local files"
            raise UsageError(f"{source}: there is no {split} split; name one with --{split}_file")
    if percentage:
        rows |= split_off_validation(rows, percentage)
    if settings.eval_only:
        rows.pop("train", None)
    plan = plan_of(settings)
    in_text = plan if settings.protocol == "paper" else None
    on_blocks = plan if settings.protocol == "matched" else None
    by_document = settings.isolate_documents or settings.position_ids_by_document
    informed = plan.compress and plan.sampler == "self_information"

    # Unless sentinels stand in the text the vocabulary grows last: so all methods share one token stream, and the
    # untouched model can be asked.
    cl_id = cr_id = -1
    if method.uses_sentinels and in_text:
        cl_id, cr_id = add_sentinels(tokenizer, model)
    blocks, information = {}, {}
    for split, texts in rows.items():
        how = (in_text, settings.preprocessing_num_workers, settings.span_unit, settings.spacy_model)
        stream = processes.main_first(tokenize, texts, tokenizer, split, *how, settings.documents)
        columns = cut_blocks(stream, settings.block_size, split)
        most = None if split == "train" else settings.max_eval_blocks
        blocks[split] = {name: column[:most] for name, column in columns.items()}
        if informed:
            identity = f"{settings.model_name_or_path} {revision or weights_digest(settings)} {model.dtype}"
            asked = (model.to(accelerator.device), identity, blocks[split]["input_ids"])
            information[split] = processes.main_first(cached_self_information, *asked)
    if method.uses_sentinels and not in_text:
        cl_id, cr_id = add_sentinels(tokenizer, model)
    splits = {
        split: Blocks(
            columns["input_ids"],
            split,
            on_blocks,
            cl_id,
            cr_id,
            documents=columns["documents"] if by_document else None,
            information=information.get(split),
            unit_starts=columns.get("unit_starts"),
        )
        for split, columns in blocks.items()
    }
    for blocks in splits.values() if on_blocks and plan.compress and by_document else ():
        try:
            for index in range(len(blocks)):
                blocks[index]
        except ValueError as error:
            raise UsageError(f"block {index} of the {blocks.split} split: {error}") from error
    return rule_of(settings, cl_id, cr_id), splits


def split_off_validation(rows: dict, percentage: int) -> dict:
    """The first rows of the train split as the validation split, the rest to train on, as the published scripts do.

    UsageError if there is a validation split already, or a part would be empty.
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
    """What a local model's folder holds: SHA-256 over its configuration and weights."""
    folder = Path(settings.model_name_or_path)
    found = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".safetensors", ".bin"))
    return digest(*(part for path in found for part in (path.name, path.read_bytes())))


def load_rows(settings: Settings, split: str):
    """The rows of one split from where the settings say, None if it is not there."""
    if settings.dataset_name is None:
        path = getattr(settings, f"{split}_file")
        return load_file(path, split) if path else None
    if settings.dataset_name == EMBEDDED:
        return embedded.embedded_text().get(split)
    return load_hub_split(settings.dataset_name, settings.dataset_config_name, split)


def device_name(device: torch.device) -> str:
    """The device in words, with the number of threads or the GPU's name."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _clear(folder: Path) -> None:
    """Make `folder`, and remove what an earlier run has written there. RunError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ownership.remove(folder)
    except OSError as error:
        raise RunError(f"cannot write to --output_dir {folder}: {error.strerror or error}") from error


class _LogFile(logging.FileHandler):
    """A log whose disk must not refuse: RunError if it does."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        raise RunError(f"cannot write {self.baseFilename}: {getattr(error, 'strerror', None) or error}") from error


def _log_to(path: Path) -> None:
    """Write the package's log to the end of a file, a new one or a run's."""
    try:
        if ownership.LOG not in ownership.listed(path.parent).get(path.name, ()):
            ownership.check([path])
            ownership.announce(path.parent, {path.name: ownership.LOG})
        handler = _LogFile(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger("kv_compression")
    for old in package.handlers[:]:
        package.removeHandler(old)
        old.close()
    package.addHandler(handler)
    package.setLevel(logging.INFO)
