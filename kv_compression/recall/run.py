"""Measure what a model's compressed cache remembers: load, ask, write recall.jsonl, recall.json and heat maps."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from kv_compression import api
from kv_compression.data import embedded
from kv_compression.data.reading import load_file
from kv_compression.io import fields, ownership, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.machine import has_bf16
from kv_compression.io.results import RESULTS, results_of_run, write_json, write_text
from kv_compression.io.tensor_files import digest
from kv_compression.methods import METHODS
from kv_compression.methods.rule import Rule
from kv_compression.model.architectures import positions_of
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN
from kv_compression.recall import measuring, plotting, scores
from kv_compression.recall.request import RecallRequest
from kv_compression.recall.tasks import TASKS, Example, Source, examples
from kv_compression.settings import EMBEDDED, Settings

LINES, SUMMARY = "recall.jsonl", "recall.json"
OF_A_LINE = ("ratio", "index", "length", "depth", "distance", "left", "answer_tokens", "nats")
OF_ONE = ("kept", "none", "full", "exact", "exact_none", "exact_full")
OF_MANY = ("seconds", "seconds_alone", "bytes", "bytes_full", "apart")
AGREE = {torch.float32: 1e-2, torch.bfloat16: 0.5}  # nats a token that cache and mask may differ


def measure_recall(request: RecallRequest) -> str:
    """Ask what the request asks for and has not been asked yet; returns the table of all answers as text."""
    _refuse_foreign(request.folder)
    model, tokenizer, settings, run = load(request)
    source = Source(read_text(request, tokenizer), tokenizer)
    lengths = request.asked_lengths()
    most = positions_of(model.config)
    if most is not None and max(lengths) + 128 > most:
        raise UsageError(f"--lengths {max(lengths)} and a question are longer than the model's {most} positions")
    if len(source.text) < max(lengths):
        raise UsageError(f"the text has {len(source.text)} tokens, too few for documents of {max(lengths)}")
    about = describe(request, settings, run, source)
    lines = read_lines(request, about)
    todo = [(ratio, task) for ratio in request.asked_ratios(settings.bound_ratio) for task in request.tasks]
    todo = [each for each in todo if each not in {(line["ratio"], line["task"]) for line in lines}]
    bar = tqdm(todo, desc="asking")
    for ratio, task in bar:
        bar.set_postfix_str(f"{task} at {ratio:g}")
        rule = rule_at(settings, tokenizer, ratio)
        lines += list(ask(model, rule, settings, ratio, task, source, request))
        write_text(request.folder / LINES, "".join(json.dumps(line) + "\n" for line in [{"about": about}, *lines]))
    rows = scores.summarize(lines)
    write_json(request.folder / SUMMARY, {"about": about, "rows": rows})
    plotting.heat_maps(request.folder, lines, METHODS[settings.method].label)
    return scores.as_table(rows)


def load(request: RecallRequest):
    """The model in evaluation mode, its tokenizer, the settings of its method, and the run's results (or None)."""
    bf16 = has_bf16() if request.mixed_precision == "auto" else request.mixed_precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    if request.model_dir:
        from kv_compression.training.loading import load_run

        results = results_of_run(request.model_dir)
        tokenizer, model, settings = load_run(request.model_dir, "bf16" if bf16 else "no", request.adapter)
    else:
        results, settings = (
            None,
            Settings(method=request.method, model_name_or_path=request.model_name_or_path or EMBEDDED),
        )
        name = settings.model_name_or_path
        name = embedded.embedded_model() if name == EMBEDDED else name
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False).eval()
        except Exception as error:  # loaders raise whatever their parsers do
            raise RunError(f"the model {name} cannot be loaded: {one_line(error)}") from error
        if METHODS[request.method].uses_sentinels:
            raise UsageError(f"{request.method} needs a trained run: name its folder with --model_dir")
    changes = {name: getattr(request, name) for name in ("method", "sink_tokens", "max_span_length")}
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    if METHODS[settings.method].uses_sentinels and CL_TOKEN not in tokenizer.get_vocab():
        raise UsageError(f"{request.model_dir} was not trained with {settings.method}: it has no sentinels")
    return model, tokenizer, settings, results


def rule_at(settings: Settings, tokenizer, ratio: float) -> Rule:
    """The method's rule at a ratio."""
    method = METHODS[settings.method]
    ids = [tokenizer.get_vocab().get(token, -1) for token in (CL_TOKEN, CR_TOKEN)]
    options = {name: getattr(settings, name) for name in api.options_of(method)}
    return method(cl_id=ids[0], cr_id=ids[1], ratio=ratio, seed=settings.seed, **options)


def read_text(request: RecallRequest, tokenizer) -> list[int]:
    """The text between the facts, as one stream of token ids."""
    rows = load_file(request.text_file, "test") if request.text_file else embedded.embedded_text()["test"]
    return [token for ids in tokenizer(list(rows["text"]), add_special_tokens=False)["input_ids"] for token in ids]


def ask(model, rule: Rule, settings: Settings, ratio: float, task: str, source: Source, request) -> Iterator[dict]:
    """The answers to a task at one ratio, a dictionary for each document."""

    spans = api.SpanLengths(settings.max_span_length, settings.span_sampler == "shortest", strict=False)

    def marked(document: list[int]) -> list[int]:
        return api.mark(document, rule, ratio, spans, request.seed) if ratio else document

    try:
        found = list(enumerate(examples(task, source, request.asked_lengths(), request.documents, request.seed)))
    except ValueError as error:
        raise UsageError(f"--lengths: {error}") from error
    for start in range(0, len(found), request.batch_size):
        batch = found[start : start + request.batch_size]
        batch = [(index, length, example) for index, (length, example) in batch]
        if task == "ask_many":
            yield from (_ask_many(model, rule, ratio, marked, *each) for each in batch)
            continue
        questions = [example.questions[0] for *_, example in batch]
        documents = [marked(example.document) for *_, example in batch]
        answers = measuring.from_cache(model, rule, documents, questions)
        without = measuring.from_cache(model, rule, [marked(example.without) for *_, example in batch], questions)
        full = measuring.in_full(model, [example.document for *_, example in batch], questions)
        apart = _check(model, rule, documents, questions, answers) if start == 0 else None
        for row, (index, length, example) in enumerate(batch):
            gone = measuring.have_left(rule, documents[row], questions[row])
            nats = {"nats": answers, "none": without, "full": full}
            yield {
                **_line(task, ratio, index, length, example, gone),
                "kept": answers.kept[row],
                **{name: _mean_of(found.nats[row], gone) for name, found in nats.items()},
                "exact": answers.exact[row],
                "exact_none": without.exact[row],
                "exact_full": full.exact[row],
                "mask_apart": apart,
            }


def _mean_of(nats: list[float], gone: list[bool]) -> float:
    """Nats a token over the tokens that had left, or over all if none had."""
    return float(np.mean([one for one, left in zip(nats, gone) if left or not any(gone)]))


def _ask_many(model, rule: Rule, ratio: float, marked, index: int, length: int, example: Example) -> dict:
    document = marked(example.document)
    found = measuring.together(model, rule, document, example.document, example.questions)
    gone = measuring.have_left(rule, document, example.questions[0])
    return {
        **_line("ask_many", ratio, index, length, example, gone),
        **{name: value for name, value in found._asdict().items() if name not in ("nats", "alone")},
        "nats": float(np.mean(sum(found.nats, []))),
        "apart": float(np.abs(np.subtract(sum(found.nats, []), sum(found.alone, []))).max()),
    }


def _line(task: str, ratio: float, index: int, length: int, example: Example, gone: list[bool]) -> dict:
    return {
        "task": task,
        "ratio": ratio,
        "index": index,
        "length": length,
        "depth": example.depth,
        "distance": length - 1 - example.questions[0].needed[1],
        "left": sum(gone) / len(gone),
        "answer_tokens": len(gone),
    }


def _check(model, rule: Rule, documents, questions, answers: measuring.Answers) -> float:
    """How far the cache's answers are from those of the mask in one pass. RunError if that is no rounding."""
    masked = measuring.in_one_pass(model, rule, documents, questions)
    apart = float(np.abs(np.subtract(sum(answers.nats, []), sum(masked.nats, []))).max())
    if apart > AGREE[model.dtype]:
        raise RunError(f"the cache's answers and the mask's are {apart:.3f} nats apart: please report this")
    return apart


def describe(request: RecallRequest, settings: Settings, run: dict | None, source: Source) -> dict:
    """All that decides the answers but ratio and task."""
    method = METHODS[settings.method]
    results = Path(request.model_dir) / RESULTS if request.model_dir else None
    return {
        "method": settings.method,
        "model": settings.model_name_or_path if run is None else run["model"],
        "results": ownership.file_identity(results and str(results)),
        "options": {name: getattr(settings, name) for name in api.options_of(method)},
        "max_span_length": settings.max_span_length,
        "span_sampler": settings.span_sampler,
        "recipe": settings.recipe,
        "step": request.step,
        "documents": request.documents,
        "lengths": request.asked_lengths(),
        "text": digest(json.dumps(list(source.text))),
        "seed": request.seed,
        "mixed_precision": request.mixed_precision,
    }


def read_lines(request: RecallRequest, about: dict) -> list[dict]:
    """The answers that are there already. UsageError if other settings made them, unless they are to be replaced."""
    path = request.folder / LINES
    try:
        lines = [strict_json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}") from error
    if not lines or request.overwrite:
        return []
    if lines[0] != {"about": json.loads(json.dumps(about))}:
        raise UsageError(f"{path} was made with other settings: --overwrite replaces it, --output_dir names another")
    for number, line in enumerate(lines[1:], start=2):
        if not _is_answer(line):
            raise RunError(f"{path} is damaged in line {number}: --overwrite measures again")
    return lines[1:]


def _is_answer(line) -> bool:
    """Whether this is a line that `ask` has made."""
    if not fields.is_object(line) or not fields.is_name(line.get("task")) or line["task"] not in TASKS:
        return False
    needed = {*OF_A_LINE, *(OF_MANY if line["task"] == "ask_many" else OF_ONE)}
    return all(isinstance(line.get(name), bool) or fields.number(line.get(name)) is not None for name in needed)


def _refuse_foreign(folder: Path) -> None:
    """UsageError, before hours of work, if another's file has the name of one that is written."""
    paths = [folder / LINES, folder / SUMMARY]
    ownership.check(paths, instead="name another folder with --output_dir")
