"""How good continuations are: ROUGE-L and BERTScore against the real text, fluency under a language model.

The scores are the libraries' own; here they are only collected per document, averaged and compared.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from kv_compression.generation.words import folded_runs
from kv_compression.io import processes
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.model.vocabulary import unended

RESAMPLES = 10_000
FEWEST_DOCUMENTS = 6  # that can show a difference: of five no p-value can fall below 0.05
SKIPPED = (
    "records without an index of their own",
    "missing references",
    "missing continuations",
    "empty continuations",
    "continuations of one token (no perplexity)",
)


class Runs(Tokenizer):
    """What rouge_score compares, in any script; its own tokenizer throws away all but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        """The runs of `words.folded_runs`."""
        return folded_runs(text)


def rouge_l(references: Sequence[str], continuations: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of every pair, without stemming, 0 … 1; of ASCII texts rouge_score's own figures."""
    scorer = RougeScorer(["rougeL"], tokenizer=Runs())
    return [scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(references, continuations)]


class BertScorer:
    """BERTScore F1 with an encoder from the hub or a folder, by the output of its layer number `layer`.

    Texts are stripped, and cut where the encoder has no more positions. UsageError where bert-score does not know
    which layer is best and none is given, or the encoder has no such layer; RunError if it cannot be loaded.
    """

    def __init__(self, model: str, layer: int | None, device: torch.device, batch_size: int = 64):
        import bert_score

        if layer is None and model not in bert_score.utils.model2layers:
            raise UsageError(f"bert-score does not know {model}: say which layer to compare with --bertscore_layer N")
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=model, num_layers=layer, batch_size=batch_size, device=str(device), use_fast_tokenizer=True
            )
        except Exception as error:  # loaders raise whatever their parsers do
            if isinstance(error, AssertionError) and "num_layers" in str(error):
                raise UsageError(f"--bertscore_layer {layer}: {one_line(error)}") from error
            raise RunError(f"the BERTScore model {model} could not be loaded ({one_line(error)})") from error
        # Some encoders name no longest input; bert-score hands that to the tokenizer as a number it cannot hold.
        tokenizer = self.scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(self.scorer._model))

    def __call__(self, references: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """F1 of every pair."""
        return self.scorer.score(list(continuations), list(references))[2].tolist()


def usable_positions(encoder: torch.nn.Module) -> int:
    """The tokens that an encoder reads at most, 512 where it sets no bound.

    RoBERTa and its kin count positions from behind the padding's: they have fewer than their configuration says.
    """
    positions = getattr(encoder.config, "max_position_embeddings", None) or -1
    positions = positions if positions > 0 else 512  # XLNet's says -1
    for name, module in encoder.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions = min(positions, module.weight.shape[0] - padding - 1)
    return positions


class Fluency:
    """Perplexity of texts under a causal language model, each on its own, its first token not predicted.

    Texts are stripped, as in the public reproduction of the paper: the space before a continuation would make its first
    word easier. What a tokenizer puts before a text is read, what it puts behind is not scored.
    """

    def __init__(self, model: str, device: torch.device, batch_size: int = 16):
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, trust_remote_code=False
            )
        except Exception as error:  # loaders raise whatever their parsers do
            raise RunError(f"the fluency model {model} could not be loaded ({one_line(error)})") from error
        self.model.to(device).eval()
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Summed negative log-likelihood (nats) and number of predicted tokens of every text."""
        ids = [unended(self.tokenizer, text.strip()) for text in texts]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # texts of like length share a batch
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


@dataclass(frozen=True)
class Estimate:
    """A mean over documents and its 95% confidence interval (bootstrap over documents)."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one value a document, with the interval that resampling documents gives."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_p_value(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that two methods' scores on the same documents differ by chance alone.

    A permutation test: the sign of every document's difference is flipped at random.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not len(differences):
        return math.nan
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(differences)))
    extreme = np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12
    return float((extreme.sum() + 1) / (RESAMPLES + 1))


def least_p_value(documents: int) -> float:
    """The least that `paired_p_value` of so many documents can be: where all differences have one sign."""
    return min(2.0 ** (1 - documents), 1.0)


class Scores(NamedTuple):
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
    reason) and the token-weighted perplexity over all continuations. A document whose record is unusable, and an empty
    continuation, is counted, not scored. Processes that all call this with the same records share the documents, and
    all get everything.
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
        for name in ("rouge_l", "bertscore", "perplexity"):
            found = [value for score in scores[index] if (value := getattr(score, name)) is not None]
            if found:
                document[name] = sum(found) / len(found)
        documents[index] = document
    total = sum(score.count for score in every)
    weighted = math.exp(min(sum(score.loss for score in every) / total, 700)) if total else None
    return {"documents": documents, "skipped": skipped, "perplexity_token_weighted": weighted}


def _score(bert: BertScorer, fluency: Fluency, pairs: Sequence[list[tuple[str, str]]]) -> list[list[Scores]]:
    """The scores of every document's continuations, from its pairs of reference and continuation."""
    references, texts = ([pair[part] for own in pairs for pair in own] for part in (0, 1))
    rows = zip(rouge_l(references, texts), bert(references, texts) if texts else [], fluency(texts))
    scores = iter([Scores(rouge, f1, loss, count) for rouge, f1, (loss, count) in rows])
    return [list(itertools.islice(scores, len(own))) for own in pairs]
