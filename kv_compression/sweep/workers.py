"""Commands in processes of this machine: one task after another, or several at a time.

Plain subprocesses, not submitit's local executor: it kills a job one second after Ctrl-C, before a checkpoint is
written, starts all jobs at once, hides the GPUs by default and puts a time limit on every job.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import filelock

from kv_compression.io.errors import RunError
from kv_compression.io.processes import END_WITH_PARENT

POLL = 0.1  # seconds between looks at what is running
GRACE = 90.0  # seconds for a command to end after SIGTERM: a run finishes its step and writes a checkpoint
LOCKS_ITSELF = "run_clm.py"  # holds its run's lock while it works


class Task(NamedTuple):
    """Commands to run one after another for one run of a sweep, the run's lock file, and where their output goes."""

    name: str
    commands: list[list[str]]
    lock: Path
    log: Path


class Busy(RunError):
    """Another process works on this run."""

    def __init__(self):
        super().__init__("another process is working on this run, skipped here")


class Workers:
    """Carries out tasks, `count` at a time.

    With one at a time, its output is shown as well as logged. With several, each gets one of the GPUs in turn or,
    without GPUs, a share of the CPU's cores, unless the user has set OMP_NUM_THREADS.
    """

    def __init__(self, count: int = 1):
        self.count = count
        self.children: dict[int, subprocess.Popen] = {}

    def run(self, tasks: Iterable[Task]) -> dict[str, RunError]:
        """Carry out the tasks; returns the errors of those that failed, by name.

        A task is asked for when there is room for it. Any other exception (KeyboardInterrupt, an OSError where a log
        cannot be written) stops all that is running.
        """
        tasks, running, failed = iter(tasks), {}, {}
        try:
            while True:
                for slot in range(self.count):
                    if slot not in running and (task := next(tasks, None)):
                        running[slot] = task.name, self._carry_out(task, slot)
                if not running:
                    return failed
                for slot, (name, progress) in list(running.items()):
                    try:
                        next(progress)
                        continue
                    except StopIteration:
                        pass
                    except RunError as error:
                        failed[name] = error
                    del running[slot]
                time.sleep(POLL)
        finally:
            self.stop()
            for _, progress in running.values():
                progress.close()

    def stop(self) -> None:
        """End what is running: SIGTERM, upon which a run writes a checkpoint, then SIGKILL after `GRACE` seconds.

        No call here waits for a child without a time limit: a signal handler may have interrupted `run` anywhere.
        """
        children = list(self.children.values())
        for child in children:
            child.terminate()
        end = time.monotonic() + GRACE
        try:
            while any(child.poll() is None for child in children) and time.monotonic() < end:
                time.sleep(POLL)
        finally:  # a second Ctrl-C does not wait
            for child in children:
                child.kill()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=10)
        self.children.clear()

    def _carry_out(self, task: Task, slot: int) -> Iterator[None]:
        """Run a task's commands, yielding while one is running. RunError if one fails, Busy if the run is locked."""
        if is_locked(task.lock):
            raise Busy
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log, task.log.open("rb") as written:
            for command in task.commands:
                written.seek(0, os.SEEK_END)
                locks_itself = Path(command[1]).name == LOCKS_ITSELF
                with nullcontext() if locks_itself else locked(task.lock):
                    child = self.children[slot] = self._start(command, log, slot)
                    tail = b""
                    try:
                        while child.poll() is None:
                            yield
                            tail = (tail + self._show(written))[-4000:]
                    finally:  # closed after `stop`, this shows a run's last words
                        tail = (tail + self._show(written))[-4000:]
                    del self.children[slot]
                if child.returncode and is_locked(task.lock):  # the run was started elsewhere in the meantime
                    raise Busy
                if child.returncode:
                    raise RunError(f"{_failure(command, child.returncode, tail)} ({task.log})")

    def _show(self, written: BinaryIO) -> bytes:
        """What a log has gained since the last call, which is also printed if there is one task at a time."""
        new = written.read()
        if self.count == 1 and new:
            sys.stderr.buffer.write(new)
            sys.stderr.flush()
        return new

    def _start(self, command: list[str], log, slot: int) -> subprocess.Popen:
        """Start a command. In a process group of its own it hears of Ctrl-C once, from `stop`."""
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | self._share(slot),
            process_group=0,
            preexec_fn=_prepare_child,
        )

    def _share(self, slot: int) -> dict[str, str]:
        """The environment variables that give a slot its share of the machine."""
        if self.count == 1:
            return {}
        import torch

        found = torch.cuda.device_count()
        if found:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(found)))).split(",")
            return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // self.count))}


def _prepare_child() -> None:
    """Called in a child before its command: it does not outlive this process, and ignores slurm's warning signal.

    That signal may reach all processes of a job; the one that waits for the command acts on it.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if END_WITH_PARENT is not None:
        END_WITH_PARENT()


def _failure(command: list[str], status: int, output: bytes) -> str:
    """How a command ended, in one line, with its own error message if it printed one."""
    how = f"{Path(command[1]).name} ended with " + (f"signal {-status}" if status < 0 else f"exit status {status}")
    lines = re.split(r"[\r\n]+", output.decode(errors="replace"))
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{how}: {errors[-1]}" if errors else how


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run's lock. Busy if another process does."""
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise Busy from error
    except OSError:  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether another process works on the run whose lock this is."""
    try:
        with locked(path) if path.exists() else nullcontext():
            return False
    except Busy:
        return True
