"""The two halves of claim 2, from what is asked for to files: continue documents, score continuations.

Every process of a launch calls these functions; they share the work, and the main process writes.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kv_compression.api import attach
from kv_compression.generation import comparing, records, scoring
from kv_compression.generation import scorers as scorer_models
from kv_compression.generation.documents import Document, documents_digest, find_texts, pick_documents, prefix_ids
from kv_compression.generation.records import scores_path
from kv_compression.generation.request import GenerationRequest, ScoringRequest
from kv_compression.generation.sampling import Sampler, continue_documents
from kv_compression.io import fields, ownership, processes, strict_json
from kv_compression.io.errors import UsageError, printable
from kv_compression.io.machine import has_bf16
from kv_compression.io.ownership import file_name
from kv_compression.io.results import RESULTS, write_json, write_text
from kv_compression.io.tables import csv_table
from kv_compression.methods import METHODS, rule_of
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.rule import Rule
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN, unended
from kv_compression.settings import Settings
from kv_compression.spans.plan import plan_of
from kv_compression.spans.self_information import informant
from kv_compression.training.loading import load_model, load_run, under_method


def generate(request: GenerationRequest) -> str:
    """Continue the documents that the generation file lacks; returns a line on what it holds then.

    A record is written as soon as its batch is done. UsageError if the run's model cannot do what is asked for, or the
    file is another's.
    """
    state = processes.state()
    processes.load_whole_models()
    work = prepare(request)
    path, about = request.path, describe(request, work)
    done = processes.on_main(records.continue_file, path, about, request.overwrite)
    model = work.model.to(state.device)
    size = request.batch_size
    batches = [work.documents[start : start + size] for start in range(0, len(work.documents), size)]
    missing = [batch for batch in batches if {document.index for document in batch} - done]
    tokens = 0
    with tqdm(total=len(work.documents), initial=len(done), desc="generating") as bar, attach(model, rule=work.rule):
        for start in range(0, len(missing), state.num_processes):
            sampled = processes.split_work(work.sample, missing[start : start + state.num_processes])
            found = [record for batch in sampled for record in batch if record["index"] not in done]
            processes.on_main(records.append, path, found)
            tokens += sum(record["new_tokens"] for record in found)
            bar.update(len(found))
            bar.set_postfix(tokens_per_s=f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f}")
    line = processes.on_main(line_on_file, request, work)
    state.destroy_process_group()
    return line


@dataclass(frozen=True)
class Work:
    """A trained run, loaded, and the documents that it continues; `prefixes` are token ids by document."""

    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    settings: Settings
    rule: Rule
    sampler: Sampler
    precision: str
    documents: list[Document]
    prefixes: list[list[int]]

    def sample(self, batches: list[list[Document]]) -> list[list[dict]]:
        """The records of whole batches: rounding, and so a sample, may depend on the other documents of a batch."""
        plan = plan_of(self.settings)
        sampled = []
        for batch in batches:
            rows = [self.prefixes[document.index] for document in batch]
            how = (rows, self.rule, plan, self.sampler)
            sampled.append(list(continue_documents(self.model, self.tokenizer, batch, *how)))
        return sampled


def prepare(request: GenerationRequest) -> Work:
    """Load the run and read the documents. UsageError, before anything is written, if a prefix cannot be compressed."""
    precision = request.mixed_precision
    if precision == "auto":
        precision = "bf16" if has_bf16() else "no"
    tokenizer, model, trained = processes.main_first(load_run, request.model_dir, precision)
    settings = settings_for(request, trained)
    sentinels = (-1, -1)
    if METHODS[settings.method].uses_sentinels:
        sentinels = tuple(tokenizer.get_vocab().get(token) for token in (CL_TOKEN, CR_TOKEN))
        if None in sentinels:
            run = f"{request.model_dir} was trained with {trained.method}"
            raise UsageError(f"{run}: it has no sentinels to compress with")
    settings.check(in_blocks=False)

    documents = processes.on_main(read_documents, request, trained.preset)
    if few := few_documents(request, documents):
        words = request.prefix_words + request.continuation_words
        if processes.state().is_main_process:
            print(f"warning: {len(documents)} documents{few} were found: no others have {words} words", file=sys.stderr)
    settings = with_fitting_window(settings, tokenizer, documents)
    rule, plan = rule_of(settings, *sentinels), plan_of(settings)

    def read_prefixes(documents: list[Document]) -> list[list[int]]:
        inform = None
        if plan.compress and plan.sampler == "self_information":
            inform = informant(load_model(settings)[1].to(processes.state().device))
        how = (settings.protocol, settings.span_unit, settings.spacy_model, inform)
        return [prefix_ids(document, tokenizer, rule, plan, *how) for document in documents]

    prefixes = processes.split_work(read_prefixes, documents)
    sampler = Sampler(
        request.continuation_words,
        request.num_continuations,
        request.top_p,
        request.seed,
        request.allow_eos,
        request.compress_generated,
    )
    return Work(tokenizer, model, settings, rule, sampler, precision, documents, prefixes)


def settings_for(request: GenerationRequest, trained: Settings) -> Settings:
    """The run's settings, with the method, ratio, spans and seed that are asked for."""
    method = request.method or trained.method
    ratio = 0.0 if method == FullAttention.name else trained.bound_ratio
    ratio = ratio if request.bound_ratio is None else request.bound_ratio
    longest = request.max_span_length or trained.max_span_length
    changes = {"bound_ratio": ratio, "max_span_length": longest, "seed": request.seed}
    changes |= {"isolate_documents": False, "position_ids_by_document": False}
    return replace(under_method(trained, method), **changes)


def read_documents(request: GenerationRequest, preset: str) -> list[Document]:
    """The documents to continue; UsageError if none is long enough."""
    texts = find_texts(request.docs_file, preset, request.seed)
    return pick_documents(texts, request.num_documents, request.prefix_words, request.continuation_words)


def few_documents(request: GenerationRequest, documents: list[Document]) -> str:
    """What to add to the number of documents if it is smaller than asked for, else nothing."""
    return f" of the {request.num_documents} asked for" if len(documents) < request.num_documents else ""


def with_fitting_window(settings: Settings, tokenizer, documents: list[Document]) -> Settings:
    """Settings whose recent window leaves room for the spans of every prefix, not only of a training block."""
    if not plan_of(settings).compress or settings.protocol != "matched" or not settings.bound_ratio:
        return settings
    lengths = [len(unended(tokenizer, document.prefix)) for document in documents]
    widest = min(map(plan_of(settings).window, lengths))
    return replace(settings, recent_tokens=min(settings.recent_tokens, widest))


def describe(request: GenerationRequest, work: Work) -> dict:
    """Everything that decides what a generation file holds, for the .about.json beside it."""
    settings = work.settings
    return {
        "method": settings.method,
        "bound_ratio": settings.bound_ratio,
        "protocol": settings.protocol,
        "preset": settings.preset,
        "max_span_length": settings.max_span_length,
        **({"recent_tokens": settings.recent_tokens} if settings.recent_tokens else {}),
        "model_dir": file_name(Path(request.model_dir).name),
        "results_sha256": hashlib.sha256((Path(request.model_dir) / RESULTS).read_bytes()).hexdigest(),
        "batch_size": request.batch_size,
        "mixed_precision": work.precision,
        "documents_sha256": documents_digest(work.documents),
        "prefix_words": request.prefix_words,
        **asdict(work.sampler),
        **({"documents_asked": request.num_documents} if few_documents(request, work.documents) else {}),
    }


def line_on_file(request: GenerationRequest, work: Work) -> str:
    """One line on a finished generation file."""
    few = few_documents(request, work.documents)
    held = records.kept_fraction(records.read(request.path)[0])
    return (
        f"{work.settings.method} at ratio {work.settings.bound_ratio}: {len(work.documents)} documents{few}, "
        f"{request.num_continuations} continuations each, in {request.path}; the cache held {held:.3f} keys per "
        "prefix token"
    )


OF_THE_TABLE: fields.Fields = {  # what the table needs of a scores.json, besides the scores
    "skipped": fields.is_counts,
    "num_documents": fields.is_count,
    "cache_fraction": fields.is_measured,
    "perplexity_token_weighted": fields.is_measured,
}


def score(request: ScoringRequest, named: list[Path]) -> str:
    """Score the generation files that have no scores yet, write the table of all as CSV; returns it as text.

    `named` are the files in the main process. UsageError if another's file has the name of one that is written.
    """
    state = processes.state()
    processes.load_whole_models()
    files = processes.on_main(lambda: named)
    csv_path = request.csv_path(files)
    found = {path: processes.on_main(look_up, path, request) for path in files}
    missing = [path for path, (*_, scores) in found.items() if scores is None]
    processes.on_main(check_outputs, missing, csv_path)
    scored, scorers = {}, {}
    for path, (about, models, made_from, scores) in found.items():
        if scores is None:
            if models not in scorers:
                scorers.clear()  # one pair of models at a time
                scorers[models] = processes.main_first(scorer_models.load_scorers, models)
            scores = score_file(path, about, made_from, scorers[models])
            processes.on_main(write_json, scores_path(path), scores)
        scored[path] = scores
    text = processes.on_main(write_table, scored, csv_path)
    state.destroy_process_group()
    return text


def check_outputs(missing: list[Path], csv_path: Path) -> None:
    """Raise UsageError, before hours of scoring, if another's file has the name of one that will be written."""
    if missing:
        ownership.check(map(scores_path, missing), instead="give the continuations another name")
        ownership.check([csv_path], instead="name another file with --csv")


def look_up(path: Path, request: ScoringRequest) -> tuple[dict, scorer_models.ScorerModels, dict, dict | None]:
    """What made a generation file, the models to score it with, what its scores depend on, and the scores if it has
    any that were made so."""
    about = records.read_about(path) or {}
    named = (request.bertscore_model, request.fluency_model, request.bertscore_layer)
    models = scorer_models.scorers(about.get("preset", "embedded"), *named)
    digest = hashlib.sha256(records.read_bytes(path)).hexdigest()
    made_from = {"file_sha256": digest} | models.record()
    scores = None if request.overwrite else read_scores(scores_path(path))
    if scores is not None and any(scores.get(name) != value for name, value in made_from.items()):
        scores = None
    return about, models, made_from, scores


def read_scores(path: Path) -> dict | None:
    """The scores in a scores.json, None if there are none that can be read."""
    try:
        content = strict_json.read(path)
        if not fields.has_all(content, fields.OF_SCORES | OF_THE_TABLE):
            return None
        fields.check(content, fields.OF_SCORES | OF_THE_TABLE, fields.OF_A_GENERATION)
    except (OSError, ValueError):
        return None
    return content


def score_file(path: Path, about: dict, made_from: dict, scorers: tuple) -> dict:
    """What scores.json holds of one generation file; processes share its documents."""
    lines, problems = processes.on_main(records.read, path)
    scores = scoring.score_records(lines, *scorers)
    scores["skipped"]["half-written or damaged lines"] = len(problems)
    scores["damaged_lines"] = problems
    documents = scores["documents"]
    estimates = {
        metric: asdict(comparing.bootstrap([found[metric] for found in documents.values() if metric in found]))
        for metric in comparing.METRICS
    }
    return {
        **{name: about.get(name) for name in ("method", "bound_ratio", "protocol", "preset", "documents_sha256")},
        **made_from,
        "num_documents": len(documents),
        "cache_fraction": records.kept_fraction(lines),
        **estimates,
        **scores,
        "documents": {str(index): found for index, found in documents.items()},
    }


def write_table(scored: dict[Path, dict], csv_path: Path) -> str:
    """Write the table of scored files; returns what was not scored, the table and the comparisons as text."""
    lines = []
    for path, scores in scored.items():
        trouble = "; ".join(f"{count} {reason}" for reason, count in scores["skipped"].items() if count)
        if trouble:
            lines.append(printable(f"{path}: not scored: {trouble}"))
    table = [comparing.row(path, scores) for path, scores in scored.items()]
    write_text(csv_path, csv_table(table))
    return "\n".join([*lines, comparing.as_text(table, comparing.names_of(scored)), *comparing.comparisons(scored)])
