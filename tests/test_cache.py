import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_compression.io.errors import RunError, UsageError
from kv_compression.io.tensor_files import read_tensors, write_tensors
from kv_compression.methods.cost import measure
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.ratio import share_to_remove
from kv_compression.methods.scattered_attention import ScatteredAttention
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model.attention import Patch
from kv_compression.model.budget import Budget
from kv_compression.model.cache import SentinelCache
from tests import slow_rules
from tests.layouts import CL, CR, blocks, variants
from tests.models import random_model

KV = KVCompression(CL, CR)
VARIANTS = [
    KVCompression(CL, CR, sink_tokens=4),
    KVCompression(CL, CR, cr_tokens=2),
    KVCompression(CL, CR, cr_visibility="context"),
    KVCompression(CL, CR, recent_tokens=5),
    KVCompression(CL, CR, sink_tokens=3, cr_tokens=3, cr_visibility="context", recent_tokens=7),
]
BASELINES = [LocalAttention(ratio=0.6), SinkAttention(ratio=0.6), ScatteredAttention(ratio=0.6), FullAttention()]
RULES = [KV, *VARIANTS, *BASELINES]
MODELS = {
    (architecture, dtype): random_model(architecture, "sdpa", dtype)
    for architecture in ("gpt_neox", "llama", "opt")
    for dtype in (torch.float32, torch.float64)
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
architectures = pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{RULES.index(rule)}")


def span_layout(length: int, seed: int, cr_tokens: int = 1) -> list[int]:
    """A block with closed spans of 1 … 6 tokens between stretches of text."""
    draw = random.Random(seed)
    ids = []
    while len(ids) < length:
        piece = [draw.randint(3, 60) for _ in range(draw.randint(1, 6))]
        ids += [CL, *piece, *[CR] * cr_tokens] if draw.random() < 0.5 else piece
    return ids


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right with 0, and the mask that says so."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, real


@torch.no_grad()
def in_chunks(model, ids, rule, chunks: list[int], real=None):
    """Logits of chunked reading through a cache, and the cache."""
    cache, logits, start = SentinelCache(rule=rule), [], 0
    for size in chunks:
        part = None if real is None else real[:, start : start + size]
        logits.append(model(ids[:, start : start + size], attention_mask=part, past_key_values=cache).logits)
        start += size
        if start >= ids.shape[1]:
            break
    return torch.cat(logits, dim=1), cache


def chunk_sizes(draw_from: int, length: int) -> list[int]:
    draw = random.Random(draw_from)
    return [draw.choice([1, 1, 2, 3, 5, 8, 13]) for _ in range(length)]


@architectures
@rules
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cached_evicted_chunked_reading_equals_the_masked_forward_pass(architecture, rule, dtype):
    model = MODELS[architecture, dtype]
    with Patch(model, rule), torch.no_grad():
        for seed in range(4):
            ids = torch.tensor([span_layout(60, seed, rule.cr_tokens)])
            full = model(ids, use_cache=False).logits
            logits, _ = in_chunks(model, ids, rule, chunk_sizes(seed, 99))
            assert (logits - full).abs().max() < TOLERANCE[dtype]


@architectures
@rules
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_batches_equal_their_rows_alone(architecture, rule, dtype):
    model = MODELS[architecture, dtype]
    rows = [span_layout(length, length, rule.cr_tokens) for length in (20, 45, 60)]
    ids, real = padded(rows)
    with Patch(model, rule), torch.no_grad():
        logits, cache = in_chunks(model, ids, rule, chunk_sizes(7, 99), real)
        for number, row in enumerate(rows):
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
            assert (logits[number, : len(row)] - alone).abs().max() < TOLERANCE[dtype]
        # Reading on: rows of different lengths go on with a token each.
        more = torch.tensor([[5], [6], [7]])
        after = model(more, past_key_values=cache).logits[:, -1]
        for number, row in enumerate(rows):
            alone = model(torch.tensor([row + more[number].tolist()]), use_cache=False).logits[0, -1]
            assert (after[number] - alone).abs().max() < TOLERANCE[dtype]


@settings(deadline=None, max_examples=150)
@given(variants(), st.integers(1, 9))
def test_any_variant_on_any_layout_in_any_chunks(variant, size):
    """What is held at the end is what the restated rule says a later token could see."""
    rule, options, ids = variant
    model = MODELS["llama", torch.float64]
    with Patch(model, rule), torch.no_grad():
        full = model(torch.tensor([ids]), use_cache=False).logits
        logits, cache = in_chunks(model, torch.tensor([ids]), rule, [size] * 99)
    assert (logits - full).abs().max() < 1e-9
    text = [token for token in ids if token not in (CL, CR)]
    assert cache.logical_length == len(text)
    if ids[-1] not in (CL, CR):  # else more <CR> might follow
        last = len(ids)
        seen = [slow_rules.visible([*ids, 9], last, k, CL, CR, **options) for k in range(last)]
        waiting = sum(not seen[k] and ids[k] == CR for k in range(last))
        spans = slow_rules.spans_of(ids, CL, CR, options["cr_tokens"])
        still_open = ids.count(CL) - sum(has_cl for *_, has_cl in spans)
        assert cache.length == sum(seen) + waiting + still_open


@settings(deadline=None, max_examples=60)
@given(blocks(), st.integers(1, 9))
def test_any_layout_in_any_chunks(ids, size):
    """Blocks that begin or end inside a span, touching spans, no spans."""
    model = MODELS["llama", torch.float64]
    with Patch(model, KV), torch.no_grad():
        full = model(torch.tensor([ids]), use_cache=False).logits
        logits, cache = in_chunks(model, torch.tensor([ids]), KV, [size] * 99)
    assert (logits - full).abs().max() < 1e-9
    still_open = sum(token == CL for token in ids) - sum(has_cl for *_, has_cl in slow_rules.spans_of(ids, CL, CR))
    text = [token for token in ids if token not in (CL, CR)]
    assert cache.length == len(text) - slow_rules.removed(ids, CL, CR) + still_open
    assert cache.logical_length == len(text)
    assert cache.get_seq_length() == len(ids)


@pytest.mark.parametrize("sizes", [[10], [6, 4], [1] * 10, [3] * 4])
def test_a_stray_cr_closes_an_empty_span_however_it_is_read(sizes):
    model = MODELS["llama", torch.float64]
    ids = torch.tensor([[5, 6, CL, 7, 8, CR, 9, CR, 11, CR, 12, CL, 13, CR]])
    with Patch(model, KV), torch.no_grad():
        full = model(ids, use_cache=False).logits
        logits, cache = in_chunks(model, ids, KV, sizes + [4] * 9)
    assert (logits - full).abs().max() < 1e-9
    assert cache.length == 9


def test_memory_is_freed_in_proportion():
    model = MODELS["gpt_neox", torch.float32]
    sizes = {}
    for spans in (0, 3, 6):
        ids = [3] * 10 + [CL, *[4] * 9, CR] * spans + [5] * (9 * (6 - spans))
        with Patch(model, KV):
            _, cache = in_chunks(model, torch.tensor([ids]), KV, [16] * 99)
        assert cache.length == 64 - 8 * spans
        assert cache.removed_fraction == pytest.approx(8 * spans / 64)
        for layer in cache.layers:
            assert layer.keys.untyped_storage().nbytes() == layer.keys.shape[2] * 4 * 8 * 4  # heads · width · fp32
        sizes[cache.length] = cache.bytes
    assert len({size / length for length, size in sizes.items()}) == 1


@rules
def test_a_cache_holds_as_many_keys_as_are_counted_on_the_mask(rule):
    """Token by token, what is held while a text token is read: its own key and those that were kept before it."""
    model = MODELS["gpt_neox", torch.float32]
    for seed in range(3):
        ids = torch.tensor([span_layout(60, seed, rule.cr_tokens) + [7] * 20])
        cache, held = SentinelCache(rule=rule), []
        with Patch(model, rule), torch.no_grad():
            for token, is_text in zip(ids.T, rule.text(ids)[0]):
                if is_text:
                    held.append(cache.length + 1)
                model(token[None], past_key_values=cache)
        cost = measure(rule, ids)
        assert (cost.kept_keys_mean, cost.most_kept) == (sum(held) / len(held), max(held))


@rules
def test_removed_is_what_a_cache_has_dropped(rule):
    """With sentinels once the block has been read, else when its last token looks: see docs/method.md.

    Blocks so short that sink attention hides a token's own key, which a cache still has, are left aside.
    """
    model = MODELS["gpt_neox", torch.float32]
    rows = [span_layout(length, length, rule.cr_tokens) for length in (20, 45, 60)]
    ids, real = padded([row[::-1] for row in rows])
    ids, real = ids.flip(1), real.flip(1)  # the padding is on the left, so that all rows end together
    read = slice(None) if rule.uses_sentinels else slice(-1)
    with Patch(model, rule):
        _, cache = in_chunks(model, ids[:, read], rule, chunk_sizes(3, 99), real[:, read])
    assert rule.removed(ids, real).tolist() == (cache.text_read - cache.lengths).tolist()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_local_attention_holds_the_window_at_every_step(ratio):
    model, rule = MODELS["gpt_neox", torch.float32], LocalAttention(ratio=ratio)
    cache = SentinelCache(rule=rule)
    with Patch(model, rule), torch.no_grad():
        for step in range(40):
            model(torch.tensor([[5]]), past_key_values=cache)
            assert cache.positions[0].tolist() == list(range(int((step + 1) * ratio), step + 1))


def test_peak_memory_of_chunked_prefill_follows_the_compressed_length():
    model, most = MODELS["gpt_neox", torch.float32], 0
    cache = SentinelCache(CL, CR)
    ids = torch.tensor([[CL, *[4] * 10, CR] * 8])
    with Patch(model, KV), torch.no_grad():
        for chunk in ids.split(12, dim=1):
            model(chunk, past_key_values=cache)
            most = max(most, cache.length)
    assert most == 8


@pytest.mark.parametrize("rule", [KV, *VARIANTS], ids=lambda rule: str(RULES.index(rule)))
@architectures
def test_folding_a_span_that_was_just_read_equals_reading_it_between_sentinels(architecture, rule):
    model = MODELS[architecture, torch.float64]
    text, crs = list(range(10, 40)), [CR] * rule.cr_tokens
    marked = torch.tensor([[*text[:2], CL, *text[2:6], *crs, *text[6:8], CL, *text[8:20], *crs, *text[20:]]])
    with Patch(model, rule), torch.no_grad():
        expected = model(marked, use_cache=False).logits[0, -10:]
        cache = SentinelCache(rule=rule)
        model(torch.tensor([text[:6]]), past_key_values=cache)
        cache.compress(2, 5)
        model(torch.tensor([text[6:20]]), past_key_values=cache)
        cache.compress(8, 19)
        gone = [k for k in (*range(2, 6), *range(8, 20)) if k >= rule.sink_tokens and k + rule.recent_tokens < 20]
        assert cache.length == 20 + 2 * rule.cr_tokens - len(gone)
        assert (cache.logical_length, cache.get_seq_length()) == (20, 20)
        logits = [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in text[20:]]
    assert (torch.cat(logits) - expected).abs().max() < 1e-9


def test_a_fold_does_not_see_sinks_behind_its_span():
    rule = KVCompression(CL, CR, sink_tokens=4)
    model, text = MODELS["llama", torch.float64], list(range(10, 22))
    values = []
    for first in (3, 12):
        cache = SentinelCache(rule=rule)
        with Patch(model, rule), torch.no_grad():
            model(torch.tensor([text[:first]]), past_key_values=cache)
            cache.compress(1, 2)
        values.append(cache.layers[-1].values[0, :, -1])
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)


def test_rows_may_fold_different_spans_or_none():
    model = MODELS["llama", torch.float64]
    text = torch.randint(3, 60, (3, 24))
    cache = SentinelCache(CL, CR)
    with Patch(model, KV), torch.no_grad():
        model(text, past_key_values=cache)
        cache.compress([20, 14, 0], [23, 23, -1])
        assert cache.lengths.tolist() == [21, 15, 24]
        logits = model(torch.tensor([[7], [8], [9]]), past_key_values=cache).logits[:, -1]
        for row, first in enumerate([20, 14, 24]):
            ids = text[row].tolist()
            marked = ids[:first] + ([CL, *ids[first:], CR] if first < 24 else []) + [7 + row]
            expected = model(torch.tensor([marked]), use_cache=False).logits[0, -1]
            assert (logits[row] - expected).abs().max() < 1e-9
        with pytest.raises(ValueError, match="does not hold"):
            cache.compress(20, 23)
        with pytest.raises(ValueError, match="does not hold"):
            cache.compress(0, 99)


def greedy_by_recomputation(model, ids: list[int], steps: int) -> list[int]:
    """Greedy tokens, every one from a full masked pass over all there is."""
    ids = list(ids)
    for _ in range(steps):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[[CL, CR]] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-steps:]


GENERATION = {"max_new_tokens": 12, "suppress_tokens": [CL, CR], "pad_token_id": 0, "eos_token_id": 63}


@architectures
@rules
def test_greedy_generation_agrees_with_recomputation(architecture, rule):
    model = MODELS[architecture, torch.float64]
    ids = span_layout(30, 5)
    with Patch(model, rule), torch.no_grad():
        expected = greedy_by_recomputation(model, ids, 12)
        out = model.generate(
            torch.tensor([ids]), past_key_values=SentinelCache(rule=rule), do_sample=False, **GENERATION
        )
    found = out[0, len(ids) :].tolist()
    assert found == expected[: len(found)]
    assert len(found) == 12 or found[-1] == 63


def test_generation_samples_and_searches_like_a_simulated_cache():
    """Sampling and beams through a real cache and through the masked forward pass without any cache."""
    model = MODELS["llama", torch.float64]
    ids = torch.tensor([span_layout(24, 1)[:24], span_layout(24, 2)[:24]])
    real = torch.ones_like(ids)
    with Patch(model, KV), torch.no_grad():
        for how in ({"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}):
            outputs = []
            for arguments in ({"past_key_values": SentinelCache(CL, CR)}, {"use_cache": False}):
                transformers.set_seed(3)
                outputs.append(model.generate(ids, attention_mask=real, **how, **arguments, **GENERATION))
            assert torch.equal(*outputs)


def test_generation_from_left_padded_prompts_and_from_a_kept_prefix():
    model = MODELS["gpt_neox", torch.float64]
    rows = [span_layout(18, 3), span_layout(30, 4)]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    with Patch(model, KV), torch.no_grad():
        out = model.generate(
            ids, attention_mask=real, past_key_values=SentinelCache(CL, CR), do_sample=False, **GENERATION
        )
        for number, row in enumerate(rows):
            expected = greedy_by_recomputation(model, row, 12)
            found = out[number, length:].tolist()
            found = found[: found.index(63) + 1] if 63 in found else found
            assert found == expected[: len(found)]

        prefix = torch.tensor([rows[1][:20]])
        cache = SentinelCache(CL, CR)
        model(prefix, past_key_values=cache)
        again = model.generate(torch.tensor([rows[1]]), past_key_values=cache, do_sample=False, **GENERATION)
        assert again[0, len(rows[1]) :].tolist() == greedy_by_recomputation(model, rows[1], 12)[: len(again[0]) - 30]


def test_rows_are_reordered_selected_and_repeated_with_all_that_is_known_of_them():
    model = MODELS["gpt_neox", torch.float64]
    rows = [span_layout(20, 8), span_layout(31, 9)]
    ids, real = padded(rows)
    more = torch.tensor([[5, 6]])
    with Patch(model, KV), torch.no_grad():
        expected = [model(torch.tensor([row + [5, 6]]), use_cache=False).logits[0, -1] for row in rows]
        for change, order in [
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        ]:
            _, cache = in_chunks(model, ids, KV, [9] * 99, real)
            change(cache)
            logits = model(more.expand(len(order), 2), past_key_values=cache).logits[:, -1]
            for row, origin in enumerate(order):
                assert (logits[row] - expected[origin]).abs().max() < 1e-9


def test_crop_unreads_plain_tokens_and_refuses_others():
    model = MODELS["llama", torch.float64]
    ids = [5, 6, CL, 7, 8, CR, 9, 10, 11]
    with Patch(model, KV), torch.no_grad():
        _, cache = in_chunks(model, torch.tensor([ids]), KV, [6, 3])
        cache.crop(-2)
        assert (cache.get_seq_length(), cache.logical_length, cache.length) == (7, 5, 4)
        logits = model(torch.tensor([[12, 13]]), past_key_values=cache).logits[0, -1]
        expected = model(torch.tensor([ids[:7] + [12, 13]]), use_cache=False).logits[0, -1]
        assert (logits - expected).abs().max() < 1e-9
        with pytest.raises(ValueError, match="only the last 3 tokens"):
            cache.crop(-4)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(2)
        cache.reset()
        assert (cache.get_seq_length(), cache.length, cache.bytes, cache.removed_fraction) == (0, 0, 0, 0)
        logits, _ = model(torch.tensor([ids]), past_key_values=cache).logits, None
        assert (logits - model(torch.tensor([ids]), use_cache=False).logits).abs().max() < 1e-9


@rules
def test_a_saved_cache_goes_on_where_it_was(rule, tmp_path):
    model = MODELS["gpt_neox", torch.float64]
    rows = [span_layout(20, 8), span_layout(31, 9)]
    ids, real = padded(rows)
    with Patch(model, rule), torch.no_grad():
        _, cache = in_chunks(model, ids, rule, [10] * 99, real)
        cache.save(tmp_path / "prefix.safetensors")
        loaded = SentinelCache.load(tmp_path / "prefix.safetensors")
        assert (loaded.rule, loaded.bytes, loaded.length) == (rule, cache.bytes, cache.length)
        assert loaded.get_seq_length() == cache.get_seq_length()
        more = torch.tensor([[5, 6], [7, 8]])
        expected = model(more, past_key_values=cache).logits
        assert torch.equal(model(more, past_key_values=loaded).logits, expected)
        if rule is KV:  # a model that did not fill the cache must be named
            reread = SentinelCache.load(tmp_path / "prefix.safetensors")
            with pytest.raises(ValueError, match="filled"):
                reread.compress([0, 0], [-1, -1])
            reread.compress([0, 0], [-1, -1], model)
            assert torch.equal(model(more, past_key_values=reread).logits, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]


@torch.no_grad()
def test_values_narrower_than_keys_are_saved_and_read_back(tmp_path):
    model, path = random_model("deepseek_v2", "sdpa", torch.float64), tmp_path / "cache"
    ids, real = padded([span_layout(20, 8), span_layout(31, 9)])
    with Patch(model, KV):
        _, cache = in_chunks(model, ids, KV, [10] * 99, real)
        assert cache.layers[0].keys.shape[3] != cache.layers[0].values.shape[3]
        cache.save(path)
        loaded, more = SentinelCache.load(path), torch.tensor([[5, 6], [7, 8]])
        assert loaded.lengths.tolist() == cache.lengths.tolist()
        assert torch.equal(model(more, past_key_values=loaded).logits, model(more, past_key_values=cache).logits)

    tensors, note = read_tensors(path)
    keys, values = tensors["keys.1"], tensors["values.1"]
    for change, words in (
        ({"values.1": values[:1]}, "rows of"),
        ({"values.1": values[:, :, 1:]}, "slots"),
        ({"values.1": values.repeat(1, 2, 1, 1)}, "keys have 1 heads, values 2"),
        ({"values.1": values.float()}, "torch.float32"),
        ({"values.1": values[..., :0]}, "keys or values of"),
        ({"keys.1": keys[0]}, "keys or values of"),
    ):
        write_tensors(path, tensors | {name: part.contiguous() for name, part in change.items()}, note)
        with pytest.raises(RunError, match=words):
            SentinelCache.load(path)
    write_tensors(path, tensors | {"values.1": values[..., 1:].contiguous()}, note)
    with Patch(model, KV), pytest.raises(UsageError, match="the cache does not hold keys"):
        model(more, past_key_values=SentinelCache.load(path))


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(tmp_path):
    ids, path = torch.tensor([span_layout(20, 8)]), tmp_path / "cache"
    model = MODELS["gpt_neox", torch.float32]
    with Patch(model, KV):
        _, cache = in_chunks(model, ids, KV, [10] * 99)
    cache.save(path)
    deeper, other = random_model("gpt_neox", "sdpa", layers=3), MODELS["gpt_neox", torch.float64]
    for which in (other, MODELS["llama", torch.float32], deeper, random_model("gpt_neox", "sdpa", layers=1)):
        with Patch(which, KV), pytest.raises(UsageError, match="the cache"):
            which(torch.tensor([[5]]), past_key_values=SentinelCache.load(path))


@pytest.mark.parametrize(
    ("change", "told", "words"),
    [
        ({"kinds": torch.full((1, 9), 8)}, {}, "kinds"),
        ({"real": torch.zeros(1, 9, dtype=torch.bool)}, {}, "real"),
        ({"keys.1": None}, {}, "it holds"),
        ({"x": torch.zeros(1)}, {}, "it holds"),
        ({"text_read": torch.tensor([1])}, {}, "positions"),
        ({"began": torch.tensor([1])}, {}, "began"),
        ({"keys.0": torch.zeros(1, 4, 2, 8)}, {}, "keys"),
        ({}, {"tokens_read": "9"}, "tokens_read"),
        ({}, {"tokens_read": 1}, "text_read"),
        ({}, {"rule": "windows"}, "rule"),
        ({}, {"options": {}}, "options"),
        ({}, {"format": "2"}, "of this version"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path, change, told, words):
    model, path = MODELS["gpt_neox", torch.float32], tmp_path / "cache"
    with Patch(model, KV):
        _, cache = in_chunks(model, torch.tensor([[3, CL, 4, 5, 6, CR, *range(7, 14)]]), KV, [10] * 99)
    cache.save(path)
    assert cache.slots == 9
    tensors, note = read_tensors(path)
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    write_tensors(path, tensors, note | told)
    with pytest.raises(RunError, match=words) as caught:
        SentinelCache.load(path)
    assert str(path) in str(caught.value)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    model, path = MODELS["gpt_neox", torch.float32], tmp_path / "cache"
    with Patch(model, KV):
        _, cache = in_chunks(model, torch.tensor([span_layout(20, 8)]), KV, [10] * 99)
    cache.save(path)
    whole = path.read_bytes()
    draw = random.Random(0)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    damaged = [b"", whole[:50], whole[:-5], b"\xff" * 100, (tmp_path / "other").read_bytes()]
    for _ in range(100):
        changed = bytearray(whole)
        changed[draw.randrange(700)] = draw.randrange(256)
        damaged.append(bytes(changed))
    for content in damaged[:5]:
        path.write_bytes(content)
        with pytest.raises(RunError, match="cache"):
            SentinelCache.load(path)
    for content in damaged[5:]:
        path.write_bytes(content)
        try:
            SentinelCache.load(path)
        except RunError as error:
            assert str(path) in str(error)
    with pytest.raises(RunError):
        SentinelCache.load(tmp_path / "missing")
    with pytest.raises(RunError):
        cache.save(path / "no folder")


@pytest.mark.parametrize(
    ("budget", "bound"),
    [
        (Budget(max_length=24, span_length=6, recent=8), lambda text: 24),
        (Budget(ratio=0.5, span_length=6), lambda text: text / 2 + 6),
        (Budget(ratio=0.7, max_length=30, span_length=8), lambda text: min(0.3 * text + 8, 30)),
    ],
)
def test_a_budget_bounds_the_cache_while_text_is_generated(budget, bound):
    model = MODELS["gpt_neox", torch.float32]
    cache = SentinelCache(CL, CR)
    with Patch(model, KV), torch.no_grad():
        model(torch.randint(3, 60, (2, 10)), past_key_values=cache)
        for step in range(80):
            logits = model(torch.randint(3, 60, (2, 1)), past_key_values=cache).logits
            budget.enforce(cache)
            assert logits.isfinite().all()
            assert cache.length <= bound(11 + step)
    assert cache.logical_length == 90
    assert (cache.positions[0][-1] == 89) or bool((cache.positions[0] == 89).any())


@given(st.integers(0, 3000), st.integers(0, 99).flatmap(lambda n: st.sampled_from([n / 100, 1 - (100 - n) / 100])))
def test_a_budget_allows_what_exact_spans_leave(length, ratio):
    allowed = Budget(ratio=ratio).allowed(length)
    assert allowed == length - share_to_remove(length, ratio) == length - round(ratio * length)
    assert abs(allowed - (1 - ratio) * length) <= 0.5 + 1e-6
    assert Budget(ratio=ratio, max_length=60).allowed(length) == min(allowed, 60)


@pytest.mark.parametrize(("ratio", "length"), [(0.9, 30), (0.8, 15), (1 - 0.1, 30)])
def test_a_budget_leaves_a_cache_alone_that_holds_its_share(ratio, length):
    model = MODELS["gpt_neox", torch.float32]
    removed = share_to_remove(length, ratio)
    ids = [CL, *[3] * (removed + 1), CR, *[4] * (length - removed - 1)]
    with Patch(model, KV):
        _, cache = in_chunks(model, torch.tensor([ids]), KV, [64])
        assert cache.length == length - removed
        Budget(ratio=ratio, span_length=2).enforce(cache)
    assert cache.length == length - removed


def test_the_oldest_keys_are_dropped_wherever_they_lie():
    model = MODELS["gpt_neox", torch.float32]
    cache = SentinelCache(CL, CR)
    with Patch(model, KV), torch.no_grad():
        model(torch.randint(3, 60, (2, 12)), past_key_values=cache)
        cache.compress(2, 5)  # its key lies behind younger ones, and stands for position 5
        cache.drop_oldest(torch.tensor([3, 0]))
    assert sorted(cache.positions[0][cache.real[0]].tolist()) == list(range(6, 12))
    assert cache.lengths.tolist() == [6, 9]


def test_a_fold_that_fails_leaves_the_cache_as_it_was():
    model = MODELS["llama", torch.float64]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    cache = SentinelCache(CL, CR)
    with Patch(model, KV), torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="not patched"):
        cache.compress(0, 2)
    with Patch(model, KV), torch.no_grad():

        def fail(*_):
            raise RuntimeError("out of memory")

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.compress(0, 2)
        handle.remove()
        logits = model(torch.tensor([[10]]), past_key_values=cache).logits[0, -1]
        expected = model(torch.tensor([[5, 6, 7, 8, 9, 10]]), use_cache=False).logits[0, -1]
    assert (logits - expected).abs().max() < 1e-9


def test_rows_that_leave_take_their_padding_along():
    model = MODELS["gpt_neox", torch.float32]
    ids, real = padded([[3] * 40, [4] * 4])
    with Patch(model, KV):
        _, cache = in_chunks(model, ids, KV, [64], real)
    before = cache.bytes
    cache.batch_select_indices(torch.tensor([1]))
    assert (cache.slots, cache.bytes) == (4, before // 20)


def test_misuse_is_refused():
    model = MODELS["gpt_neox", torch.float32]
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="either"):
        SentinelCache()
    with pytest.raises(ValueError, match="patched model"):
        model(ids, past_key_values=SentinelCache(CL, CR))
    with pytest.raises(ValueError, match="filled"):
        SentinelCache(CL, CR).compress(0, 1)
    Budget(ratio=0.5).enforce(SentinelCache(CL, CR))  # nothing to do
    for arguments in ({}, {"ratio": 1.5}, {"ratio": 0.5, "span_length": 1}, {"max_length": 10, "span_length": 20}):
        with pytest.raises(ValueError):
            Budget(**arguments)
    with Patch(model, KV):
        with pytest.raises(ValueError, match="the cache is for"):
            model(ids, past_key_values=SentinelCache(rule=LocalAttention(ratio=0.5)))
        cache = SentinelCache(CL, CR)
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 1 rows"):
            model(ids.repeat(2, 1), past_key_values=cache)


def test_rows_that_compress_differently_are_followed_as_if_they_were_alone():
    model = MODELS["gpt_neox", torch.float64]
    rows = [[5, 6, CL, 7, 8, 9, CR, 10], [11, CL, 12, 13, CR]]
    question = torch.tensor([[20, 21], [22, 23]])
    settings = {"max_new_tokens": 8, "do_sample": False}
    with Patch(model, KV) as patch:
        cache = SentinelCache(rule=patch.rule)
        ids, real = padded(rows)
        model(ids, attention_mask=real, past_key_values=cache)
        together = model.generate(**cache.followed_by(question), **settings)
        assert together.tolist() == model.generate(**cache.followed_by(question), **settings).tolist()
        for row, new, found in zip(rows, question, together):
            alone = SentinelCache(rule=KV)
            model(torch.tensor([row]), past_key_values=alone)
            assert model.generate(**alone.followed_by(new[None]), **settings)[0].tolist() == found.tolist()

        def wants_sentinels(module, inputs, output):
            output[..., [CL, CR]] += 100
            return output

        handle = model.get_output_embeddings().register_forward_hook(wants_sentinels)
        assert not {CL, CR} & set(model.generate(**cache.followed_by(question), **settings).flatten().tolist())
        handle.remove()
        with pytest.raises(ValueError, match="holds 2 rows, but 1 were given"):
            cache.followed_by(question[:1])
        with pytest.raises(ValueError, match="at least one new token"):
            cache.followed_by(question[:, :0])
