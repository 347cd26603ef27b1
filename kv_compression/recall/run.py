"""Measure what a model's compressed cache remembers: load, ask, write recall.jsonl, recall.json and heat maps."""

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from kv_compression import api
from kv_compression.data import embedded
from kv_compression.data.reading import load_file
from kv_compression.data.splits import weights_digest
from kv_compression.io import fields, ownership, processes, strict_json
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.machine import has_bf16
from kv_compression.io.ownership import file_name
from kv_compression.io.results import RESULTS, as_json, results_of_run, write_bytes
from kv_compression.io.tensor_files import digest
from kv_compression.methods import METHODS
from kv_compression.methods.rule import Rule
from kv_compression.model.architectures import positions_of
from kv_compression.model.vocabulary import CL_TOKEN, CR_TOKEN
from kv_compression.recall import measuring, plotting, scores
from kv_compression.recall.request import RecallRequest
from kv_compression.recall.tasks import TASKS, Example, Source, examples
from kv_compression.settings import EMBEDDED, Settings
from kv_compression.training.loading import load_model, load_run, under_method

LINES, SUMMARY = "recall.jsonl", "recall.json"
OF_A_LINE = ("ratio", "index", "length", "depth", "distance", "left", "answer_tokens", "nats")
OF_ONE = ("kept", "none", "full", "exact", "exact_none", "exact_full")
OF_MANY = ("seconds", "seconds_alone", "bytes", "bytes_full", "apart")
AGREE = {torch.float32: 1e-2, torch.bfloat16: 0.5}  # nats a token that cache and mask may differ


def measure_recall(request: RecallRequest) -> str:
    """Ask what the request asks for and has not been asked yet; returns the table of all answers as text."""
    pictures = {plotting.name_of(ratio) for ratio in request.asked_ratios(0.0)}
    paths = [request.folder / name for name in (LINES, SUMMARY, *pictures)]
    ownership.check(paths, request.owner, instead="name another folder with --output_dir")
    model, tokenizer, settings, named = load(request)
    source = Source(read_text(request, tokenizer), tokenizer)
    most, longest = positions_of(model.config), max(request.asked_lengths())
    if most is not None and longest + 128 > most:
        raise UsageError(f"--lengths {longest}: a question does not fit the model's {most} positions")
    about = describe(request, settings, named, str(model.dtype), source)
    asked = [(ratio, task) for ratio in request.asked_ratios(settings.bound_ratio) for task in request.tasks]
    lines = read_lines(request, about, asked)
    todo = [each for each in asked if each not in {(line["ratio"], line["task"]) for line in lines}]
    bar = tqdm(todo, desc="asking")
    for ratio, task in bar:
        bar.set_postfix_str(f"{task} at {ratio:g}")
        rule = rule_at(settings, tokenizer, ratio)
        lines += list(ask(model, rule, settings, ratio, task, source, request))
        content = "".join(json.dumps(line) + "\n" for line in [{"about": about}, *lines])
        write_bytes(request.folder / LINES, content.encode(), request.owner)
    rows = scores.summarize(lines)
    write_bytes(request.folder / SUMMARY, as_json({"about": about, "rows": rows}).encode(), request.owner)
    for name, picture in plotting.heat_maps(lines, METHODS[settings.method].label).items():
        write_bytes(request.folder / name, picture, request.owner)
    return scores.as_table(rows)


def load(request: RecallRequest):
    """The model in evaluation mode, its tokenizer, the settings of its method, and what names the model."""
    bf16 = has_bf16() if request.mixed_precision == "auto" else request.mixed_precision == "bf16"
    precision = "bf16" if bf16 else "no"
    if request.model_dir:
        results = results_of_run(request.model_dir)
        tokenizer, model, trained = load_run(request.model_dir, precision, request.adapter)
        named = [results["model"], ownership.file_identity(str(Path(request.model_dir) / RESULTS))]
    else:
        name = request.model_name_or_path or EMBEDDED
        trained = Settings(method=request.method, model_name_or_path=name, mixed_precision=precision, eval_only=True)
        if METHODS[request.method].uses_sentinels:
            raise UsageError(f"{request.method} needs a trained run: name its folder with --model_dir")
        tokenizer, model, revision = load_model(trained)
        named = [file_name(Path(name).name), revision or weights_digest(trained)]
    settings = settings_for(request, trained)
    if METHODS[settings.method].uses_sentinels and CL_TOKEN not in tokenizer.get_vocab():
        raise UsageError(f"{request.model_dir} was not trained with {settings.method}: it has no sentinels")
    return model.eval().to(processes.state().device), tokenizer, settings, named


def settings_for(request: RecallRequest, trained: Settings) -> Settings:
    """The run's settings with what the request changes; under another method than the run's the ratio is 0."""
    method = request.method or trained.method
    asked = {name: getattr(request, name) for name in ("sink_tokens", "max_span_length")}
    changes = {name: value for name, value in asked.items() if value is not None}
    changes |= {} if method == trained.method else {"bound_ratio": 0.0}
    settings = replace(under_method(trained, method), protocol="matched", lowest_bound_ratio=None, **changes)
    settings.check(in_blocks=False)
    return settings


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
    """The answers to a task at one ratio, a dictionary for each document. UsageError if the ratio cannot be had."""
    strict = request.max_span_length is not None
    spans = api.SpanLengths(settings.max_span_length, settings.span_sampler == "shortest", strict)
    found = []
    try:
        for index, (length, example) in enumerate(
            examples(task, source, request.asked_lengths(), request.documents, request.seed)
        ):
            document = example.document
            marked = api.mark(document, rule, ratio, spans, [request.seed, index]) if ratio else document
            found.append((index, length, example, marked))
    except ValueError as error:
        raise UsageError(f"{task} at ratio {ratio:g}: {error}") from error
    for start in range(0, len(found), request.batch_size):
        batch = found[start : start + request.batch_size]
        if task == "ask_many":
            yield from (_ask_many(model, rule, ratio, *each) for each in batch)
        else:
            yield from _ask_one(model, rule, ratio, task, batch, checked=start == 0)


def _ask_one(model, rule: Rule, ratio: float, task: str, batch: list[tuple], checked: bool) -> Iterator[dict]:
    """The answers to one question about each document of a batch; the mask is asked, too, if they are `checked`."""
    documents = [document for *_, document in batch]
    questions = [example.questions[0] for _, _, example, _ in batch]
    gone = [measuring.have_left(rule, *each) for each in zip(documents, questions)]
    changed = [measuring.without(rule, *each) for each in zip(documents, questions, gone)]
    answers = measuring.from_cache(model, rule, documents, questions)
    none = measuring.from_cache(model, rule, changed, questions)
    full = measuring.in_full(model, [example.document for _, _, example, _ in batch], questions)
    apart = _check(model, rule, documents, questions, answers) if checked else None
    for row, (index, length, example, _) in enumerate(batch):
        nats = {"nats": answers, "none": none, "full": full}
        yield {
            **_line(task, ratio, index, length, example, gone[row]),
            "kept": answers.kept[row],
            **{name: _mean_of(found.nats[row], gone[row]) for name, found in nats.items()},
            "exact": answers.exact[row],
            "exact_none": none.exact[row],
            "exact_full": full.exact[row],
            "mask_apart": apart,
        }


def _mean_of(nats: list[float], gone: list[bool]) -> float:
    """Nats a token over the tokens that had left, or over all if none had."""
    return float(np.mean([one for one, left in zip(nats, gone) if left or not any(gone)]))


def _ask_many(model, rule: Rule, ratio: float, index: int, length: int, example: Example, document: list[int]) -> dict:
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


def describe(request: RecallRequest, settings: Settings, named: list, dtype: str, source: Source) -> dict:
    """All that decides the answers but ratio and task."""
    method = METHODS[settings.method]
    return {
        "method": settings.method,
        "model": named,
        "step": request.step,
        "options": {name: getattr(settings, name) for name in api.options_of(method)},
        "max_span_length": settings.max_span_length,
        "longest_is_strict": request.max_span_length is not None,
        "shortest_spans": settings.span_sampler == "shortest",
        "recipe": settings.recipe,
        "documents": request.documents,
        "lengths": request.asked_lengths(),
        "text": digest(json.dumps(list(source.text))),
        "seed": request.seed,
        "dtype": dtype,
    }


def read_lines(request: RecallRequest, about: dict, asked: Collection[tuple[float, str]] = ()) -> list[dict]:
    """The answers that are there already, without those `asked` for if the request wants them measured again.

    UsageError if other settings made them, unless they are to be replaced. RunError if they are damaged.
    """
    path = request.folder / LINES
    try:
        lines = [strict_json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {one_line(error)}") from error
    alike = bool(lines) and lines[0] == {"about": json.loads(json.dumps(about))}
    if not alike and not request.overwrite:
        raise UsageError(f"{path} was made with other settings: --overwrite replaces it, --output_dir names another")
    if not alike:
        ownership.remove(
            request.owner, lambda name: Path(request.owner, name).parent == request.folder and plotting.is_ours(name)
        )
        return []
    for number, line in enumerate(lines[1:], start=2):
        if not _is_answer(line):
            raise RunError(f"{path} is damaged in line {number}: --output_dir names another folder")
    again = set(asked) if request.overwrite else set()
    return [line for line in lines[1:] if (line["ratio"], line["task"]) not in again]


def _is_answer(line) -> bool:
    """Whether this is a line that `ask` has made."""
    if not fields.is_object(line) or not fields.is_name(line.get("task")) or line["task"] not in TASKS:
        return False
    if not fields.is_ratio(line.get("ratio")) or not fields.is_count(line.get("length")) or not line["length"]:
        return False
    needed = {*OF_A_LINE, *(OF_MANY if line["task"] == "ask_many" else OF_ONE)}
    return all(isinstance(line.get(name), bool) or fields.number(line.get(name)) is not None for name in needed)
