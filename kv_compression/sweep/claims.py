"""Who works on what, among workers that share a folder and nothing else.

A claim is a file: whoever creates it may carry out the job for as long as it goes on touching the file.
"""

import json
import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

BEGINNING = b'{"host": '  # of a claim


class GivenUp(Exception):
    """This worker was silent for so long that another has taken its claim over."""


class Claims:
    """The claims of a sweep: files `<job>.<generation>` in a folder, dead when untouched for `timeout` seconds.

    Only the file server's clock and its promise to create a file once are relied on.
    """

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = Path(folder), timeout

    @property
    def beat(self) -> float:
        """Seconds between touches."""
        return self.timeout / 6

    def take(self, job: str) -> "Claim | None":
        """A claim on the job, None if a living worker has one."""
        if self.held(job):
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        claim = Claim(self, job, self.newest(job) + 1)
        try:
            with claim.path.open("x", encoding="utf-8") as file:
                file.write(claim.text)
        except FileExistsError:
            return None
        # Another worker may have looked at the same time and come to another generation: then neither takes the job.
        if self.held(job, but=claim.generation) or self.newest(job) != claim.generation:
            claim.release()
            return None
        return claim

    def held(self, job: str, but: int | None = None) -> bool:
        """Whether a living worker has a claim on the job, other than that of generation `but`."""
        return any(self.is_alive(job, number) for number in self.generations(job) if number != but)

    def newest(self, job: str) -> int:
        """The highest generation of the job's claims, 0 if there is none."""
        return max(self.generations(job), default=0)

    def generations(self, job: str) -> list[int]:
        """The generations of the job's claims."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        endings = [name.removeprefix(f"{job}.") for name in names if name.startswith(f"{job}.")]
        return [int(ending) for ending in endings if ending.isdecimal()]

    def path(self, job: str, number: int) -> Path:
        """A claim's file."""
        return self.folder / f"{job}.{number}"

    def is_alive(self, job: str, number: int) -> bool:
        """Whether a claim has been touched lately, by the file server's clock."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="clock.") as probe:
            now = os.stat(probe.name).st_mtime
        try:
            with self.path(job, number).open() as file:  # opened, because a client may remember what it stats
                return now - os.fstat(file.fileno()).st_mtime <= self.timeout
        except FileNotFoundError:
            return False


def is_claim(path: Path) -> bool:
    """Whether a file is some worker's claim, or one that its worker was killed writing: not anybody else's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return content[: len(BEGINNING)] == BEGINNING[: len(content)]


class Claim:
    """One worker's right to a job."""

    def __init__(self, claims: Claims, job: str, number: int):
        self.claims, self.job, self.generation = claims, job, number
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.text = json.dumps(holder | {"id": str(uuid.uuid4())}) + "\n"
        self.path = claims.path(job, number)

    def keep(self) -> None:
        """Show that this worker lives. Raises GivenUp if another has taken over."""
        try:
            if self._is_ours() and self.claims.newest(self.job) == self.generation:
                os.utime(self.path)
                return
        except FileNotFoundError:
            pass
        except OSError:
            return  # the file server may be back at the next beat
        raise GivenUp

    def release(self) -> None:
        """Take the claim back, and the dead ones before it."""
        with suppress(OSError):  # it will expire
            if self._is_ours():
                for number in self.claims.generations(self.job):
                    path = self.claims.path(self.job, number)
                    dead = number < self.generation and not self.claims.is_alive(self.job, number) and is_claim(path)
                    if dead or number == self.generation:
                        path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        """Whether the file is the one that was created: workers that came and went may have freed its name."""
        return self.path.read_bytes() == self.text.encode()
