"""What the cache remembers: the tasks, the scores from cache and mask, and eval_recall.py as a user calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import eval_recall
import run_clm
from kv_compression.data.asking import CUES, FACTS, HELD_OUT, SYLLABLES, THING_FACTS
from kv_compression.io import ownership
from kv_compression.io.errors import RunError
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.recall import measuring, scores, tasks
from kv_compression.recall import run as recall_run
from kv_compression.recall.request import RecallRequest
from kv_compression.recall.tasks import Question, Source
from kv_compression.reporting import collecting, remembering, writing
from kv_compression.spans.exact import exact_spans
from tests.conftest import write_tiny_model
from tests.models import random_model
from tests.runs import KV, call_script, make_run, write_texts, write_tied_model

CL, CR = 1, 2


class Letters:
    """A tokenizer of letters: ids from 100 on."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [100 + ord(letter) for letter in text]}


def letters(ids) -> str:
    return "".join(chr(token - 100) for token in ids if token >= 100)


SOURCE = Source(np.random.default_rng(0).integers(10, 90, 5000).tolist(), Letters())


@settings(deadline=None)
@given(st.sampled_from(list(tasks.TASKS)), st.integers(0, 10_000), st.sampled_from(tasks.DEPTHS))
def test_a_document_says_what_is_asked_where_it_says_so_and_nowhere_without(task, seed, depth):
    example = tasks.TASKS[task](SOURCE, 512, depth, np.random.default_rng(seed))
    assert len(example.document) == 512
    assert example == tasks.TASKS[task](SOURCE, 512, depth, np.random.default_rng(seed))
    for question in example.questions:
        first, last = question.needed
        assert example.document[first : last + 1] == question.answer
        assert len(question.other) == len(question.answer) and question.other != question.answer
    if task != "repeat":
        answer = letters(example.questions[0].answer)
        assert letters(example.document).count(answer) == 1
        assert not set(letters(example.questions[0].other).split(", ")) & set(answer.split(", "))


def test_stretches_of_the_text_never_overlap():
    text = Source(list(range(500)), Letters())
    for seed in range(50):
        drawn = text.stretches([300, 48, 48], np.random.default_rng(seed))
        assert [len(stretch) for stretch in drawn] == [300, 48, 48]
        assert len({token for stretch in drawn for token in stretch}) == 396
    with pytest.raises(ValueError, match="500 tokens, too few for documents of 490"):
        text.stretches([490, 48], np.random.default_rng(0))


@pytest.mark.parametrize(("task", "count"), [("key_value", 4), ("ask_many", 6), ("passkey", 1)])
def test_numbers_names_and_wordings_are_none_of_those_trained_on(task, count):
    said = set()
    for seed in range(30):
        example = tasks.TASKS[task](SOURCE, 512, 0.5, np.random.default_rng(seed))
        said |= {letters(question.answer) for question in example.questions}
        text = letters(example.document) + letters(example.questions[0].ids)
        assert not any(
            words.split("{")[0].strip() in text
            for pair in FACTS + THING_FACTS
            for words in pair
            if words[0] != " " or "{name}" not in words[:8]
        )
        assert not any(cue and cue in text for cue in CUES)
    assert all(int(number) % HELD_OUT == 0 for number in said)
    assert not any(syllable.capitalize() in tasks.NAMES for syllable in SYLLABLES)


def test_where_a_code_stands_follows_from_its_depth():
    places = [
        tasks.passkey(SOURCE, 512, depth, np.random.default_rng(1)).questions[0].needed[0] for depth in tasks.DEPTHS
    ]
    assert places == sorted(places) and places[0] < 40 and places[-1] > 500
    assert np.ptp(np.diff(places)) <= 1


def marked(rule, document: list[int], ratio: float = 0.5) -> list[int]:
    if not rule.uses_sentinels:
        return document
    spans = exact_spans(len(document), ratio, 6, np.random.default_rng(0), first=rule.sink_tokens)
    return insert_sentinels(document, spans, CL, CR)


RULES = [
    KVCompression(CL, CR, 0.5, sink_tokens=1, recent_tokens=3),
    KVCompression(CL, CR, 0.5),
    LocalAttention(ratio=0.6),
    SinkAttention(ratio=0.5, sink_tokens=1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.ratio}")
def test_cache_mask_and_a_restatement_agree(rule):
    model = random_model("llama", dtype=torch.float64)
    draw = np.random.default_rng(5)
    documents = [draw.integers(3, 64, size).tolist() for size in (40, 33, 40)]
    questions = [
        Question(draw.integers(3, 64, asked).tolist(), draw.integers(3, 64, answer).tolist(), (4, 6), [])
        for asked, answer in ((4, 3), (2, 5), (6, 1))
    ]
    rows = [marked(rule, document) for document in documents]
    cached = measuring.from_cache(model, rule, rows, questions)
    masked = measuring.in_one_pass(model, rule, rows, questions)
    assert cached.exact == masked.exact
    for row, (ids, question) in enumerate(zip(rows, questions)):
        whole = torch.tensor([ids + question.ids + question.answer])
        mask = torch.zeros(1, 1, whole.shape[1], whole.shape[1], dtype=torch.float64)
        mask.masked_fill_(~rule.mask(whole)[:, None], -torch.inf)
        with torch.no_grad():
            logits = model(whole, attention_mask=mask, position_ids=rule.position_ids(whole)).logits[0]
        log_p = logits.log_softmax(-1)
        count = len(question.answer)
        nats = [-log_p[-count - 1 + step, token].item() for step, token in enumerate(question.answer)]
        # The scores are taken in single precision, the model's states are in double.
        assert cached.nats[row] == pytest.approx(nats, abs=1e-5)
        assert masked.nats[row] == pytest.approx(nats, abs=1e-5)
        greedy = [int(logits[-count - 1 + step].argmax()) for step in range(count)]
        assert cached.exact[row] == (greedy == question.answer)


def test_an_answer_is_exact_if_greedy_generation_gives_it():
    model = random_model("llama", dtype=torch.float64)
    document, question = list(range(3, 40)), [5, 9]
    with torch.no_grad():
        generated = model.generate(torch.tensor([document + question]), max_new_tokens=4, do_sample=False)[0, -4:]
    right, wrong = generated.tolist(), [*generated.tolist()[:3], (int(generated[3]) + 1) % 64]
    found = measuring.in_full(
        model, [document] * 2, [Question(question, answer, (0, 0), []) for answer in (right, wrong)]
    )
    assert found.exact == [True, False]


@given(st.integers(0, 1000), st.sampled_from(RULES + [FullAttention()]))
def test_what_has_left_is_what_the_question_cannot_see(seed, rule):
    draw = np.random.default_rng(seed)
    document = draw.integers(3, 64, 30).tolist()
    first = int(draw.integers(0, 28))
    question = Question(draw.integers(3, 64, 2).tolist(), [7], (first, min(first + 2, 29)), [60, 61, 62])
    ids = marked(rule, document) + question.ids
    seen = rule.mask(torch.tensor([ids]))[0, len(ids) - 1]
    text = [place for place, token in enumerate(ids) if token not in (CL, CR)]
    expected = [not seen[text[number]] for number in range(question.needed[0], question.needed[1] + 1)]
    gone = measuring.have_left(rule, marked(rule, document), question)
    assert gone == expected
    changed = measuring.without(rule, marked(rule, document), question, gone)
    places = dict(zip(range(first, question.needed[1] + 1), zip(gone, question.other)))
    text_only = [token for token in changed if token not in (CL, CR)]
    assert text_only == [
        places[at][1] if at in places and places[at][0] else token for at, token in enumerate(document)
    ]


def test_all_questions_asked_of_one_cache_are_answered_as_alone():
    model = random_model("llama", dtype=torch.float64)
    document = np.random.default_rng(0).integers(3, 64, 50).tolist()
    rule = RULES[0]
    questions = [Question([5, number], [number + 1], (4, 6), []) for number in range(10, 14)]
    found = measuring.together(model, rule, marked(rule, document), document, questions)
    assert sum(found.nats, []) == pytest.approx(sum(found.alone, []), abs=1e-9)
    assert len(set(sum(found.nats, []))) == 4 and found.bytes < 0.6 * found.bytes_full


def line(left: float, none: float, nats: float, full: float, **more) -> dict:
    scored = {"none": none, "nats": nats, "full": full, "exact": nats < 1, "exact_none": False, "exact_full": True}
    return {"task": "passkey", "ratio": 0.5, "left": left, "kept": 64, "length": 128, "distance": 9} | scored | more


def test_recovered_recall_counts_only_what_had_left():
    lines = [line(1.0, 3, 2, 1), line(0.5, 5, 2, 1), line(0.0, 9, 0, 0), line(1.0, 4, 0.5, 1)]
    (row,) = scores.summarize(lines)
    assert row["recovered"] == pytest.approx((12 - 4.5) / (12 - 3))
    assert row["low"] < row["recovered"] < row["high"]
    assert (row["documents"], row["left"], row["kept_share"]) == (4, 3, 0.5)
    assert (row["exact"], row["whole"]) == (0.5, 2)
    (row,) = scores.summarize([line(0.0, 9, 0, 0)])
    assert row["left"] == 0 and "recovered" not in row and "0/1" in scores.as_table([row])
    assert scores.recovered([2.0], [2.0], [1.0]) == 0 and scores.recovered([2.0], [1.0], [1.0]) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    model = write_tiny_model(folder / "model", positions=1024)
    asked = {"echo_share": 0.5, "fact_share": 0.0, "answer_weight": 3.0, "sentinel_init": "period", "block_size": 64}
    ranged = {"lowest_bound_ratio": 0.3, "span_sampler": "shortest", "lora_target_modules": ("all-linear",)}
    return make_run(folder / "run", model, **KV | asked | ranged)


def test_training_says_what_share_asked(run):
    results = json.loads((Path(run) / "results.json").read_text())
    assert 0.2 < results["training"]["asking_fraction"] < 0.8
    assert 0 < results["training"]["answer_fraction"] < results["training"]["asking_fraction"]
    assert results["settings"]["lowest_bound_ratio"] == 0.3


def test_eval_recall_measures_once_and_says_where_it_stopped(run, monkeypatch, capsys):
    text = write_texts(Path(run).parent)["test_file"]
    flags = ["eval_recall.py", "--model_dir", run, "--text_file", text, "--documents", "5", "--mixed_precision", "no"]
    flags += ["--lengths", "512", "600", "--ratios", "0.5"]
    status, out, _ = call_script(eval_recall.main, [*flags, "--tasks", "passkey"], monkeypatch, capsys)
    assert status == 0 and out[0].split()[:2] == ["task", "ratio"]
    lines = [json.loads(line) for line in (Path(run) / "recall.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 2 * 5 and (Path(run) / "passkey_0.5.png").read_bytes()[:4] == b"\x89PNG"
    assert all(line["kept"] == round(0.5 * line["length"]) for line in lines[1:])
    assert all(line["mask_apart"] < 1e-4 for line in lines[1:] if line["mask_apart"] is not None)

    def no_more(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "from_cache", no_more)
        again = call_script(eval_recall.main, [*flags, "--tasks", "passkey"], monkeypatch, capsys)
    assert again[:2] == (0, out)
    refused = call_script(eval_recall.main, [*flags, "--tasks", "passkey", "--ratios", "0.99"], monkeypatch, capsys)
    assert refused[0] == 2 and "passkey at ratio 0.99: ratio 0.99 asks to remove" in refused[2][0]
    status, out, _ = call_script(
        eval_recall.main,
        [*flags, "--tasks", "repeat", "key_value", "variables", "copy", "ask_many"],
        monkeypatch,
        capsys,
    )
    assert status == 0 and [row.split()[0] for row in out if row][1:8] == [
        *["passkey", "passkey", "repeat", "key_value", "variables", "copy"],
        "task",
    ]
    summary = json.loads((Path(run) / "recall.json").read_text())
    tasks_of_rows = ["passkey", "passkey", "repeat", "key_value", "variables", "copy", "ask_many"]
    assert [row["task"] for row in summary["rows"]] == tasks_of_rows
    assert summary["rows"][-1]["apart"] < 1e-4
    status, _, errors = call_script(eval_recall.main, [*flags, "--seed", "1"], monkeypatch, capsys)
    assert status == 2 and "made with other settings" in errors[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "an untrained model has no method"),
        (["--method", "sink_attention"], "say where the answers go"),
        (["--method", "local_attention", "--output_dir", "{}", "--ratios", "1"], "at least 0 and below 1"),
        (["--method", "local_attention", "--output_dir", "{}", "--ratios", "half"], "--ratios half: give numbers"),
        (["--method", "local_attention", "--output_dir", "{}", "--lengths", "64"], "at least 128"),
        (["--method", "local_attention", "--output_dir", "{}", "--lengths", "4096"], "fit the model's 1024 positions"),
        (["--method", "local_attention", "--output_dir", "{}", "--lengths", "128"], "128 tokens is too short"),
        (["--method", "local_attention", "--output_dir", "{}", "--tasks", "sing"], "--tasks sing: choose from"),
        (["--method", "kv_compression", "--output_dir", "{}"], "needs a trained run"),
        (["--method", "local_attention", "--output_dir", "{}", "--sink_tokens", "2"], "--sink_tokens is an option of"),
        (["--method", "sink_attention", "--output_dir", "{}", "--step", "2"], "--step needs --model_dir"),
        (["--model_dir", "nowhere"], "is not the output folder"),
    ],
)
def test_bad_input_takes_one_line(flags, words, run, tmp_path, monkeypatch, capsys):
    flags = [flag.format(tmp_path / "out") for flag in flags]
    if "--method" in flags:
        flags += ["--model_name_or_path", str(Path(run).parent / "model")]
        flags += ["--text_file", write_texts(tmp_path)["test_file"]]
    status, _, errors = call_script(eval_recall.main, ["eval_recall.py", *flags], monkeypatch, capsys)
    assert status == 2 and len(errors) == 1 and words in errors[0]


def test_an_untrained_model_remembers_nothing_that_its_window_has_left(run, tmp_path, monkeypatch, capsys):
    flags = ["--method", "sink_attention", "--sink_tokens", "1", "--ratios", "0", "0.5", "--tasks", "passkey"]
    flags += ["--model_name_or_path", str(Path(run).parent / "model"), "--output_dir", str(tmp_path / "out")]
    flags += ["--text_file", write_texts(tmp_path)["test_file"], "--lengths", "512", "--documents", "5"]
    status, out, _ = call_script(eval_recall.main, ["eval_recall.py", *flags], monkeypatch, capsys)
    assert status == 0
    rows = json.loads((tmp_path / "out" / "recall.json").read_text())["rows"]
    assert [row["left"] for row in rows] == [0, 3] and rows[0]["kept"] == 512


def test_one_adapter_is_scored_at_any_ratio(run, tmp_path, monkeypatch, capsys):
    test_file = write_texts(tmp_path)["test_file"]

    def scored(*flags):
        flags = ["run_clm.py", "--eval_only", "--model_dir", run, "--test_file", test_file, *flags]
        status, _, errors = call_script(run_clm.main, flags, monkeypatch, capsys)
        assert (status, errors) == (0, [])
        return json.loads((Path(flags[-1]) / "results.json").read_text())

    trained = json.loads((Path(run) / "results.json").read_text())
    same = scored("--max_eval_blocks", "4", "--output_dir", str(tmp_path / "same"))
    assert same["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-6)
    other = scored("--bound_ratio", "0.3", "--output_dir", str(tmp_path / "other"))
    assert other["removed_fraction"] == pytest.approx(0.3, abs=0.01) and other["bound_ratio"] == 0.3
    assert other["settings"]["span_sampler"] == "shortest" and other["settings"]["lowest_bound_ratio"] is None
    assert other["settings"]["model_dir"].startswith("adapter_model.safetensors sha256:")
    assert other["untrained"] is None and "not fine-tuned" not in (tmp_path / "other" / "README.md").read_text()
    flags = ["run_clm.py", "--model_dir", run, "--test_file", test_file, "--output_dir", str(tmp_path / "new")]
    status, _, errors = call_script(run_clm.main, flags, monkeypatch, capsys)
    assert status == 2 and "needs --eval_only" in errors[0]
    status, _, errors = call_script(
        run_clm.main, ["run_clm.py", "--eval_only", "--model_dir", run], monkeypatch, capsys
    )
    assert status == 2 and "trained on files: name the text to score with --test_file" in errors[0]


def test_the_report_has_recall_against_kept_keys(tmp_path):
    def row(ratio, recovered):
        ends = {"low": recovered - 0.1, "high": recovered + 0.1, "recovered": recovered}
        return {"task": "repeat", "ratio": ratio, "documents": 20, "left": 20, "kept": 256 * (1 - ratio)} | ends

    for name, method, rows in (
        ("a", "kv_compression", [row(0.5, 0.6), row(0.9, 0.2)]),
        ("b", "sink_attention", [row(0.5, 0.0), row(0.9, 0.0)]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recall.json").write_text(json.dumps({"about": {"method": method}, "rows": rows}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "recall.json").write_text(json.dumps({"about": {"method": "x"}, "rows": [{"task": 3}]}))
    found = collecting.collect(tmp_path)
    assert [recall.method for recall in found.recalls] == ["kv_compression", "sink_attention"]
    assert found.unreadable == [("c/recall.json", "is damaged: rows")]
    assert "2 measurements of recall" in found.tally()
    picture = remembering.picture(found.recalls)
    assert [curve.points for curve in picture.panels[0].curves] == [
        [(pytest.approx(25.6), 0.2, pytest.approx(0.1), pytest.approx(0.3)), (128, 0.6, 0.5, 0.7)],
        [(pytest.approx(25.6), 0.0, -0.1, 0.1), (128, 0.0, -0.1, 0.1)],
    ]
    text = writing.write(found, tmp_path / "report").read_text()
    assert "| KV compression | repeat | 0.5 | - | 128.0 | 20 of 20 |" in text and "0.60 [0.50, 0.70]" in text
    assert (tmp_path / "report" / "report_recall.png").exists()
    assert (tmp_path / "report" / "report_recall.csv").read_text().count("\n") == 5


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_answers_that_anybody_may_have_written_are_read_or_refused_in_one_line(tmp_path, data):
    about = {"method": "sink_attention"}
    good = {name: 0.5 for name in recall_run.OF_A_LINE + recall_run.OF_ONE} | {"task": "repeat", "length": 256}
    name = data.draw(st.sampled_from([*good, "more"]))
    value = data.draw(
        st.one_of(st.none(), st.floats(), st.text(), st.booleans(), st.lists(st.integers()), st.integers())
    )
    line = data.draw(
        st.sampled_from([good | {name: value}, value, {key: one for key, one in good.items() if key != name}])
    )
    (tmp_path / "recall.jsonl").write_text("\n".join(json.dumps(each) for each in [{"about": about}, good, line]))
    request = RecallRequest(method="sink_attention", output_dir=str(tmp_path))
    try:
        lines = recall_run.read_lines(request, about)
    except RunError as error:
        assert "damaged in line 3" in str(error) or "cannot be read" in str(error)
    else:
        rows = scores.summarize(lines)
        assert rows and scores.as_table(rows)


def test_a_learning_curve_asks_the_adapters_that_a_run_kept(tmp_path, monkeypatch, capsys):
    model = write_tiny_model(tmp_path / "model", positions=1024)
    folder = make_run(tmp_path / "run", model, **KV, adapter_steps=2)
    kept = sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir())
    assert kept == ["step_00000002", "step_00000004"]
    last, early = (
        load_file(tmp_path / "run" / where / "adapter_model.safetensors") for where in (".", "adapters/" + kept[0])
    )
    same = load_file(tmp_path / "run" / "adapters" / kept[1] / "adapter_model.safetensors")
    assert all(torch.equal(last[name], same[name]) for name in last)
    assert any(not torch.equal(last[name], early[name]) for name in last)
    flags = ["eval_recall.py", "--model_dir", folder, "--tasks", "passkey", "--lengths", "512", "--documents", "5"]
    flags += ["--text_file", str(tmp_path / "test.jsonl"), "--mixed_precision", "no"]
    answers = []
    for step, where in (([], "."), (["--step", "4"], f"adapters/{kept[1]}"), (["--step", "2"], f"adapters/{kept[0]}")):
        status, _, errors = call_script(eval_recall.main, flags + step, monkeypatch, capsys)
        assert (status, errors) == (0, [])
        answers.append(json.loads((tmp_path / "run" / where / "recall.json").read_text())["rows"])
    assert answers[0] == answers[1] != answers[2]
    status, _, errors = call_script(eval_recall.main, [*flags, "--step", "3"], monkeypatch, capsys)
    assert status == 1 and "there is no adapter_config.json" in errors[0]
    assert not list(ownership.others(tmp_path / "run", ["run.lock"]))
    make_run(tmp_path / "run", model, **KV)  # another run leaves none of them there
    assert not list((tmp_path / "run").rglob("step_*/adapter_model.safetensors"))


def test_an_adapter_of_a_model_with_tied_embeddings_is_scored_as_it_was(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", write_tied_model(tmp_path / "model"), **KV)
    flags = ["run_clm.py", "--eval_only", "--model_dir", folder, "--test_file", str(tmp_path / "test.jsonl")]
    flags += ["--output_dir", str(tmp_path / "again")]
    status, _, errors = call_script(run_clm.main, flags, monkeypatch, capsys)
    assert (status, errors) == (0, [])
    trained, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "again"))
    assert again["perplexity"] == pytest.approx(trained["perplexity"], rel=1e-6)

    other = make_run(tmp_path / "other" / "run", write_tied_model(tmp_path / "other" / "model"), **KV | {"r": 4})
    (Path(folder) / "adapter_model.safetensors").write_bytes((Path(other) / "adapter_model.safetensors").read_bytes())
    flags[-1] = str(tmp_path / "wrong")
    status, _, errors = call_script(run_clm.main, flags, monkeypatch, capsys)
    assert status == 1 and "the adapter in" in errors[0] and "cannot be loaded" in errors[0]
