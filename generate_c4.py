"""Claim 2, first half: continue the prefixes of C4 documents with a model that run_clm.py has fine-tuned.

Parses flags, reads documents, calls `kv_compression.generation`, writes a line a document as it goes.
"""

import argparse
import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path

from kv_compression.data import embedded, reading
from kv_compression.io.errors import UsageError, is_main_process, quiet_libraries, run_script
from kv_compression.io.flags import Parser, ratio
from kv_compression.io.machine import has_bf16
from kv_compression.io.results import results_of_run
from kv_compression.methods import NAMES


def parse() -> argparse.Namespace:
    """The flags of this script."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_dir", required=True, help="the output folder of a run of run_clm.py")
    add("--method", choices=NAMES)
    add("--bound_ratio", type=ratio, help="(method and ratio: those of the run)")
    add("--docs_file", help=".jsonl, .json, .csv or .txt (allenai/c4 en, validation; embedded preset: its test text)")
    add("--num_documents", type=int, default=200)
    add("--prefix_words", type=int, default=128)
    add("--continuation_words", type=int, default=64)
    add("--num_continuations", type=int, default=8)
    add("--top_p", type=float, default=0.9)
    add("--max_span_length", type=int, help="(that of the run)")
    add("--compress_generated", action="store_true", help="keep the ratio while text is generated, too")
    add("--allow_eos", action="store_true", help="let a continuation end before its last word")
    add("--batch_size", type=int, default=4, help="documents at a time")
    add("--seed", type=int, default=0)
    add("--mixed_precision", choices=["auto", "no", "bf16"], default="auto")
    add("--output_file", help="(<model_dir>/generation.jsonl)")
    add("--overwrite", action="store_true")
    flags = parser.parse_args()
    for name in ("num_documents", "prefix_words", "continuation_words", "num_continuations", "batch_size"):
        if getattr(flags, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if not 0 < flags.top_p <= 1:
        raise UsageError(f"--top_p must be above 0 and at most 1, got {flags.top_p}")
    if not 0 <= flags.seed < 2**32:
        raise UsageError(f"--seed must be at least 0 and below 2^32, got {flags.seed}")
    if flags.method == "full_attention" and flags.bound_ratio:
        raise UsageError("full attention compresses nothing: leave --bound_ratio away")
    if flags.max_span_length is not None and flags.max_span_length < 2:
        raise UsageError(f"--max_span_length must be at least 2, got {flags.max_span_length}")
    if flags.output_file and not flags.output_file.endswith(".jsonl"):
        raise UsageError(f"--output_file {flags.output_file} must end in .jsonl")
    return flags


def pick(flags: argparse.Namespace, preset: str) -> list:
    """The documents to continue."""
    from kv_compression.generation import sampling

    if flags.docs_file:
        texts = reading.read_texts(flags.docs_file, "docs_file")
    elif preset == "embedded":
        texts = embedded.embedded_text()["test"]["text"]
    else:
        texts = reading.stream_c4(flags.seed)
    return sampling.pick(texts, flags.num_documents, flags.prefix_words, flags.continuation_words)


def main() -> None:
    """Generate what is missing."""
    flags = parse()
    if is_main_process():  # before the seconds that the imports take
        results_of_run(flags.model_dir)
    quiet_libraries()
    from tqdm.auto import tqdm

    from kv_compression import settings as run_settings
    from kv_compression.generation import records, sampling
    from kv_compression.io import processes
    from kv_compression.io.ownership import file_name
    from kv_compression.methods import METHODS, rule_of
    from kv_compression.model.attention import compressed_attention
    from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN, unended
    from kv_compression.spans import self_information as information
    from kv_compression.spans.plan import plan_of
    from kv_compression.training import loading

    state = processes.state()
    processes.load_whole_models()
    precision = flags.mixed_precision
    precision = ("bf16" if has_bf16() else "no") if precision == "auto" else precision
    tokenizer, model, trained = processes.main_first(loading.load_run, flags.model_dir, precision)
    method = METHODS[flags.method or trained.method]
    # Full attention has no ratio: that of the run is not meant.
    asked = 0.0 if method.name == "full_attention" else trained.bound_ratio
    asked = asked if flags.bound_ratio is None else flags.bound_ratio
    longest = flags.max_span_length or trained.max_span_length
    ids = [tokenizer.get_vocab().get(token) for token in (CL_TOKEN, CR_TOKEN)]
    if method.uses_sentinels and None in ids:
        raise UsageError(f"{flags.model_dir} was trained with {trained.method}: it has no sentinels to compress with")
    options = {"method": method.name, "bound_ratio": asked, "max_span_length": longest, "seed": flags.seed}
    if method.name != trained.method:
        options |= {name: getattr(run_settings.Settings, name) for name in run_settings.OPTIONS_OF_METHODS}
    settings = replace(trained, **options, isolate_documents=False, position_ids_by_document=False)
    settings.check(in_blocks=False)
    sampler = sampling.Sampler(
        flags.continuation_words,
        flags.num_continuations,
        flags.top_p,
        flags.seed,
        flags.allow_eos,
        flags.compress_generated,
    )

    documents = processes.on_main(pick, flags, trained.preset)
    few = f" of the {flags.num_documents} asked for" if len(documents) < flags.num_documents else ""
    if few and state.is_main_process:
        words = flags.prefix_words + flags.continuation_words
        print(f"warning: {len(documents)} documents{few} were found: no others have {words} words", file=sys.stderr)
    if method.uses_sentinels and settings.protocol == "matched" and asked:
        # A window that fits a training block may leave a shorter prefix no room for spans.
        lengths = [len(unended(tokenizer, document.prefix)) for document in documents]
        window = min(map(plan_of(settings).window, lengths))
        settings = replace(settings, recent_tokens=min(settings.recent_tokens, window))
    rule, plan = rule_of(settings, *(ids if method.uses_sentinels else (-1, -1))), plan_of(settings)
    about = {
        "method": method.name,
        "bound_ratio": asked,
        "protocol": trained.protocol,
        "preset": trained.preset,
        "max_span_length": longest,
        **({"recent_tokens": settings.recent_tokens} if settings.recent_tokens else {}),
        "model_dir": file_name(Path(flags.model_dir).name),
        "results_sha256": hashlib.sha256((Path(flags.model_dir) / "results.json").read_bytes()).hexdigest(),
        "batch_size": flags.batch_size,
        "mixed_precision": precision,
        "documents_sha256": sampling.documents_digest(documents),
        "prefix_words": flags.prefix_words,
        **asdict(sampler),
        **({"documents_asked": flags.num_documents} if few else {}),
    }
    path = Path(flags.output_file or Path(flags.model_dir) / "generation.jsonl")

    def read_prefixes(documents: list[sampling.Document]) -> list[list[int]]:
        inform = None
        if plan.compress and plan.sampler == "self_information":
            inform = information.informant(loading.load_model(settings)[1].to(state.device))
        how = (settings.protocol, settings.span_unit, settings.spacy_model, inform)
        return [sampling.prefix_ids(document, tokenizer, rule, plan, *how) for document in documents]

    # A ratio that cannot be had ends the run before it leaves anything.
    prefixes = processes.split_work(read_prefixes, documents)
    done = processes.on_main(records.continue_file, path, about, flags.overwrite)

    def sample(batches: list[list[sampling.Document]]) -> list[list[dict]]:
        sampled = []
        for batch in batches:
            # A batch is always sampled whole: rounding, and so a sample, may depend on who shares a batch.
            rows = [prefixes[document.index] for document in batch]
            sampled.append(list(sampling.continue_documents(model, tokenizer, batch, rows, rule, plan, sampler)))
        return sampled

    model = model.to(state.device)
    batches = [documents[start : start + flags.batch_size] for start in range(0, len(documents), flags.batch_size)]
    missing = [batch for batch in batches if {document.index for document in batch} - done]
    tokens = 0
    with (
        tqdm(total=len(documents), initial=len(done), desc="generating") as bar,
        compressed_attention(model, rule=rule),
    ):
        for start in range(0, len(missing), state.num_processes):
            sampled = processes.split_work(sample, missing[start : start + state.num_processes])
            found = [record for batch in sampled for record in batch if record["index"] not in done]
            processes.on_main(records.append, path, found)
            tokens += sum(record["new_tokens"] for record in found)
            bar.update(len(found))
            bar.set_postfix(tokens_per_s=f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f}")
    if state.is_main_process:
        held = [record["cache_length"] / record["prefix_tokens"] for record in records.usable(records.read(path)[0])]
        print(
            f"{method.name} at ratio {asked}: {len(documents)} documents{few}, {sampler.continuations} continuations "
            f"each, in {path}; the cache held {sum(held) / len(held):.3f} keys a prefix token"
        )
    state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_script(main))
