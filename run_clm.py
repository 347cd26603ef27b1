"""Claim 1: fine-tune a language model with LoRA under one method's mask and report its test perplexity.

Parses flags, calls `kv_compression.experiment`, prints. `python run_clm.py --help` lists the flags.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from kv_compression import settings as run_settings
from kv_compression.io.errors import Parser, UsageError, quiet_libraries, ratio, run_script

METHODS = list(run_settings.METHOD_NAMES)


def parse(argv: list[str] | None = None, also: Iterable[str] = ()) -> tuple[dict, bool, str | None]:
    """The flags that were given, by the names of `Settings`, whether to overwrite, and from where to resume.

    `also` are other flags that a misspelt one may have meant.
    """
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--method", choices=METHODS, help="required")
    add("--bound_ratio", type=ratio, help="compression ratio, 0 … below 1 (0)")
    add("--preset", choices=["auto", "paper", "embedded"], help="paper needs a GPU and the hub (auto)")
    add("--protocol", choices=["paper", "matched"], help="how text becomes blocks and spans (the preset's)")
    add("--model_name_or_path", help="hub name or folder")
    add("--tokenizer_name", help="hub name or folder of another tokenizer than the model's")
    add("--dataset_name", help="hub name")
    add("--dataset_config_name")
    for split in ("train", "validation", "test"):
        add(f"--{split}_file", help=".jsonl, .json or .csv with a column text, or .txt")
    add("--validation_split_percentage", type=int, help="of the training rows, where there is no validation split")
    add("--block_size", type=int, help="tokens a block (256)")
    add("--max_span_length", type=int, help="words (paper) or tokens (matched) a span (25)")
    add("--recipe", choices=["paper", "best"], help="the paper's KV compression, or with what helps most (paper)")
    add("--span_sampler", choices=["random", "fixed", "self_information"], help="which spans (random)")
    add("--span_unit", choices=["token", "phrase", "sentence"], help="of self_information; needs spaCy (token)")
    add("--spacy_model", help="that finds phrases and sentences (an installed en_core_web_sm*)")
    add("--sink_tokens", type=int, help="first tokens of a block that stay for all to see (0; sink attention: 4)")
    add("--cr_tokens", type=int, help="<CR> a span (1)")
    add("--cr_visibility", choices=["span", "context"], help="what <CR> sees besides its own span (span)")
    add("--recent_tokens", type=int, help="text tokens that are read before a span's token leaves (0)")
    add("--distill_weight", type=float, help="of the untouched model's prediction in the loss, 0 … 1 (0)")
    add("--sentinel_learning_rate", type=float, help="of the sentinels' embeddings (--learning_rate)")
    add("--isolate_documents", action="store_true", default=None, help="no attention across documents in a block")
    add("--documents", choices=["auto", "rows", "articles"], help="WikiText's articles where there are titles (auto)")
    add("--position_ids_by_document", action="store_true", default=None, help="every document counts its own")
    add("--fixed_spans", action="store_true", default=None, help="draw spans once; implied by --protocol paper")
    add("--per_device_train_batch_size", type=int, help="(4)")
    add("--per_device_eval_batch_size", type=int, help="(4)")
    add("--gradient_accumulation_steps", type=int, help="(3; embedded: 1)")
    add("--learning_rate", type=float, help="(2e-5; embedded: 1e-3)")
    add("--weight_decay", type=float, help="of LoRA and the sentinels' embeddings (0)")
    add("--num_train_epochs", type=int, help="(3)")
    add("--max_train_steps", type=int, help="optimizer steps, overrides the epochs (embedded: 16)")
    add("--num_warmup_steps", type=int, help="(0)")
    add("--lr_scheduler_type", choices=run_settings.LR_SCHEDULERS, help="(linear)")
    add("--max_eval_blocks", type=int, help="score only the first blocks of a split (all; embedded: 24)")
    add("--r", type=int, help="LoRA's rank (16)")
    add("--lora_target_modules", nargs="+", help="modules that LoRA adapts (the attention projections)")
    add("--seed", type=int, help="(0)")
    add(
        "--attn_implementation",
        choices=["auto", "grouped", "sdpa", "flex_attention", "sorted_flex_attention", "eager"],
        help="grouped on a CPU, else sdpa (auto)",
    )
    add("--mixed_precision", choices=["auto", "no", "bf16"], help="bf16 where the hardware has it (auto)")
    add("--compile", action="store_true", default=None, help="compile the model's layers: minutes once, then faster")
    add("--gradient_checkpointing", action="store_true", default=None, help="less memory, a third more compute")
    add("--preprocessing_num_workers", type=int)
    add("--eval_only", action="store_true", default=None, help="no fine-tuning: score the model as it is")
    add("--skip_untrained", action="store_true", default=None, help="no score before fine-tuning")
    add("--output_dir", help="(output/<preset>/<method>_<ratio>)")
    add("--checkpointing_steps", help="optimizer steps between checkpoints, minutes with an m, or epoch (10m)")
    add("--checkpoints_to_keep", type=int, help="(2)")
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="latest",
        metavar="FOLDER",
        help="resume where this run, or an equal one in another folder, broke off",
    )
    add("--overwrite", action="store_true", help="replace what the output folder holds")
    add("--push_to_hub", nargs="?", const="", metavar="REPO", help="upload the finished run (named as its folder)")
    add("--hub_private", action="store_true", default=None, help="a repository that --push_to_hub makes is private")
    flags = vars(parser.parse_args(argv, also=also))
    if flags["lora_target_modules"]:
        flags["lora_target_modules"] = tuple(flags["lora_target_modules"])
    return flags, flags.pop("overwrite"), flags.pop("resume_from_checkpoint")


def main() -> None:
    """Run what the flags ask for, or show the same run's results if they are there."""
    flags, overwrite, resume = parse()
    asked, private = flags.pop("push_to_hub"), flags.pop("hub_private")
    if private and asked is None:
        raise UsageError("--hub_private needs --push_to_hub")
    if flags["method"] is None:
        example = "python run_clm.py --method kv_compression --bound_ratio 0.5"
        raise UsageError(
            f"--method is missing: choose from {', '.join(METHODS)}, as in {example}; --help has all flags"
        )
    quiet_libraries()
    run_settings.check_flags(flags)  # before the seconds that the imports take
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
    repository = None if asked is None else processes.on_main(hub.destination, asked, folder)
    resumes = source is not None or (bool(resume) and not overwrite)
    found = found or training_run.run(settings, resumes, source, model_card.write_card)
    say(results.summary(found))
    if repository and state.is_main_process:
        model_card.write_card(folder, found, repository)
        say(f"uploaded to {hub.push(folder, repository, private)}")
    state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_script(main))
