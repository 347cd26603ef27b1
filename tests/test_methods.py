import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_compression.methods import METHODS
from kv_compression.methods.cost import measure
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule, block_mask, dense_mask, in_order
from kv_compression.methods.scattered_attention import ScatteredAttention, draw_keys
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.spans.exact import exact_spans
from tests import slow_rules
from tests.layouts import CL, CR, batches, blocks, variants

RATIOS = st.floats(0, 0.999)


@given(batches())
def test_kv_compression_mask_is_the_restated_rule(rows):
    mask = KVCompression(CL, CR).mask(torch.tensor(rows))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [slow_rules.kv_mask(row, CL, CR) for row in rows]


def test_kv_compression_mask_as_drawn():
    mask = KVCompression(CL, CR).mask(torch.tensor([[5, 6, CL, 7, 8, CR, 9]]))[0]
    drawn = ["1......", "11.....", "..1....", "11.1...", "11.11..", "..1111.", "11...11"]
    assert ["".join(".1"[seen] for seen in row) for row in mask.int().tolist()] == drawn


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_any_order_of_sentinels_has_the_restated_mask(ids):
    mask = KVCompression(CL, CR).mask(torch.tensor([ids]))[0]
    assert mask.tolist() == slow_rules.kv_mask(ids, CL, CR)
    assert KVCompression(CL, CR).removed(torch.tensor([ids])).item() == slow_rules.removed(ids, CL, CR)


@given(st.integers(1, 300), RATIOS)
def test_local_attention_mask_is_the_restated_rule(length, ratio):
    mask = LocalAttention(ratio=ratio).mask(torch.full((1, length), 5))[0]
    assert mask.tolist() == slow_rules.local_mask(length, ratio)


@given(st.integers(1, 40), RATIOS, st.integers(0, 99))
def test_scattered_attention_shares_one_draw(length, ratio, seed):
    ids = torch.randint(3, 999, (1, length), generator=torch.Generator().manual_seed(seed))
    mask = ScatteredAttention(ratio=ratio, seed=seed).mask(ids)[0]
    assert mask.shape == (length, length)
    assert mask.diagonal().all()
    kept = mask[-1]
    for q in range(length - 1):
        assert torch.equal(mask[q, :q], kept[:q])
        assert not mask[q, q + 1 :].any()


def test_scattered_attention_keeps_the_stated_share():
    kept, _ = draw_keys(torch.randint(0, 50000, (200, 500)), 0.3, seed=1)
    kept = kept.float()
    assert abs(kept.mean().item() - 0.7) < 0.01
    assert kept.mean(0).std() < 0.06  # no position is favoured: binomial spread is 0.032
    assert kept.mean(1).std() < 0.04  # no block either: 0.0205


def drawn(ids, ratio, seed):
    return draw_keys(ids, ratio, seed)[0]


def test_the_draw_depends_on_seed_and_prefix_alone():
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    kept = drawn(ids, 0.5, seed=3)
    assert torch.equal(kept[2:3], drawn(ids[2:3], 0.5, seed=3))
    assert torch.equal(kept[:, :20], drawn(ids[:, :20], 0.5, seed=3))
    assert not torch.equal(kept, drawn(ids, 0.5, seed=4))
    assert not torch.equal(kept[0], kept[1])


@settings(deadline=None, max_examples=300)
@given(variants())
def test_the_options_are_the_restated_rule(variant):
    rule, options, ids = variant
    length = len(ids)
    mask = rule.mask(torch.tensor([ids]))[0]
    pairs = range(length)
    assert mask.tolist() == [[slow_rules.visible(ids, q, k, CL, CR, **options) for k in pairs] for q in pairs]
    options.pop("context")
    assert rule.removed(torch.tensor([ids])).item() == slow_rules.removed(ids, CL, CR, **options)


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 5))
def test_sink_attention_is_the_restated_rule(length, ratio, sinks):
    rule = SinkAttention(ratio=ratio, sink_tokens=sinks)
    ids = torch.full((1, length), 5)
    mask = rule.mask(ids)[0]
    assert mask.tolist() == slow_rules.sink_mask(length, ratio, sinks)
    assert rule.removed(ids).item() == length - mask[-1].sum()


@pytest.mark.parametrize("tenths", range(1, 10))
def test_the_share_that_sink_attention_keeps_is_taken_in_double_precision(tenths):
    length, ratio = 2048, tenths / 10
    seen = SinkAttention(ratio=ratio).mask(torch.full((1, length), 5))[0].sum(-1)
    assert seen.tolist() == [math.ceil((1 - ratio) * (q + 1)) for q in range(length)]


def test_sink_attention_keeps_four_sinks_by_default():
    mask = SinkAttention(ratio=0.5).mask(torch.full((1, 40), 5))[0]
    assert mask[39].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(24, 40)]


@given(batches(), st.integers(1, 4))
def test_documents_do_not_see_each_other(rows, cut):
    ids = torch.tensor(rows)
    documents = (torch.arange(ids.shape[1]) // cut + 1).expand_as(ids)
    rule = KVCompression(CL, CR, isolate_documents=True)
    mask = dense_mask(rule.visible(ids, documents), *ids.shape)
    for row, block in enumerate(rows):
        for q, k in itertools.product(range(len(block)), repeat=2):
            assert mask[row, q, k] == (slow_rules.visible(block, q, k, CL, CR) and q // cut == k // cut)


@pytest.mark.parametrize("rule", [SinkAttention, LocalAttention, ScatteredAttention])
def test_nobody_is_blind_in_a_document_of_its_own(rule):
    ids, documents = torch.full((1, 40), 5), torch.tensor([[1] * 15 + [2] * 25])
    mask = dense_mask(rule(ratio=0.9, isolate_documents=True).visible(ids, documents), 1, 40)[0]
    assert mask.any(-1).all()
    assert not mask[15:, :15].any()


@settings(deadline=None, max_examples=50)
@given(variants(), st.integers(1, 5))
def test_padding_changes_no_cost(variant, padding):
    rule, _, ids = variant
    alone = measure(rule, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    padded, real = torch.tensor([ids + [0] * padding]), torch.tensor([[1] * len(ids) + [0] * padding])
    assert measure(rule, padded, real) == alone


@given(st.integers(2, 60), st.floats(0, 0.95))
def test_the_attended_pairs_of_sink_attention_are_those_of_its_mask(length, ratio):
    cost = measure(SinkAttention(ratio=ratio), torch.full((1, length), 5))
    mask = slow_rules.sink_mask(length, ratio, 4)
    assert cost.attended_pairs == sum(mask[q][k] for q in range(length) for k in range(q))
    held = [len({k for later in range(q, length) for k in range(q + 1) if mask[later][k]} | {q}) for q in range(length)]
    assert (cost.kept_keys, cost.most_kept) == (sum(held), max(held))


@given(blocks(), st.integers(1, 6))
def test_position_ids_by_document_begin_again(ids, cut):
    rule = KVCompression(CL, CR, position_ids_by_document=True)
    numbers = torch.arange(len(ids))[None] // cut + 1
    documents = [ids[start : start + cut] for start in range(0, len(ids), cut)]
    expected = [position for document in documents for position in slow_rules.positions(document, CL, CR)]
    assert rule.position_ids(torch.tensor([ids]), numbers)[0].tolist() == expected


WRONG = [{"cr_visibility": "all"}, {"cr_tokens": 0}, {"sink_tokens": -1}, {"recent_tokens": -1}]


@pytest.mark.parametrize("wrong", WRONG)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        KVCompression(CL, CR, **wrong)


@pytest.mark.parametrize("method", METHODS)
def test_block_mask_and_dense_mask_agree(method):
    from torch.nn.attention.flex_attention import create_mask

    ids = torch.randint(3, 9, (2, 150), generator=torch.Generator().manual_seed(0))
    ids[0, [10, 40, 90]], ids[0, [20, 60]], ids[1, [5, 130]], ids[1, 100] = CL, CR, CR, CL
    rule = METHODS[method](CL, CR, ratio=0.6).visible(ids)
    block = block_mask(rule, 2, 150)
    dense = dense_mask(rule, 2, 150)
    assert torch.equal(create_mask(block.mask_mod, 2, 1, 150, 150, device="cpu")[:, 0], dense)
    # A block of 128 × 128 pairs may be skipped only if nothing in it is visible.
    tiles = torch.nn.functional.pad(dense, (0, 106, 0, 106)).view(2, 2, 128, 2, 128).any(4).any(2)
    assert torch.equal(block.to_dense()[:, 0].bool(), tiles)


@given(blocks(), st.integers(1, 5))
def test_padding_is_seen_by_itself_alone(ids, padding):
    rule = KVCompression(CL, CR)
    padded = torch.tensor([ids + [0] * padding])
    real = torch.tensor([[1] * len(ids) + [0] * padding])
    mask = dense_mask(rule.visible(padded, real), *padded.shape)[0]
    assert mask[: len(ids), : len(ids)].tolist() == slow_rules.kv_mask(ids, CL, CR)
    assert torch.equal(mask[:, len(ids) :], torch.eye(len(ids) + padding, dtype=torch.bool)[:, len(ids) :])
    assert rule.position_ids(padded, real)[0, : len(ids)].tolist() == slow_rules.positions(ids, CL, CR)


@settings(deadline=None, max_examples=50)
@given(batches())
def test_measure_counts_pairs_and_removed_entries(rows):
    cost = measure(KVCompression(CL, CR), torch.tensor(rows))
    attended = pairs = text_tokens = 0
    for ids in rows:
        text = [q for q, token in enumerate(ids) if token not in (CL, CR)]
        attended += sum(slow_rules.visible(ids, q, k, CL, CR) for q in text for k in range(q))
        pairs += math.comb(len(text), 2)
        text_tokens += len(text)
    held = []
    for ids in rows:
        mask = slow_rules.kv_mask(ids, CL, CR)
        held += [slow_rules.held_keys(mask, q) for q, token in enumerate(ids) if token not in (CL, CR)]
    removed = sum(slow_rules.removed(ids, CL, CR) for ids in rows)
    assert cost == (text_tokens, removed, attended, pairs, sum(held), max(held, default=0))


def test_measure_of_the_baselines():
    ids = torch.randint(3, 999, (3, 256))
    full = measure(Rule(), ids)
    assert (full.removed_fraction, full.attended_fraction) == (0, 1)
    assert (full.kept_keys_mean, full.most_kept) == (128.5, 256)
    local = measure(LocalAttention(ratio=0.9), ids)
    assert local.removed_fraction == 229 / 256  # floor(255 · 0.9) of 256 keys are gone for the last query
    scattered = measure(ScatteredAttention(ratio=0.9), ids)
    assert abs(scattered.removed_fraction - 0.9) < 0.05
    assert abs(scattered.attended_fraction - 0.1) < 0.05


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        LocalAttention(ratio=ratio)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHODS),
        ("kv_compression", {"sink_tokens": 2, "recent_tokens": 4, "cr_tokens": 2, "cr_visibility": "context"}),
        ("sink_attention", {"sink_tokens": 2}),
    ],
)
def test_no_rule_waits_for_the_device(method, options):
    """A tensor without content cannot be asked for a value, so that asking for one fails here."""
    documents = {"isolate_documents": True, "position_ids_by_document": True}
    rule = METHODS[method](cl_id=CL, cr_id=CR, ratio=0.5, seed=0, **options, **documents)
    ids = torch.empty(3, 40, dtype=torch.long, device="meta")
    mask = dense_mask(rule.visible(ids, torch.ones_like(ids)), *ids.shape, ids.device)
    assert (mask.shape, mask.dtype) == ((3, 40, 40), torch.bool)
    assert rule.position_ids(ids, torch.ones_like(ids)).shape == (3, 40)


@given(variants())
def test_sorted_keys_are_the_same_keys(variant):
    rule, _, block = variant
    ids = torch.tensor([block])
    order = rule.key_order(ids)
    assert torch.equal(order.sort(-1).values, torch.arange(ids.shape[1]).expand_as(ids))
    mask = dense_mask(rule.visible(ids), *ids.shape)
    moved = dense_mask(in_order(rule.visible(ids), order), *ids.shape)
    assert torch.equal(moved, mask.gather(2, order[:, None, :].expand_as(mask)))


def test_sorted_keys_leave_tiles_empty():
    rule = KVCompression(CL, CR)
    ids = torch.tensor([insert_sentinels([5] * 2048, exact_spans(2048, 0.9, 25, 0), CL, CR)])
    plain = block_mask(rule.visible(ids), *ids.shape).sparsity()
    moved = block_mask(in_order(rule.visible(ids), rule.key_order(ids)), *ids.shape).sparsity()
    assert plain < 50 < 80 < moved
