"""Claim 1: fine-tune a language model with LoRA under one method's mask and report its test perplexity.

`python run_clm.py --help` explains every flag.
"""

import sys
from pathlib import Path

from kv_compression import settings as run_settings
from kv_compression.io.errors import UsageError, quiet_libraries, run_script
from kv_compression.methods import NAMES


def main() -> None:
    """Run what the flags ask for, or show the same run's results if they are there."""
    flags, overwrite, resume = run_settings.parse()
    upload_to, private = flags.pop("push_to_hub"), flags.pop("hub_private")
    if private and upload_to is None:
        raise UsageError("--hub_private needs --push_to_hub")
    if flags["method"] is None and flags["model_dir"] is None:
        example = "python run_clm.py --method kv_compression --bound_ratio 0.5"
        raise UsageError(f"--method is missing: choose from {', '.join(NAMES)}, as in {example}; --help has all flags")
    quiet_libraries()
    run_settings.check_flags(flags)  # before the imports, which take seconds
    from kv_compression.io import hub, processes, results
    from kv_compression.sharing import model_card
    from kv_compression.training import run as training_run
    from kv_compression.training import run_folder

    state = processes.state()

    def say(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    settings = run_settings.resolve(flags | {"num_processes": state.num_processes})
    say(f"preset {settings.preset} ({settings.preset_reason}), results in {settings.output_dir}")
    source = None if resume in (None, "latest") else run_folder.other_run(resume, settings.output_dir)
    found = processes.on_main(run_folder.finished, settings, overwrite, bool(resume) and source is None)
    if found is not None:
        say("this run is finished already; --overwrite runs it again")
        processes.on_main(run_folder.finish, settings, found, model_card.write_card)
    folder = Path(settings.output_dir)
    # Before hours of training, not after them.
    repository = None if upload_to is None else processes.on_main(hub.destination, upload_to, folder)
    resumes = source is not None or (bool(resume) and not overwrite)
    found = found or training_run.run(settings, resumes, source, model_card.write_card)
    say(results.in_one_line(found))
    if repository and state.is_main_process:
        model_card.write_card(folder, found, repository)
        say(f"uploaded to {hub.push(folder, repository, private)}")
    state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_script(main))
