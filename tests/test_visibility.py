import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_compression import visibility
from tests import slow_rules
from tests.layouts import CL, CR, batches, blocks

RATIOS = st.floats(0, 0.999)


@given(batches())
def test_kv_compression_mask_is_the_restated_rule(rows):
    mask = visibility.kv_compression_mask(torch.tensor(rows), CL, CR)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [slow_rules.kv_mask(row, CL, CR) for row in rows]


def test_kv_compression_mask_as_drawn():
    mask = visibility.kv_compression_mask(torch.tensor([[5, 6, CL, 7, 8, CR, 9]]), CL, CR)[0]
    drawn = ["1......", "11.....", "..1....", "11.1...", "11.11..", "..1111.", "11...11"]
    assert ["".join(".1"[seen] for seen in row) for row in mask.int().tolist()] == drawn


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_any_order_of_sentinels_has_the_restated_mask(ids):
    mask = visibility.kv_compression_mask(torch.tensor([ids]), CL, CR)[0]
    assert mask.tolist() == slow_rules.kv_mask(ids, CL, CR)
    assert visibility.KVCompression(CL, CR).removed(torch.tensor([ids])).item() == slow_rules.removed(ids, CL, CR)


@given(st.integers(1, 300), RATIOS)
def test_local_attention_mask_is_the_restated_rule(length, ratio):
    mask = visibility.local_attention_mask(length, ratio)
    assert mask.tolist() == slow_rules.local_mask(length, ratio)


@given(st.integers(1, 40), RATIOS, st.integers(0, 99))
def test_scattered_attention_shares_one_draw(length, ratio, seed):
    mask = visibility.scattered_attention_mask(length, ratio, torch.Generator().manual_seed(seed))
    assert mask.shape == (length, length)
    assert mask.diagonal().all()
    kept = mask[-1]
    for q in range(length - 1):
        assert torch.equal(mask[q, :q], kept[:q])
        assert not mask[q, q + 1 :].any()


def test_scattered_attention_keeps_the_stated_share():
    drawn = visibility.scattered_attention_mask(4000, 0.3, torch.Generator().manual_seed(0))[-1].float()
    assert abs(drawn.mean().item() - 0.7) < 0.03
    kept = visibility.draw_keys(torch.randint(0, 50000, (200, 500)), 0.3, seed=1).float()
    assert abs(kept.mean().item() - 0.7) < 0.01
    assert kept.mean(0).std() < 0.06  # no position is favoured: binomial spread is 0.032
    assert kept.mean(1).std() < 0.04  # no block either: 0.0205


def test_the_draw_depends_on_seed_and_prefix_alone():
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    kept = visibility.draw_keys(ids, 0.5, seed=3)
    assert torch.equal(kept[2:3], visibility.draw_keys(ids[2:3], 0.5, seed=3))
    assert torch.equal(kept[:, :20], visibility.draw_keys(ids[:, :20], 0.5, seed=3))
    assert not torch.equal(kept, visibility.draw_keys(ids, 0.5, seed=4))
    assert not torch.equal(kept[0], kept[1])


def rules(ids: torch.Tensor) -> dict:
    return {
        "full_attention": visibility.causal,
        "kv_compression": visibility.kv_compression(ids, CL, CR),
        "local_attention": visibility.local_attention(ids.shape[1], 0.6),
        "scattered_attention": visibility.scattered_attention(visibility.draw_keys(ids, 0.6, 0)),
    }


@pytest.mark.parametrize("method", visibility.METHODS)
def test_block_mask_and_dense_mask_agree(method):
    from torch.nn.attention.flex_attention import create_mask

    ids = torch.randint(3, 9, (2, 150), generator=torch.Generator().manual_seed(0))
    ids[0, [10, 40, 90]], ids[0, [20, 60]], ids[1, [5, 130]], ids[1, 100] = CL, CR, CR, CL
    rule = rules(ids)[method]
    block = visibility.block_mask(rule, 2, 150)
    dense = visibility.dense_mask(rule, 2, 150)
    assert torch.equal(create_mask(block.mask_mod, 2, 1, 150, 150, device="cpu")[:, 0], dense)
    # A block of 128 × 128 pairs may be skipped only if nothing in it is visible.
    tiles = torch.nn.functional.pad(dense, (0, 106, 0, 106)).view(2, 2, 128, 2, 128).any(4).any(2)
    assert torch.equal(block.to_dense()[:, 0].bool(), tiles)


@given(blocks(), st.integers(1, 5))
def test_padding_is_seen_by_itself_alone(ids, padding):
    rule = visibility.KVCompression(CL, CR)
    padded = torch.tensor([ids + [0] * padding])
    real = torch.tensor([[1] * len(ids) + [0] * padding])
    mask = visibility.dense_mask(rule.visible(padded, real), *padded.shape)[0]
    assert mask[: len(ids), : len(ids)].tolist() == slow_rules.kv_mask(ids, CL, CR)
    assert torch.equal(mask[:, len(ids) :], torch.eye(len(ids) + padding, dtype=torch.bool)[:, len(ids) :])
    assert rule.position_ids(padded, real)[0, : len(ids)].tolist() == slow_rules.positions(ids, CL, CR)


@given(batches())
def test_measure_counts_pairs_and_removed_entries(rows):
    cost = visibility.measure(visibility.KVCompression(CL, CR), torch.tensor(rows))
    attended = pairs = text_tokens = 0
    for ids in rows:
        text = [q for q, token in enumerate(ids) if token not in (CL, CR)]
        attended += sum(slow_rules.visible(ids, q, k, CL, CR) for q in text for k in range(q))
        pairs += math.comb(len(text), 2)
        text_tokens += len(text)
    assert cost == (text_tokens, sum(slow_rules.removed(ids, CL, CR) for ids in rows), attended, pairs)


def test_measure_of_the_baselines():
    ids = torch.randint(3, 999, (3, 256))
    full = visibility.measure(visibility.Rule(), ids)
    assert (full.removed_fraction, full.attended_fraction) == (0, 1)
    local = visibility.measure(visibility.LocalAttention(ratio=0.9), ids)
    assert local.removed_fraction == 229 / 256  # floor(255 · 0.9) of 256 keys are gone for the last query
    scattered = visibility.measure(visibility.ScatteredAttention(ratio=0.9), ids)
    assert abs(scattered.removed_fraction - 0.9) < 0.05
    assert abs(scattered.attended_fraction - 0.1) < 0.05


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_the_range_is_refused(ratio):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        visibility.LocalAttention(ratio=ratio)
