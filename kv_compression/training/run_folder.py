"""The output folder of a run: what may be in it, who may write to it, and what a run leaves there."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path

import filelock
import peft
from torch import Tensor

from kv_compression.io import flags, ownership, processes, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.fields import is_measured
from kv_compression.io.results import RESULTS, read_results
from kv_compression.settings import Settings
from kv_compression.training.checkpoints import FOLDER, Checkpoint, Checkpoints
from kv_compression.training.evaluation import Evaluation
from kv_compression.training.scalars import Scalars

log = logging.getLogger(__name__)

LOCK, LOG, UNTRAINED = "run.lock", "train.log", "untrained.json"


def finished(settings: Settings, overwrite: bool, resume: bool = True) -> dict | None:
    """The results in the output folder if they are of these very settings, else None.

    UsageError if the folder holds a run of other settings, unless `overwrite`; files that no run has written, or that
    were changed since; or, without `resume`, checkpoints that a new run would replace.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file")
    results = None if overwrite else _results_in(folder)
    differing = "" if results is None else differences(results["settings"], settings.identity())
    if results is not None and not differing:
        return results
    found = [f"results of other settings ({differing})"] if differing else []
    foreign = list(islice(ownership.others(folder, but={LOCK}), 3)) if folder.is_dir() else []
    if foreign:
        found.append(f"files that no run has written there, or that were changed since ({', '.join(foreign)})")
    if found:
        instead = "move them away" if foreign else "replace them with --overwrite"
        raise UsageError(f"{folder} holds {' and '.join(found)}: choose another --output_dir, or {instead}")
    made = [] if overwrite else _made_from_a_run(folder)
    if made:
        raise UsageError(
            f"{folder} holds what was made from an earlier run ({', '.join(made[:3])}): choose another --output_dir, "
            "or replace it with --overwrite"
        )
    step = None if resume or overwrite else checkpoints_of(settings).newest_step()
    if step is not None:
        raise UsageError(
            f"{folder} holds a run that stopped after step {step} or later: --resume_from_checkpoint resumes it, "
            "--overwrite starts again"
        )
    return None


def _results_in(folder: Path) -> dict | None:
    """The results in an output folder, None if there are none. UsageError if no run has written its results.json."""
    try:
        results = read_results(folder)
    except RunError as error:
        raise UsageError(f"{error}: choose another --output_dir, or move it away") from error
    if results is not None and "export" in results:
        raise UsageError(f"{folder} holds an exported model: choose another --output_dir")
    return results


def _made_from_a_run(folder: Path) -> list[str]:
    """What was made from a finished run whose results.json is gone: the files listed after it."""
    names = list(ownership.listed(folder))
    after = names[names.index(RESULTS) + 1 :] if RESULTS in names else []
    return [name for name in after if name != LOG and (folder / name).exists()]


def differences(old, new: dict) -> str:
    """The first settings that differ, "" if none does. A setting that is missing in `old` had its default."""
    old = _regardless_of_processes(Settings().identity() | (old if isinstance(old, dict) else {}))
    new = _regardless_of_processes(new)
    changed = [f"{name} {old.get(name)} there, {new.get(name)} here" for name in old if old[name] != new.get(name)]
    return "; ".join(changed[:3])


def _regardless_of_processes(identity: dict) -> dict:
    """An identity that does not depend on how many processes share a batch."""
    identity = dict(identity)
    shares = identity.pop("per_device_train_batch_size", None), identity.pop("num_processes", 1)
    trained = all(isinstance(share, int) for share in shares) and not identity.get("eval_only")
    return identity | {"blocks a micro-batch": shares[0] * shares[1] if trained else None}


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of an output folder, except those of the same launch.

    The lock goes with the process, however it ends. RunError if another holds it, or the folder cannot be written.
    """
    main = processes.state().is_main_process
    is_new = [path for path in (folder / LOCK, folder) if not path.exists()] if main else []
    lock = processes.run_everywhere(_lock, folder, here=main)
    try:
        yield
    finally:
        if lock is not None:
            if not (folder / ownership.LIST).exists():  # the run has written nothing
                with suppress(OSError):
                    for path in is_new:
                        path.rmdir() if path.is_dir() else path.unlink()
            lock.release()


def _lock(folder: Path) -> filelock.BaseFileLock:
    """The lock of an output folder, acquired; RunError as in `only_run_in`."""
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
        reason = error.strerror or error
        log.warning("%s cannot be locked (%s): make sure that no other run works there", folder, reason)
    return lock


def checkpoints_of(settings: Settings, steps_per_epoch: int = 1) -> Checkpoints:
    """The checkpoints of a run with these settings."""
    steps, minutes = flags.interval(settings.checkpointing_steps, steps_per_epoch)
    identity, defaults = (_regardless_of_processes(one.identity()) for one in (settings, Settings()))
    return Checkpoints(Path(settings.output_dir), identity, steps, minutes, settings.checkpoints_to_keep, defaults)


def other_run(asked: str, output_dir: str) -> Path | None:
    """The folder of the run named by --resume_from_checkpoint, None if it is the output folder itself.

    UsageError if it has no checkpoint.
    """
    folder = Path(asked)
    folder = folder.parent if folder.name == FOLDER else folder
    if folder.resolve() == Path(output_dir).resolve():
        return None
    if Checkpoints(folder, {}).newest_step() is None:
        raise UsageError(f"--resume_from_checkpoint {asked}: no checkpoint is there; name the folder of a run")
    return folder


def read_checkpoint(checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint to resume from, None if there is none: the same one in every process."""
    newest = processes.run_everywhere(checkpoints.read, here=processes.state().is_main_process)
    step = processes.on_main(lambda: newest and newest.step)

    def same() -> Checkpoint | None:
        found = newest or (checkpoints.read(step) if step else None)
        if step and found is None:
            raise RunError(f"not every process can read the checkpoint of step {step}: they must share --output_dir")
        return found

    return processes.run_everywhere(same)


def read_untrained(folder: Path) -> dict | None:
    """The scores before fine-tuning that an interrupted run has left, None if there are none."""
    try:
        found = strict_json.read(folder / UNTRAINED)
    except (OSError, ValueError):
        return None
    names = {field.name for field in fields(Evaluation)}
    whole = isinstance(found, dict) and found.keys() == names and all(map(is_measured, found.values()))
    return found if whole else None


def clear(folder: Path) -> None:
    """Create `folder`, and remove what an earlier run has written there. RunError if the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ownership.remove(folder)
    except OSError as error:
        raise RunError(f"cannot write to --output_dir {folder}: {error.strerror or error}") from error


class _LogFile(logging.FileHandler):
    """A log that raises RunError if the disk refuses."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        raise RunError(f"cannot write {self.baseFilename}: {getattr(error, 'strerror', None) or error}") from error


def log_to(path: Path) -> None:
    """Append the package's log to a file, a new one or the log of a run. RunError if the disk refuses."""
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


def save_model(model: peft.PeftModel, tokenizer, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter, and the tokenizer with its sentinels, to `folder`.

    `weights` are those of `checkpoints.trained`, by default the model's own. RunError if the disk refuses, UsageError
    if a file that no run has written is in the way.
    """
    if isinstance(tokenizer.chat_template, dict):  # anybody can name templates, and the names would become file names
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    save_adapter(model, folder, weights, tokenizer=tokenizer)


def save_adapter(
    model: peft.PeftModel, folder: Path, weights: dict[str, Tensor] | None, below: str = ".", tokenizer=None
) -> None:
    """Write the adapter, and the tokenizer if there is one, as files of `folder` in its sub-folder `below`."""
    staged = None
    try:
        staged = ownership.stage(folder)
        model.save_pretrained(staged / below, save_embedding_layers=False, state_dict=weights)
        (staged / below / "README.md").unlink(missing_ok=True)  # peft's; the card of the run comes with `finish`
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        ownership.move_in(staged, folder)
    except UsageError:
        raise
    except Exception as error:  # the savers raise whatever their writers do
        raise RunError(f"cannot save the adapter in {folder}: {one_line(error)}") from error
    finally:
        if staged:
            shutil.rmtree(staged, ignore_errors=True)


def finish(
    settings: Settings,
    results: dict,
    write_card: Callable[[Path, dict], None] | None = None,
    writer: Scalars | None = None,
) -> None:
    """What is left to do once results.json is on disk: the last figures, the card, and removing temporary files.

    `write_card(folder, results)` writes the model card if it is missing. If anything fails, a line on stderr says so:
    the results are safe, and the same command tries again.
    """
    folder = Path(settings.output_dir)
    try:
        if writer is not None:
            step = (results["training"] or {"steps": 0})["steps"]
            for split, scores in (("test", results), ("validation", results["validation"])):
                if scores:
                    writer.add(f"{split}/perplexity", scores["perplexity"], step)
            writer.flush()
        if write_card is not None:
            write_card(folder, results)
        checkpoints_of(settings).clear()
        ownership.remove(folder, lambda name: name == UNTRAINED or ownership.is_partial(name))
        if ownership.LOG in ownership.listed(folder).get(LOG, ()):
            ownership.announce(folder, {LOG: ownership.sha256((folder / LOG).read_bytes())})
    except Exception as error:  # huggingface_hub can raise anything
        line = f"warning: the run is finished, but {one_line(error)}: the same command tries again"
        print(line, file=sys.stderr, flush=True)
