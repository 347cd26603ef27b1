"""A sweep as a job array of slurm, submitted with submitit (https://github.com/facebookincubator/submitit).

A run that reaches its time limit or is preempted writes a checkpoint, is requeued and resumes; when a node fails, slurm
itself requeues the run. Nobody has run this on a real cluster: the tests use stand-ins for sbatch, srun, squeue and
scontrol with submitit's own code between them. Not tested: what slurm sends to which process of a job and when.
"""

import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from kv_compression.io import strict_json
from kv_compression.io.errors import ROOT, RunError, one_line
from kv_compression.io.results import write_json
from kv_compression.sweep.workers import GRACE, Busy, Task, Workers

FOLDER = "slurm"  # of submitit's files, in the sweep's folder
JOBS = "jobs.json"  # each run's latest job id
TIME = 240  # minutes that a job may take before it is requeued
TIMEOUTS = 50  # times that a job is requeued at its time limit
WARNING = int(GRACE) + 60  # seconds before that limit at which slurm warns the job


class OnNode:
    """What one slurm job does: the commands of one task. Pickled by submitit, called on a node."""

    def __init__(self, task: Task):
        self.task, self.workers = task, Workers()

    def __call__(self) -> None:
        """Run the commands. RunError if one fails."""
        for error in self.workers.run([self.task]).values():
            if not isinstance(error, Busy):
                raise error
            print(f"{self.task.name}: {error}", flush=True)

    def checkpoint(self):
        """What to requeue, called by submitit on slurm's warning: the same commands, once the run has its checkpoint.

        Every command skips what is done already and continues the rest.
        """
        from submitit.helpers import DelayedSubmission

        self.workers.stop()
        return DelayedSubmission(OnNode(self.task))


def submit(tasks: Iterable[Task], folder: Path, options: dict) -> None:
    """Submit the tasks that are not in slurm's queue as one job array, and print the job of each run.

    `options` are sbatch's, by name with underscores. RunError if submitit is not installed or slurm refuses.
    """
    executor = _executor(folder / FOLDER, options)
    path = folder / FOLDER / JOBS
    ids, queued, to_submit = _read(path), _queued(), []
    for task in tasks:
        if ids.get(task.name) in queued:
            print(f"{task.name}: is job {ids[task.name]} in slurm's queue")
        else:
            to_submit.append(task)
            if task.name in ids:
                print(f"{task.name}: job {ids[task.name]} ended before its work was done, see {task.log}")
    if not to_submit:
        return
    try:
        jobs = executor.submit_array([OnNode(task) for task in to_submit])
    except RuntimeError as error:
        raise RunError(f"slurm did not take the runs: {one_line(error)}") from error
    new = {task.name: job.job_id for task, job in zip(to_submit, jobs)}
    write_json(path, ids | new)
    for name, number in new.items():
        print(f"{name}: submitted as job {number}")
    print("the same command shows what is finished, and submits what has failed again")


def _executor(folder: Path, options: dict):
    """submitit's executor for these options. Options that it does not know go to sbatch unchanged."""
    submitit = _import_submitit()
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=TIMEOUTS)
    except RuntimeError as error:
        raise RunError("--slurm: there is no slurm on this machine (no srun on the PATH)") from error
    # Nodes import this package from where it is.
    setup = [f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    others = {"requeue": True}
    executor.update_parameters(job_name="kv_sweep", time=TIME, signal_delay_s=WARNING, setup=setup)
    for name, value in options.items():
        try:
            executor.update_parameters(**{name: value})
        except ValueError:
            others[name] = value
    executor.update_parameters(additional_parameters=others)
    return executor


def _import_submitit():
    """submitit, without what its import does to logging: it closes all handlers. RunError if it is not installed."""
    level = os.environ.pop("SUBMITIT_LOG_LEVEL", None)
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        import submitit
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise RunError("--slurm needs submitit: pip install submitit") from error
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]
        os.environ.update({} if level is None else {"SUBMITIT_LOG_LEVEL": level})
    return submitit


def _read(path: Path) -> dict[str, str]:
    """The job ids that earlier calls have written, by the name of the run; none if there is no such file."""
    try:
        return {name: number for name, number in strict_json.read(path).items() if isinstance(number, str)}
    except (OSError, ValueError, AttributeError):  # the last where it holds no object
        return {}


def _queued() -> set[str]:
    """The ids of the user's jobs that wait or run."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"squeue does not answer: {one_line(error)}") from error
    if done.returncode:
        raise RunError(f"squeue does not answer: {one_line(RuntimeError(done.stderr))}")
    return set(done.stdout.split())
