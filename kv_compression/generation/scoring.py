"""How good continuations are: ROUGE-L and BERTScore against the real text, fluency under a language model.

The scores are the libraries' own; here they are collected and averaged per document.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from kv_compression.generation.comparing import METRICS
from kv_compression.generation.words import folded_runs
from kv_compression.io import processes
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.model.vocabulary import unended

SKIPPED = (
    "records without an index of their own",
    "missing references",
    "missing continuations",
    "empty continuations",
    "continuations of one token (no perplexity)",
)


class AnyScript(Tokenizer):
    """Tokenizes text in any script for rouge_score, whose own tokenizer drops all but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        """The text's `words.folded_runs`."""
        return folded_runs(text)


def rouge_l(references: Sequence[str], continuations: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of every pair, without stemming, from 0 to 1; for ASCII texts the figures are rouge_score's own."""
    scorer = RougeScorer(["rougeL"], tokenizer=AnyScript())
    return [scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(references, continuations)]


class BertScorer:
    """BERTScore F1 with an encoder from the hub or a folder, on the output of its layer number `layer`.

    Texts are stripped, and truncated to the encoder's positions. UsageError if `layer` is None and bert-score does not
    know the best one, or if the encoder has no such layer; RunError if the encoder cannot be loaded.
    """

    def __init__(self, model: str, layer: int | None, device: torch.device, batch_size: int = 64):
        import bert_score

        if layer is None and model not in bert_score.utils.model2layers:
            raise UsageError(f"bert-score does not know {model}: say which layer to compare with --bertscore_layer N")
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=model, num_layers=layer, batch_size=batch_size, device=str(device), use_fast_tokenizer=True
            )
        except Exception as error:  # loaders pass on any error of their parsers
            if isinstance(error, AssertionError) and "num_layers" in str(error):
                raise UsageError(f"--bertscore_layer {layer}: {one_line(error)}") from error
            raise RunError(f"the BERTScore model {model} could not be loaded ({one_line(error)})") from error
        # Some tokenizers have no maximal length: theirs is a number so large that truncation overflows.
        tokenizer = self.scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(self.scorer._model))

    def __call__(self, references: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """F1 of every pair."""
        return self.scorer.score(list(continuations), list(references))[2].tolist()


def usable_positions(encoder: torch.nn.Module) -> int:
    """The most tokens that an encoder can read, 512 if it sets no bound.

    RoBERTa and models like it count positions from the padding's position on, so they have fewer than their
    configuration says.
    """
    positions = getattr(encoder.config, "max_position_embeddings", None) or -1
    positions = positions if positions > 0 else 512  # XLNet's says -1
    for name, module in encoder.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions = min(positions, module.weight.shape[0] - padding - 1)
    return positions


class Fluency:
    """Perplexity of texts under a causal language model, each text alone, its first token not predicted.

    Texts are stripped, as in the public reproduction of the paper: the space before a continuation would make its first
    word easier. Special tokens that the tokenizer adds before a text are read; those after it are not scored.
    UsageError for a text that is longer than the model has positions.
    """

    def __init__(self, model: str, device: torch.device, batch_size: int = 16):
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # loaders pass on any error of their parsers
            raise RunError(f"the fluency model {model} could not be loaded ({one_line(error)})") from error
        self.model.to(device).eval()
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Summed negative log-likelihood (nats) and number of predicted tokens of every text."""
        ids = [unended(self.tokenizer, text.strip()) for text in texts]
        longest, positions = max(map(len, ids), default=0), getattr(self.model.config, "max_position_embeddings", None)
        if positions and 0 < positions < longest:
            raise UsageError(
                f"a text to score has {longest} tokens, more than the fluency model's {positions} positions: name "
                "another with --fluency_model"
            )
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # texts of similar length share a batch
        scores: list[tuple[float, int]] = [(0.0, 0)] * len(ids)
        for start in tqdm(range(0, len(order), self.batch_size), desc="fluency", leave=False):
            batch = [number for number in order[start : start + self.batch_size] if len(ids[number]) > 1]
            if not batch:
                continue
            length = max(len(ids[number]) for number in batch)
            tokens = torch.zeros(len(batch), length, dtype=torch.long)
            targets = torch.full_like(tokens, -100)
            for row, number in enumerate(batch):
                tokens[row, : len(ids[number])] = torch.tensor(ids[number])
                targets[row, : len(ids[number]) - 1] = torch.tensor(ids[number][1:])
            logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits.float()
            losses = cross_entropy(logits.transpose(1, 2), targets.to(self.device), reduction="none").sum(-1)
            for number, loss in zip(batch, losses.tolist()):
                scores[number] = (loss, len(ids[number]) - 1)
        return scores


class ScoresOfText(NamedTuple):
    """One continuation's scores; `loss` is in nats, over `count` predicted tokens."""

    rouge_l: float
    bertscore: float
    loss: float
    count: int

    @property
    def perplexity(self) -> float | None:
        """None where nothing is predicted."""
        return math.exp(min(self.loss / self.count, 700)) if self.count else None


def score_records(records: Sequence[dict], bert: BertScorer, fluency: Fluency) -> dict:
    """Scores of a generation file's records: per document, averaged over its continuations.

    Returns `documents` (by index: rouge_l, bertscore, perplexity), `skipped` (what could not be scored, counted by
    reason) and the token-weighted perplexity over all continuations. Unusable records and empty continuations are
    counted, not scored. All processes call this with the same records: they share the documents, and each gets all
    scores.
    """
    skipped = dict.fromkeys(SKIPPED, 0)
    pairs: dict[int, list[tuple[str, str]]] = {}
    for record in records:
        index, reference = record.get("index"), record.get("reference")
        texts = record.get("continuations")
        if not isinstance(index, int) or index in pairs:
            skipped["records without an index of their own"] += 1
            continue
        if not isinstance(reference, str) or not reference.strip():
            skipped["missing references"] += 1
            continue
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            skipped["missing continuations"] += 1
            continue
        skipped["empty continuations"] += sum(not text.strip() for text in texts)
        pairs[index] = [(reference, text) for text in texts if text.strip()]
    scores = dict(zip(pairs, processes.split_work(partial(_score, bert, fluency), list(pairs.values()))))
    every = list(itertools.chain.from_iterable(scores.values()))
    skipped["continuations of one token (no perplexity)"] = sum(score.count == 0 for score in every)
    documents: dict[int, dict[str, float]] = {}
    for index in sorted(index for index, own in scores.items() if own):
        document = {}
        for name in METRICS:
            found = [value for score in scores[index] if (value := getattr(score, name)) is not None]
            if found:
                document[name] = sum(found) / len(found)
        documents[index] = document
    total = sum(score.count for score in every)
    weighted = math.exp(min(sum(score.loss for score in every) / total, 700)) if total else None
    return {"documents": documents, "skipped": skipped, "perplexity_token_weighted": weighted}


def _score(bert: BertScorer, fluency: Fluency, pairs: Sequence[list[tuple[str, str]]]) -> list[list[ScoresOfText]]:
    """The scores of every document's continuations, from its `(reference, continuation)` pairs."""
    references, texts = ([pair[part] for own in pairs for pair in own] for part in (0, 1))
    rows = zip(rouge_l(references, texts), bert(references, texts) if texts else [], fluency(texts))
    scores = iter([ScoresOfText(rouge, f1, loss, count) for rouge, f1, (loss, count) in rows])
    return [list(itertools.islice(scores, len(own))) for own in pairs]
