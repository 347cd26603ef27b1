"""Many runs: methods × ratios × seeds × protocols, here, on slurm or as commands for another scheduler.

Flags that are not its own are passed on to run_clm.py. See "Many runs" in docs/operations.md.
"""

import signal
import sys

from kv_compression.io.errors import RunError, quiet_libraries, run_script
from kv_compression.sweep import flags as sweep_flags


def main() -> None:
    """Run, submit or print what is missing, then show what is finished."""
    flags, given = sweep_flags.parse(__doc__.splitlines()[0])
    quiet_libraries()
    from kv_compression.sweep import jobs as sweep_jobs
    from kv_compression.sweep import slurm, workers

    folder, jobs = sweep_jobs.planned(flags, given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: dict[str, str] = {}
    try:
        if flags.dry_run:
            failed = sweep_jobs.print_commands(jobs)
        elif flags.slurm:
            slurm.submit(sweep_jobs.tasks(jobs, failed), folder, flags.slurm_option)
        else:
            failed = sweep_jobs.run_missing(jobs, workers.Workers(flags.jobs or 1))
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        raise RunError(f"the sweep cannot go on in {folder}: {error}") from error
    if not flags.dry_run:
        print(sweep_jobs.what_is_finished(jobs, folder))
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_script(main))
