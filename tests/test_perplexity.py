import math

import accelerate
import pytest
import torch
from torch.nn.functional import cross_entropy

from kv_compression.data.blocks import Blocks
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.model.attention import Patch
from kv_compression.model.loss import TokenLosses
from kv_compression.spans.plan import SpanPlan
from kv_compression.training import evaluation
from tests import slow_rules
from tests.layouts import CL, CR
from tests.models import random_model
from tests.test_attention import WINDOWS, windowed_model


def blocks_of(count: int, ratio: float = 0.4) -> Blocks:
    tokens = torch.randint(3, 64, (count, 24), generator=torch.Generator().manual_seed(0))
    return Blocks(tokens, "test", SpanPlan(True, ratio, 6, 0), CL, CR)


def evaluate(model, blocks, rule, **options):
    return evaluation.evaluate(TokenLosses(model), blocks, rule, accelerate.Accelerator(), **options)


def slow_scores(model, blocks) -> list[tuple[float, int]]:
    """Summed loss and number of targets of every block, one block at a time."""
    scores = []
    for index in range(len(blocks)):
        ids = torch.tensor([blocks[index]])
        targets = torch.tensor(slow_rules.targets(blocks[index], CL, CR))
        loss = cross_entropy(model(ids).logits[0], targets, reduction="sum")
        scores.append((loss.item(), int((targets >= 0).sum())))
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_matched_perplexity_weighs_every_target_token_the_same(batch_size):
    model, blocks, rule = random_model("gpt_neox"), blocks_of(5), KVCompression(CL, CR)
    with torch.no_grad(), Patch(model, rule):
        score = evaluate(model, blocks, rule, batch_size=batch_size, protocol="matched")
        slow = slow_scores(model, blocks)
    assert score.num_targets == sum(count for _, count in slow) == 5 * 23
    assert score.nll == pytest.approx(sum(loss for loss, _ in slow) / score.num_targets, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))
    assert score.removed_fraction == 10 / 24
    assert 0 < score.attended_fraction < 1


def test_paper_perplexity_is_the_mean_of_batch_means():
    model, rule = random_model("gpt_neox"), KVCompression(CL, CR)
    blocks = blocks_of(3)
    blocks.plan = None  # sentinels in the blocks, so that blocks differ in their number of targets
    blocks.tokens[0, [2, 5, 8, 10]] = torch.tensor([CL, CR, CL, CR])
    with torch.no_grad(), Patch(model, rule):
        score = evaluate(model, blocks, rule, batch_size=2, protocol="paper")
        slow = slow_scores(model, blocks)
    batches = [slow[:2], slow[2:]]
    means = [sum(loss for loss, _ in batch) / sum(count for _, count in batch) for batch in batches]
    assert score.nll == pytest.approx(sum(means) / 2, rel=1e-5)
    assert score.nll_per_token == pytest.approx(sum(x for x, _ in slow) / sum(n for _, n in slow), rel=1e-5)
    assert score.nll != pytest.approx(score.nll_per_token, rel=1e-6)


@pytest.mark.parametrize("kind", WINDOWS)
def test_full_attention_has_the_untouched_model_s_perplexity_whatever_its_windows(kind):
    model, blocks = windowed_model(kind, dtype=torch.float32), blocks_of(5, ratio=0.0)
    with torch.no_grad():
        logits = model(blocks.tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
        nll = cross_entropy(logits, blocks.tokens[:, 1:].flatten()).item()
        with Patch(model, FullAttention()) as patch:
            score = evaluate(model, blocks, patch.rule, batch_size=2, protocol="matched")
    assert score.nll == pytest.approx(nll, rel=1e-5)


def test_blocks_of_similar_length_share_a_batch():
    assert evaluation.batches_by_length([5, 3, 5, 4, 3], 2) == [[1, 4], [3, 0], [2]]
    assert evaluation.batches_by_length([7, 7, 7], 2) == [[0, 1], [2]]


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert evaluation.to_perplexity(1e4) == math.inf
