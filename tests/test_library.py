"""The package as other people's code uses it: plain transformers, plain peft, and the four names."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers

import kv_compression as kvc
from kv_compression import api
from kv_compression.data import embedded
from kv_compression.io.errors import RunError, UsageError
from kv_compression.methods import rule_of
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.attention import Patch
from kv_compression.model.reading import prefill
from kv_compression.sharing.export import export
from kv_compression.training import loading
from tests.conftest import sentences
from tests.runs import KV, make_run, write_tied_model

ROOT = Path(__file__).parent.parent
TEXT = sentences(1, seed=9)[0]
OPTIONS = {"sink_tokens": 2, "recent_tokens": 3, "cr_tokens": 2, "cr_visibility": "context"}
RUNS = {
    "kv": KV,
    "options": KV | OPTIONS,
    "tied": KV,
    "sinks": {"method": "sink_attention", "bound_ratio": 0.5},
    "scattered": {"method": "scattered_attention", "bound_ratio": 0.5},
    "full": {"method": "full_attention"},
}


@pytest.fixture(scope="module")
def bases(tiny_model, tmp_path_factory) -> dict[str, str]:
    return dict.fromkeys(RUNS, tiny_model) | {"tied": write_tied_model(tmp_path_factory.mktemp("tied"))}


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """The folder of each of RUNS, made when it is asked for first."""
    made = {}

    def run(name: str) -> str:
        if name not in made:
            made[name] = make_run(tmp_path_factory.mktemp(name) / "run", bases[name], **RUNS[name])
        return made[name]

    return run


def load(folder: str, base: str, order: str = "attach"):
    """A run as others load it: tokenizer, model, patch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if order == "auto":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        return tokenizer, model, kvc.attach(model, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if order == "resize":
        rows = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(len(tokenizer))
        with torch.no_grad():  # whatever the new rows are before the adapter comes
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                embedding.weight[rows:] = 3.0
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        return tokenizer, model, kvc.attach(model, folder)
    patch = kvc.attach(model, folder)
    return tokenizer, peft.PeftModel.from_pretrained(model, folder).eval(), patch


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def expected_logits(folder: str, ids: list[int]) -> torch.Tensor:
    """The logits of the run's own model under the rule of its own settings."""
    _, model, settings = loading.load_run(folder, "no")
    sentinels = loading.results_of_run(folder)["sentinels"] or {"cl_id": -1, "cr_id": -1}
    with Patch(model, rule_of(settings, **sentinels)):
        return logits_of(model, ids)


def marked(tokenizer, rule) -> list[int]:
    tokens = tokenizer(TEXT)["input_ids"]
    if not rule.uses_sentinels:
        return tokens
    return insert_sentinels(tokens, [(3, 9), (10, 14), (20, 27)], rule.cl_id, rule.cr_id, rule.cr_tokens)


@pytest.mark.parametrize(
    ("name", "order"),
    [("kv", "attach"), ("kv", "resize"), ("kv", "auto"), ("tied", "attach"), ("tied", "resize"), ("tied", "auto")]
    + [(name, "auto") for name in ("options", "sinks", "scattered", "full")],
)
def test_one_line_on_top_of_plain_peft_gives_the_logits_of_the_run(runs, bases, name, order):
    folder = runs(name)
    tokenizer, model, patch = load(folder, bases[name], order)
    for option in OPTIONS:
        expected = RUNS[name].get(option, getattr(KVCompression, option))
        assert getattr(patch.rule, option, expected) == expected
    ids = marked(tokenizer, patch.rule)
    expected = expected_logits(folder, ids)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=0)
    patch.remove()
    if name != "full":
        assert (logits_of(model, ids) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["kv", "tied"])
def test_a_model_with_its_adapter_merged_keeps_what_was_trained(runs, bases, name):
    folder = runs(name)
    tokenizer, model, patch = load(folder, bases[name], "resize")
    patch.remove()
    merged = model.merge_and_unload()
    with kvc.attach(merged, folder) as patch:
        ids = marked(tokenizer, patch.rule)
        torch.testing.assert_close(logits_of(merged, ids), expected_logits(folder, ids), atol=1e-5, rtol=0)


def test_the_example_of_the_package_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = [line[4:] for line in kvc.__doc__.splitlines() if line.startswith("    ")]
    names = {"run": runs("kv"), "text": TEXT}
    exec("\n".join(example), names)
    read = names["tokenizer"](TEXT)["input_ids"]
    cache = names["cache"]
    assert cache.logical_length == len(read)
    assert cache.length == len(read) - round(0.9 * len(read))
    assert names["output"].shape[1] == names["question"]["input_ids"].shape[1] + 20


@pytest.mark.parametrize("name", ["kv", "options", "sinks", "scattered"])
def test_generation_goes_on_from_a_compressed_text_as_if_it_were_read_again(runs, bases, tmp_path, name):
    tokenizer, model, patch = load(runs(name), bases[name])
    cache = kvc.compress(model, tokenizer, TEXT)
    assert 0.3 < cache.removed_fraction < 0.7
    question = tokenizer(" the cat sees", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    held, read = cache.length, cache.get_seq_length()
    first = model.generate(**cache.followed_by(question), **settings)
    assert (cache.length, cache.get_seq_length()) == (held, read)  # to be used again
    assert first[:, : question.shape[1]].tolist() == question.tolist()

    cache.save(tmp_path / "prefix.safetensors")
    again = kvc.SentinelCache.load(tmp_path / "prefix.safetensors")
    assert model.generate(**again.followed_by(question), **settings).tolist() == first.tolist()

    ids = api.mark(tokenizer(TEXT)["input_ids"], patch.rule, None, api.SpanLengths(), 0)
    whole, new = torch.tensor([ids + question[0].tolist()]), []
    for _ in range(12):
        with torch.no_grad():
            scores = model(whole, use_cache=False).logits[0, -1]
        if patch.rule.uses_sentinels:
            scores[[patch.rule.cl_id, patch.rule.cr_id]] = -torch.inf
        scores[0] = -torch.inf  # end-of-text, before 12 tokens
        new.append(int(scores.argmax()))
        whole = torch.cat([whole, torch.tensor([new[-1:]])], dim=1)
    assert first[0, question.shape[1] :].tolist() == new


def test_a_text_is_compressed_by_exactly_the_ratio_at_places_that_the_seed_fixes(runs, bases):
    tokenizer, model, _ = load(runs("kv"), bases["kv"])
    tokens = len(tokenizer(TEXT)["input_ids"])
    for ratio in (0, 0.3, 0.9):
        assert kvc.compress(model, tokenizer, TEXT, ratio).length == tokens - round(ratio * tokens)
    keys = [kvc.compress(model, tokenizer, TEXT, 0.3, seed=seed).layers[1].keys for seed in (0, 0, 1)]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])
    chunked = kvc.compress(model, tokenizer, TEXT, 0.3, chunk=7)
    torch.testing.assert_close(chunked.layers[1].keys, keys[0], atol=1e-5, rtol=0)


def test_a_window_gives_way_where_the_text_is_short(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, max_position_embeddings=256)
    kvc.attach(model, tokenizer, sink_tokens=2, recent_tokens=100)
    with pytest.warns(UserWarning, match="the window of 100 tokens is too wide for ratio 0.8"):
        cache = kvc.compress(model, tokenizer, TEXT, 0.8)
    read = cache.logical_length
    assert cache.length > read - round(0.8 * read)
    with torch.no_grad():
        model(torch.full((1, 101), 5), past_key_values=cache, use_cache=True)
    assert cache.length == read - round(0.8 * read) + 101


def test_a_text_is_read_without_the_end_that_a_tokenizer_adds(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    plain, end = len(tokenizer(TEXT)["input_ids"]), tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    with kvc.attach(model, tokenizer):
        assert kvc.compress(model, tokenizer, TEXT, 0.5).logical_length == plain


@pytest.mark.parametrize("options", [{}, {"sink_tokens": 1, "recent_tokens": 4}])
def test_a_tokenizer_makes_a_new_rule(tiny_model, options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = len(tokenizer)
    with kvc.attach(model, tokenizer, **options) as patch:
        assert patch.rule == KVCompression(tokens, tokens + 1, **options)
        assert model.get_input_embeddings().weight.shape[0] == tokens + 2
        cache = kvc.compress(model, tokenizer, TEXT, 0.5)
        ids = api.mark(tokenizer(TEXT)["input_ids"], patch.rule, 0.5, api.SpanLengths(), 0)
        with torch.no_grad():
            expected = model(torch.tensor([[*ids, 7]]), use_cache=False).logits[0, -1]
            found = prefill(model, torch.tensor([[7]]), cache)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="attach"):
        kvc.compress(model, tokenizer, TEXT, 0.5)


def test_a_ready_rule_is_attached_as_it_is_or_with_sentinels_from_elsewhere(runs, bases, tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    ids, rule = [5, 6, 7, 8, 9, 10], LocalAttention(ratio=0.5)
    plain = logits_of(model, ids)
    with kvc.attach(model, rule=rule) as patch:
        assert patch.rule is rule
        assert (logits_of(model, ids) - plain).abs().max() > 1e-4
        with pytest.raises(ValueError, match="patched already"):
            kvc.attach(model, rule=rule)
    assert torch.equal(logits_of(model, ids), plain) and "generate" not in vars(model)
    with kvc.attach(model, tokenizer, rule=rule) as patch:
        assert patch.rule == rule and len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match="no ids for <CL> and <CR>"):
        kvc.attach(model, rule=KVCompression(sink_tokens=1))
    with pytest.raises(ValueError, match="the options are the rule's"):
        kvc.attach(model, tokenizer, rule=rule, sink_tokens=1)
    with pytest.raises(TypeError, match="rule is a rule of kv_compression.methods, not a str"):
        kvc.attach(model, rule="local_attention")
    with pytest.raises(TypeError, match="a folder, a repository's name or a tokenizer"):
        kvc.attach(model)
    with kvc.attach(model, tokenizer, rule=KVCompression(ratio=0.5, sink_tokens=1)) as patch:
        assert patch.rule == KVCompression(len(tokenizer) - 2, len(tokenizer) - 1, 0.5, sink_tokens=1)
        assert kvc.compress(model, tokenizer, TEXT).removed_fraction == pytest.approx(0.5, abs=0.02)

    model = transformers.AutoModelForCausalLM.from_pretrained(bases["kv"])
    with kvc.attach(model, runs("kv"), rule=KVCompression(ratio=0.9, sink_tokens=1)) as patch:
        assert patch.rule == KVCompression(len(tokenizer) - 2, len(tokenizer) - 1, 0.9, sink_tokens=1)
    with pytest.raises(ValueError, match="it has no sentinels to compress with"):
        kvc.attach(model, runs("sinks"), rule=KVCompression(ratio=0.9))


class FromElsewhere(Rule):
    """A rule that other people wrote: it has sentinels, and none of the options of KV compression."""

    name = "from_elsewhere"
    uses_sentinels = True

    def mask_mod(self, input_ids):
        return KVCompression(self.cl_id, self.cr_id).visible(input_ids)


def test_a_rule_with_sentinels_needs_no_option_of_kv_compression(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = tokenizer(TEXT)["input_ids"]
    with kvc.attach(model, tokenizer, rule=FromElsewhere()) as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = kvc.compress(model, tokenizer, TEXT, 0.5)
        ids = api.mark(tokens, patch.rule, 0.5, api.SpanLengths(), 0)
        with torch.no_grad():
            expected = model(torch.tensor([[*ids, 7]]), use_cache=False).logits[0, -1]
            found = prefill(model, torch.tensor([[7]]), cache)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (
        ids == api.mark(tokens, KVCompression(patch.rule.cl_id, patch.rule.cr_id), 0.5, api.SpanLengths(), 0) != tokens
    )
    assert cache.length == len(ids) + 1  # its mask alone does not say what may leave


def test_a_run_on_the_hub_is_attached_by_its_name(runs, bases, stand_in):
    shutil.copytree(runs("options"), stand_in.root / "models/someone/run")
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["options"])
    with kvc.attach(model, "someone/run", revision="main") as patch:
        assert patch.rule == api.rule_of_run(api.results_of(runs("options")))
    with pytest.raises(RunError, match=r"there is no results\.json of someone/else on the Hugging Face hub"):
        kvc.attach(model, "someone/else")
    with pytest.raises(RunError, match="someone/run"):
        kvc.attach(model, "someone/run", revision="v2")


def test_bad_requests_take_one_line_and_change_nothing(runs, bases, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bases["kv"])
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["kv"])
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match="no option of KV compression: choose from sink_tokens"):
        kvc.attach(model, tokenizer, sinks=1)
    with pytest.raises(TypeError, match="or a tokenizer, not a LocalAttention"):
        kvc.attach(model, LocalAttention(ratio=0.5))
    with pytest.raises(ValueError, match="cr_visibility"):
        kvc.attach(model, tokenizer, cr_visibility="all")
    with pytest.raises(ValueError, match="the options are the run's"):
        kvc.attach(model, runs("kv"), sink_tokens=1)
    with pytest.raises(UsageError, match="no such folder"):
        kvc.attach(model, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"holds no results\.json"):
        kvc.attach(model, tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == rows
    assert len(tokenizer) == rows

    with kvc.attach(model, runs("kv")) as patch:
        with pytest.raises(ValueError, match="patched already"):
            kvc.attach(model, tokenizer)
        assert len(tokenizer) == rows
        with pytest.raises(ValueError, match="no text"):
            kvc.compress(model, tokenizer, "")
        with pytest.raises(ValueError, match=r"can remove .*: lower the ratio"):
            kvc.compress(model, tokenizer, TEXT, 0.99)
        with pytest.raises(ValueError, match="below 1"):
            kvc.compress(model, tokenizer, TEXT, 1.0)
        with pytest.raises(ValueError, match="max_span_length must be at least 2"):
            kvc.compress(model, tokenizer, TEXT, 0.5, max_span_length=1)
        with pytest.raises(ValueError, match="reserved"):
            kvc.compress(model, transformers.AutoTokenizer.from_pretrained(runs("kv")), "a <CL> b", 0.5)
        patch.rule = LocalAttention(ratio=0.5)
        with pytest.raises(ValueError, match="attached at ratio 0.5"):
            kvc.compress(model, tokenizer, TEXT, 0.9)
    with kvc.attach(model, tokenizer), pytest.raises(ValueError, match="say how much"):
        kvc.compress(model, tokenizer, TEXT)


@pytest.mark.parametrize(
    "change",
    [{"sentinels": None}, {"sentinels": {"cl_id": "x", "cr_id": 1}}, {"sentinels": {"cl_id": -5, "cr_id": 1}}]
    + [{"method": "magic"}, {"settings": []}, {"settings": {"sink_tokens": "three"}}, {"bound_ratio": 7}],
)
def test_damaged_results_are_reported(runs, bases, tmp_path, change):
    results = api.results_of(runs("kv")) | change
    (tmp_path / "results.json").write_text(json.dumps(results))
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["kv"])
    with pytest.raises(RunError, match=r"results\.json.* is damaged"):
        kvc.attach(model, tmp_path)


def test_the_package_is_light_until_it_is_used():
    program = "import sys, kv_compression as kvc\nprint('torch' in sys.modules, sorted({*kvc.__all__} & {*dir(kvc)}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False ['Budget', 'SentinelCache', 'attach', 'compress', 'load']"
    with pytest.raises(AttributeError, match="no_such_name"):
        kvc.no_such_name  # noqa: B018


def test_attaching_again_to_a_fresh_model_sets_its_rows_again(tiny_model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        with kvc.attach(model, tokenizer) as patch:
            ids = api.mark(tokenizer(TEXT)["input_ids"], patch.rule, 0.5, api.SpanLengths(), 0)
            found.append(logits_of(model, ids))
        with kvc.attach(model, tokenizer):
            assert torch.equal(logits_of(model, ids), found[-1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", ["kv", "tied"])
def test_what_a_run_has_learnt_is_never_reset(runs, bases, tmp_path, name):
    folder = runs(name)
    exported = str(tmp_path / "export")
    export(folder, Path(exported))
    tokenizer, model, patch = load(folder, bases[name])
    patch.remove()
    merged = model.merge_and_unload()
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    for each, known in ((merged, tokenizer), (model, transformers.AutoTokenizer.from_pretrained(exported))):
        before = [part.weight.clone() for part in (each.get_input_embeddings(), each.get_output_embeddings())]
        assert (before[0][-2] - before[0][:-2].mean(0)).abs().max() > 1e-4  # that it has learnt anything
        for source in (known, folder):
            kvc.attach(each, source).remove()
            after = each.get_input_embeddings().weight, each.get_output_embeddings().weight
            assert all(torch.equal(*pair) for pair in zip(before, after))

    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name])  # merged by hand: nothing says what it holds
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    unknown = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    with pytest.raises(ValueError, match=r"the tokenizer is that of the run .*: attach\(model, "):
        kvc.attach(unknown, tokenizer)


@pytest.mark.parametrize("name", ["kv", "options", "tied", "sinks"])
def test_a_run_is_loaded_merged_and_attached(runs, tmp_path, name):
    folder = runs(name)
    model, tokenizer = kvc.load(folder)
    assert not isinstance(model, peft.PeftModel) and not model.training
    ids = marked(tokenizer, model.get_decoder()._sentinel_patch.rule)
    expected = expected_logits(folder, ids)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=0)
    export(folder, tmp_path / "export")
    again, _ = kvc.load(tmp_path / "export")
    torch.testing.assert_close(logits_of(again, ids), expected, atol=1e-5, rtol=0)
    half, _ = kvc.load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.bfloat16, not torch\.float16"):
        kvc.load(folder, dtype=torch.float16)


def test_a_run_on_the_hub_is_loaded_by_its_name(runs, stand_in):
    shutil.copytree(runs("kv"), stand_in.root / "models/someone/loaded")
    model, tokenizer = kvc.load("someone/loaded", revision="main")
    ids = marked(tokenizer, model.get_decoder()._sentinel_patch.rule)
    torch.testing.assert_close(logits_of(model, ids), expected_logits(runs("kv"), ids), atol=1e-5, rtol=0)


def test_a_base_model_that_is_out_of_reach_takes_one_line(runs, stand_in, tmp_path):
    folder = shutil.copytree(runs("kv"), tmp_path / "run")
    results = api.results_of(runs("kv")) | {"model": "someone/base"}
    results["settings"] = results["settings"] | {"model_name_or_path": "someone/base"}
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="the model someone/base could not be reached .*: use an export of the run"):
        kvc.load(folder)
    with pytest.raises(UsageError, match="no such folder"):
        kvc.load(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"there is no results\.json of someone/nothing"):
        kvc.load("someone/nothing")


def python_blocks(page: str, heading: str) -> list[str]:
    """The Python of a page's section."""
    section = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [block.split("```")[0] for block in section.split("```python\n")[1:]]


@pytest.mark.parametrize(("page", "heading"), [("README.md", "The library"), ("docs/library.md", "A trained run")])
def test_the_example_runs_on_a_run_of_the_embedded_preset(tiny_run, tiny_model, tmp_path, page, heading):
    """As a user runs the snippet, without a network, on a folder that run_clm.py has written and another text."""
    home = tmp_path / "cache" / "kv_compression"
    home.mkdir(parents=True)
    shutil.copytree(
        tiny_model, home / f"{embedded.GGUF_PACKAGE}-{embedded.GGUF_VERSION}"
    )  # in the embedded model's place
    flags = [flag if flag != tiny_model else "embedded" for flag in tiny_run]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "run"
    command = [sys.executable, ROOT / "run_clm.py", *flags, "--max_train_steps", "1", "--output_dir", folder]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == embedded.EMBEDDED_BASE

    tokens = len(transformers.AutoTokenizer.from_pretrained(tiny_model)(TEXT)["input_ids"])
    kept = tokens - round(0.9 * tokens)
    snippet = python_blocks(page, heading)[0].replace('open("LICENSE").read()', "text")
    snippet = snippet.replace("output/embedded/quickstart/kv_compression_0.5_best", str(folder))
    program = f"run, text = {str(folder)!r}, {TEXT!r}\n{snippet}\nprint(cache.length, output.shape)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] and done.stdout.splitlines()[-1].startswith(f"{kept} torch.Size"), done.stderr


def test_the_library_is_used_without_what_experiments_need(tiny_model, tmp_path):
    program = f"""
import sys
for name in ("fcntl", "datasets", "pandas", "pyarrow", "peft"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
import transformers
import kv_compression as kvc
tokenizer = transformers.AutoTokenizer.from_pretrained({tiny_model!r})
model = transformers.AutoModelForCausalLM.from_pretrained({tiny_model!r})
with kvc.attach(model, tokenizer):
    cache = kvc.compress(model, tokenizer, {TEXT!r}, 0.5)
    kvc.Budget(max_length=30, span_length=8).enforce(cache)
    cache.save("cache")
    cache = kvc.SentinelCache.load("cache")
    question = tokenizer(" the", return_tensors="pt")
    print(cache.length, model.generate(**cache.followed_by(question), max_new_tokens=2, min_new_tokens=2).shape[1])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    tokens = len(transformers.AutoTokenizer.from_pretrained(tiny_model)(" the")["input_ids"])
    assert done.stdout.split()[1:] == [str(tokens + 2)], done.stderr
    assert int(done.stdout.split()[0]) <= 30
