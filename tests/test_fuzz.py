"""Every reader of files that a user can hand over, on damaged ones: they are read, or refused in one line.

What is read must serve whoever uses it. Cases are counted, and the counts shown at the end of a test run.
"""

import csv
import io
import itertools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from kv_compression import settings as run_settings
from kv_compression.data import blocks as data_blocks
from kv_compression.data import reading
from kv_compression.generation import comparing, documents, records, scorers
from kv_compression.generation import run as generation_run
from kv_compression.generation.scoring import score_records
from kv_compression.io import results, tables, tensor_files
from kv_compression.io.errors import UsageError
from kv_compression.io.tensor_files import read_tensors, write_tensors
from kv_compression.methods import rule_of
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.scattered_attention import ScatteredAttention
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from kv_compression.reporting import collecting, drawing, writing
from kv_compression.training import loading, run_folder
from kv_compression.training.checkpoints import Checkpoints, capture, restore
from kv_compression.training.evaluation import Evaluation
from tests import fuzzing, made_results
from tests.fuzzing import altered, damaged, damaged_json, fuzz
from tests.models import random_model

CL, CR = 62, 63


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What takes its time and is not what is tried here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr("kv_compression.generation.comparing.RESAMPLES", 20)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


TEXTS = [
    " = Title = \n",
    "a line, with \"quotes\" | and 'more'",
    "été 東京 😀",
    "",
    "1",
    "The cat sees the dog near a house.",
]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def text_file(draw, suffix: str) -> bytes:
    if suffix == ".txt":
        return damaged(draw, "\n".join(TEXTS).encode())
    if suffix == ".csv":
        rows = altered(draw, [[row["id"], row["text"]] for row in ROWS]) if draw.random() < 0.5 else []
        whole = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
        table = io.StringIO()
        csv.writer(table, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows(
            [["id", "text"], *(rows if whole else [list(row.values()) for row in ROWS])]
        )
        content = table.getvalue().encode("utf-8", "surrogatepass")
        return content if whole and draw.random() < 0.5 else damaged(draw, content)
    if suffix == ".json":
        return damaged_json(draw, ROWS)
    lines = [json.dumps(row).encode() for row in ROWS]
    place = draw.randrange(len(lines))
    lines[place] = damaged_json(draw, ROWS[place])
    return b"\n".join(lines)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ".jsonl"])
def test_text_files(suffix, tmp_path, tokenizer, monkeypatch):
    path = tmp_path / f"text{suffix}"
    monkeypatch.setattr(data_blocks, "cached_tensors", lambda kind, key, compute: compute())

    def use(content: bytes) -> None:
        path.write_bytes(content)
        texts = reading.read_texts(str(path), "train_file")
        assert len(data_blocks.document_numbers(texts)) == len(texts) > 0
        encoded = data_blocks._tokenize_batch(
            {"text": texts}, list(range(len(texts))), tokenizer, "train", None, "token"
        )
        assert len(encoded["input_ids"]) == len(texts)
        documents.documents_digest(documents.pick_documents(texts, 2, 2, 2))

    fuzz(f"text files, {suffix}", lambda draw: text_file(draw, suffix), use)


RECORD = {
    "index": 0,
    "prefix": "the cat",
    "reference": " sees the dog",
    "continuations": [" sees the dog", " hears a bird"],
    "prefix_tokens": 4,
    "cache_length": 2,
    "new_tokens": 8,
    "seconds": 0.5,
}
ABOUT = {
    "method": "kv_compression",
    "bound_ratio": 0.5,
    "protocol": "matched",
    "preset": "embedded",
    "documents_sha256": "d0c5",
    "top_p": 0.9,
    "continuations": 2,
}
MADE_FROM = {"file_sha256": "0"} | scorers.ScorerModels("encoder", 6, "model").record()


def bert(references, texts):
    return [0.5 + len(text) / 1000 for text in texts]


def fluency(texts):
    return [(float(len(text)), len(text.encode()) // 2) for text in texts]


def use_generation(path: Path) -> None:
    """What eval_generation.py and generate_c4.py do with a generation file, but for the models."""
    about = records.read_about(path) or {}
    models = scorers.scorers(about.get("preset", "embedded"), None, None)
    assert models.bertscore
    records.continue_file(path, about, overwrite=False)
    found = generation_run.score_file(path, about, MADE_FROM, (bert, fluency))
    results.write_json(records.scores_path(path), found)
    assert generation_run.read_scores(records.scores_path(path)) is not None
    use_scores(found)


def use_scores(found: dict) -> None:
    """What eval_generation.py shows of scores: tables that nothing breaks."""
    other = GOOD_SCORES | {"method": "local_attention", "documents_sha256": found.get("documents_sha256")}
    scored = {Path("a.jsonl"): found, Path("b.jsonl"): other}
    table = [comparing.row(path, scores) for path, scores in scored.items()]
    assert len(comparing.as_text(table, comparing.names_of(scored)).splitlines()) == 3
    assert all(line.isprintable() for line in comparing.comparisons(scored))
    assert len(tables.csv_table(table).splitlines()) == 3


RECORDS = [RECORD | {"index": index} for index in range(3)]
SCORED = score_records(RECORDS, bert, fluency)
GOOD_SCORES = (
    ABOUT
    | MADE_FROM
    | {"num_documents": 3, "cache_fraction": 0.5}
    | dict.fromkeys(comparing.METRICS, {"mean": 1.0, "low": 0.5, "high": 1.5})
    | SCORED
    | {"documents": {str(index): found for index, found in SCORED["documents"].items()}}
)


def test_generation_files(tmp_path):
    path = tmp_path / "generation.jsonl"
    results.write_json(records.about_path(path), ABOUT)

    def make(draw) -> bytes:
        lines = [json.dumps(record).encode() for record in RECORDS]
        place = draw.randrange(len(lines))
        lines[place] = damaged_json(draw, RECORDS[place])
        return b"\n".join(lines) + b"\n" * draw.randrange(2)

    def use(content: bytes) -> None:
        path.write_bytes(content)
        use_generation(path)

    fuzz("generation.jsonl", make, use, ends=["read"])  # lines that are none are passed over and counted


def test_what_is_told_about_a_generation_file(tmp_path):
    path = tmp_path / "generation.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")

    def use(content: bytes) -> None:
        records.about_path(path).write_bytes(content)
        use_generation(path)

    fuzz("generation.about.json", lambda draw: damaged_json(draw, ABOUT), use)


SETTINGS = run_settings.resolve({"preset": "embedded", "method": "kv_compression", "bound_ratio": 0.5})
EVALUATION = Evaluation(20.0, 3.0, 3.0, 3.1, 100, 4, 0.5, 0.6, 64.0, 128, 1.5)
RESULTS = made_results.results() | {
    "settings": SETTINGS.identity(),
    **asdict(EVALUATION),
    "untrained": asdict(EVALUATION),
    "wall_seconds": 3.5,
    "device": "cpu (x86_64, 1 threads)",
    "blocks_sha256": {"test": "0" * 64},
    "sentinels": {"cl_id": 62, "cr_id": 63},
}
OTHERS = [
    RESULTS | {"method": "local_attention", "nll_per_token": 3.2, "sentinels": None},
    RESULTS | {"method": "sink_attention", "bound_ratio": 0.3, "kept_keys_mean": 90.0},
    RESULTS | {"method": "full_attention", "bound_ratio": 0.0, "nll_per_token": 2.9, "kept_keys_mean": 128.0},
]


ONE_IN = 10  # a report takes a fifth of a second


def collect(folder: Path, case: int) -> None:
    """What report.py reads; of one case in `ONE_IN`, the whole report."""
    if case % ONE_IN:
        collecting.collect(folder)
    else:
        write_report(folder, folder.parent / "out")


def write_report(folder: Path, out: Path) -> None:
    """All of report.py; nothing in the files may break a line or a table of what it writes."""
    path = writing.write(collecting.collect(folder), out)
    columns = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        assert line.isprintable(), line
        bars = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else 0
        assert bars == columns or not columns or not bars, line
        columns = bars
    for table in out.glob("*.csv"):
        rows = list(csv.reader(table.read_text(encoding="utf-8").splitlines(), strict=True))
        assert len({len(row) for row in rows}) == 1
    for name in out.iterdir():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name.name)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots as far as they are computed: drawing takes a second."""

    def draw(path, picture):
        assert all(label.isprintable() for panel in picture.panels for label in [curve.label for curve in panel.curves])
        list(map(drawing.drawable, picture.panels))

    monkeypatch.setattr(drawing, "draw", draw)


def test_results(tmp_path, undrawn):
    made_results.write(tmp_path / "in", *OTHERS)
    folder, cases = tmp_path / "in" / "x", itertools.count()
    folder.mkdir()

    def use(content: bytes) -> None:
        (folder / "results.json").write_bytes(content)
        collect(tmp_path / "in", next(cases))
        found = results.read_results(folder)
        assert results.in_one_line(found).isprintable()
        assert all(line.isprintable() for line in results.table([found, RESULTS]).splitlines())
        run_folder.differences(found["settings"], SETTINGS.identity())
        settings = loading.recorded_settings(found, "x")
        rule_of(settings, CL, CR)
        assert settings.method in loading.METHODS

    fuzz("results.json", lambda draw: damaged_json(draw, RESULTS), use)


def test_scores(tmp_path, undrawn):
    made_results.write(tmp_path / "in", GOOD_SCORES | {"method": "local_attention"})
    path, cases = tmp_path / "in" / "scores.json", itertools.count()

    def use(content: bytes) -> None:
        path.write_bytes(content)
        collect(tmp_path / "in", next(cases))
        found = generation_run.read_scores(path)
        if found is None:  # scored again
            raise UsageError("no scores")
        use_scores(found)

    fuzz("scores.json", lambda draw: damaged_json(draw, GOOD_SCORES), use)


def test_scores_before_fine_tuning(tmp_path):
    def use(content: bytes) -> None:
        (tmp_path / "untrained.json").write_bytes(content)
        found = run_folder.read_untrained(tmp_path)
        if found is None:  # scored again
            raise UsageError("no scores")
        assert results.in_one_line(RESULTS | found | {"untrained": found}).isprintable()

    fuzz("untrained.json", lambda draw: damaged_json(draw, asdict(EVALUATION)), use)


def altered_tensors(draw, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which some are gone, or of other names, types, shapes or values."""
    tensors = dict(tensors)
    for _ in range(draw.choice([1, 1, 2])):
        name, other = draw.choice(list(tensors)), draw.choice(list(tensors))
        tensor = tensors[name]
        match draw.randrange(8):
            case 0:
                del tensors[name]
            case 1:
                names = ["x", "optimizer.x", "optimizer.99.step", f"{name}.0", "keys.7"]
                tensors[draw.choice(names)] = tensors.pop(name)
            case 2:
                kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
                tensors[name] = tensor.to(draw.choice(kinds))
            case 3:
                shapes = [(0,), (), (1,), tensor.shape[::-1], (*tensor.shape, 1), (1, *tensor.shape)]
                tensors[name] = torch.zeros(draw.choice(shapes), dtype=tensor.dtype)
            case 4:
                tensors[name], tensors[other] = tensors[other], tensors[name]
            case 5 | 6:
                changed = tensor.clone().flatten()
                values = [0, 1, -1, 7, 9, 2**40] if not tensor.is_floating_point() else [0, -1, float("nan"), 1e30]
                if len(changed):
                    value = draw.choice(values)
                    changed[draw.randrange(len(changed))] = value % 256 if tensor.dtype == torch.uint8 else value
                tensors[name] = changed.view(tensor.shape)
            case 7:
                tensors[name] = tensor[: len(tensor) // 2] if tensor.dim() else tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}


def in_order(content: bytes) -> bytes:
    """A good file of tensors with its header in order: safetensors writes it as it comes, but a case comes again."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return content[:8] + header.encode().ljust(size) + content[8 + size :]


def tensor_file(draw, path: Path, tensors: dict, note) -> None:
    """A damaged file of tensors: by accident, so that its hash tells, or with a right hash over wrong content."""
    kind = draw.random()
    if kind < 0.3:
        write_tensors(path, tensors, note)
        path.write_bytes(damaged(draw, in_order(path.read_bytes())))
        return
    changed = altered(draw, note, UNLIKE) if kind > 0.7 else note
    write_tensors(path, altered_tensors(draw, tensors) if kind < 0.8 else tensors, changed)


# What a note with a right hash can hold: it was JSON once.
UNLIKE = [value for value in fuzzing.VALUES if value == value and value not in ("\ud800", "@deep@")]
UNLIKE = [value for value in UNLIKE if not isinstance(value, float) or abs(value) < float("inf")]


def test_checkpoints(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))

    def set_up() -> tuple:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=9)
        return SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups), scheduler

    def step(optimizer, scheduler) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.optimizer.step()
        scheduler.step()

    optimizer, scheduler = set_up()
    for _ in range(4):
        step(optimizer, scheduler)
    tensors, state = capture(model, optimizer, scheduler, 40, [1.0] * 4, 2.5)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    note = {"step": 4, "identity": {"seed": 0, "method": "kv_compression"}, "state": state}
    path = tmp_path / "checkpoints" / "step_00000004.safetensors"
    path.parent.mkdir()
    before = torch.get_rng_state()

    def use(draw) -> None:
        tensor_file(draw, path, tensors, note)
        found = Checkpoints(tmp_path, note["identity"]).read()
        capsys.readouterr()  # it is told of damage
        if found is None:  # the run begins anew
            raise UsageError("no checkpoint")
        optimizer, scheduler = set_up()
        tokens, losses, seconds = restore(found, model, optimizer, scheduler, 9)
        assert tokens >= 0 <= seconds
        assert len(losses) == found.step
        step(optimizer, scheduler)
        torch.rand(2)
        model.zero_grad()

    fuzz("checkpoints", lambda draw: draw, use)
    torch.set_rng_state(before)


def test_saved_caches(tmp_path):
    model = random_model("gpt_neox", "sdpa")
    files = []
    ids = torch.tensor([[3, CL, 4, 5, CR, 6, CL, 7, 8, 9], [3, 4, CL, 5, 6, 7, CR, CL, 0, 0]])
    real = torch.tensor([[1] * 10, [1] * 8 + [0] * 2])
    options = {"sink_tokens": 2, "cr_tokens": 2, "cr_visibility": "context", "recent_tokens": 2}
    rules = [KVCompression(CL, CR), KVCompression(CL, CR, **options), FullAttention()]
    rules += [LocalAttention(ratio=0.5), SinkAttention(ratio=0.5), ScatteredAttention(ratio=0.5)]
    for number, rule in enumerate(rules):
        cache = SentinelCache(rule=rule)
        with Patch(model, rule), torch.no_grad():
            model(ids, attention_mask=real, past_key_values=cache)
        cache.save(tmp_path / str(number))
        files.append(read_tensors(tmp_path / str(number)))
    path = tmp_path / "cache"

    def use(draw) -> None:
        tensor_file(draw, path, *draw.choice(files))
        cache = SentinelCache.load(path)
        more = torch.tensor([[5, CL, 6, CR, 7]] * max(len(cache.lengths), 1))
        with Patch(model, cache.rule), torch.no_grad():
            model(more[:, :4], past_key_values=cache)
            model(more[:, 4:], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        cache.drop_oldest(torch.tensor([1]))

    fuzz("saved caches", lambda draw: draw, use)


def test_tensors_kept_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([1.5])}
    tensor_files.cached_tensors("kind", {"of": 1}, lambda: made)
    (path,) = (tmp_path / "kv_compression" / "kind").iterdir()
    good = in_order(path.read_bytes())

    def use(content: bytes) -> None:
        path.write_bytes(content)
        again = []
        found = tensor_files.cached_tensors("kind", {"of": 1}, lambda: again.append(1) or made)
        assert found.keys() == made.keys()
        assert all(torch.equal(found[name], made[name]) for name in made)
        if again:
            raise UsageError("made again")

    fuzz("tensors kept for the next run", lambda draw: damaged(draw, good), use, ends=["refused"])


def test_every_letter_of_a_plot_is_drawn_as_it_is(tmp_path):
    found = RESULTS | {"settings": RESULTS["settings"] | {"model_name_or_path": "$\\x^{$"}}
    found |= {"protocol": "paper"}
    ratios = [found | {"bound_ratio": ratio, "kept_keys_mean": 100 * (1 - ratio)} for ratio in (0.3, 0.6)]
    write_report(made_results.write(tmp_path / "in", *ratios), tmp_path / "out")
    assert list((tmp_path / "out").glob("*.png"))
