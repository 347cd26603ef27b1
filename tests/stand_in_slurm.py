"""A slurm of four shell scripts: jobs start at once, here, and their state is files in $SLURM_STAND_IN."""

import os
from pathlib import Path

PROGRAMS = {
    "sbatch": """
cd "$SLURM_STAND_IN" && cp "$1" script || exit
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' script)
for task in $(seq 0 "${last:-0}"); do
    id=101${last:+_$task}
    touch queued_$id
    (
        export SLURM_JOB_ID=101 STAND_IN_ID=$id
        [ "$last" ] && export SLURM_ARRAY_JOB_ID=101 SLURM_ARRAY_TASK_ID=$task
        sh script
        while rm requeue_$id; do sh script; done
        rm queued_$id
    ) >output 2>&1 &
done
echo "Submitted batch job 101"
""",
    "srun": """
while :; do
    case $1 in --unbuffered) shift ;; --output | --error) shift 2 ;; *) break ;; esac
done
echo $$ >"$SLURM_STAND_IN/pid_$STAND_IN_ID"
exec "$@"
""",
    "scontrol": '[ "$1" = requeue ] && touch "$SLURM_STAND_IN/requeue_$2"',
    "squeue": "cd \"$SLURM_STAND_IN\" && ls | sed -n 's/^queued_//p'",
}
FULL = 'echo "sbatch: error: no more jobs" >&2; exit 1'


class StandInSlurm:
    """The programs in `folder`/bin, which has to be put on the PATH, and their state."""

    def __init__(self, folder: Path):
        self.programs, self.state = folder / "bin", folder / "slurm state"
        self.programs.mkdir()
        self.state.mkdir()
        for name, text in PROGRAMS.items():
            self.install(name, text)

    def install(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.programs}:{os.environ['PATH']}", "SLURM_STAND_IN": str(self.state)}

    def script(self) -> str:
        return (self.state / "script").read_text()

    def queued(self) -> list[str]:
        return sorted(path.name.removeprefix("queued_") for path in self.state.glob("queued_*"))

    def warn(self, job: str, number: int) -> None:
        """Send a job the signal that slurm sends before it ends it."""
        os.kill(int((self.state / f"pid_{job}").read_text()), number)
