"""Padding on either side, in one pass and through a cache: every row must be what it is alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_compression.methods import METHODS
from kv_compression.methods.cost import measure
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.rule import Rule
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from tests.layouts import CL, CR, blocks
from tests.models import random_model


class EveryOther(Rule):
    """A method that defines only its mask: by index, and by the ids."""

    name = "every_other"

    def mask_mod(self, input_ids):
        even = input_ids % 2 == 0
        return lambda b, h, q, k: (k <= q) & ((q - k < 3) | (k % 2 == 0) | even[b, k])


RULES = [
    *(method(cl_id=CL, cr_id=CR, ratio=0.6) for method in METHODS.values()),
    KVCompression(CL, CR, sink_tokens=1, recent_tokens=3),
    KVCompression(CL, CR, sink_tokens=2, cr_tokens=2, cr_visibility="context", recent_tokens=4),
    EveryOther(),
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{RULES.index(rule)}")


def beside(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on one side with 0, or half on both, and the mask that says so."""
    length = max(map(len, rows))
    ids, real = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        start = {"right": 0, "left": length - len(row), "both": (length - len(row)) // 2}[side]
        ids[number, start : start + len(row)], real[number, start : start + len(row)] = torch.tensor(row), 1
    return ids, real


@settings(deadline=None, max_examples=60)
@given(st.lists(blocks(), min_size=2, max_size=3), st.sampled_from(["left", "right", "both"]), st.data())
def test_a_padded_row_has_the_mask_and_the_cost_it_has_alone(rows, side, data):
    rule = data.draw(st.sampled_from(RULES))
    ids, real = beside(rows, side)
    ids = torch.where(real.bool(), ids, data.draw(st.sampled_from([0, CL, CR])))  # whatever the padding's id is
    mask, positions = rule.mask(ids, real), rule.position_ids(ids, real)
    for number, row in enumerate(rows):
        own = real[number].bool()
        alone = torch.tensor([row])
        assert torch.equal(mask[number][own][:, own], rule.mask(alone)[0])
        assert not mask[number][own][:, ~own].any()
        assert torch.equal(positions[number][own], rule.position_ids(alone)[0])
    together = measure(rule, ids, real)
    assert together == sum(
        (measure(rule, torch.tensor([row])) for row in rows[1:]), measure(rule, torch.tensor(rows[:1]))
    )


@rules
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_one_pass_and_the_cache_give_a_padded_row_what_it_has_alone(rule, side):
    model, draw = random_model("llama", "sdpa", torch.float64), random.Random(0)
    rows = [[*draw.choices(range(3, 60), k=6), CL, *draw.choices(range(3, 60), k=n), CR, 7, 8] for n in (4, 9, 17)]
    ids, real = beside(rows, side)
    with Patch(model, rule):
        alone = [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        one_pass = model(ids, attention_mask=real, use_cache=False).logits
        cache = SentinelCache(rule=rule)
        parts = [
            model(part, attention_mask=mask, past_key_values=cache).logits
            for part, mask in zip(ids.split(5, dim=1), real.split(5, dim=1))
        ]
    for logits in (one_pass, torch.cat(parts, dim=1)):
        for number, expected in enumerate(alone):
            assert (logits[number][real[number].bool()] - expected).abs().max() < 1e-9
