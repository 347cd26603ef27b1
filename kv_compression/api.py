"""The package in other people's code: put a trained or a new rule to work in a model, compress a text.

Needs models, tokenizers and a run's results.json; only `load` needs what the experiments need.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.hub import check_hub, fetch, snapshot
from kv_compression.io.results import RESULTS, read_results
from kv_compression.methods import METHODS
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.ratio import entries_to_remove, shortest_spans, widest_window
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.architectures import causal_lm_of, check_architecture, decoder_of, input_device
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from kv_compression.model.following import GenerateGuard
from kv_compression.model.reading import as_batch, prefill
from kv_compression.model.vocabulary import (
    CL_TOKEN,
    CR_TOKEN,
    add_sentinels,
    plain,
    restore_rows,
    unended,
    unset_rows,
)
from kv_compression.spans.exact import exact_spans


def load(run, *, revision: str | None = None, dtype: torch.dtype = torch.float32):
    """A trained run's model and tokenizer, ready to use: `(model, tokenizer)`.

    `run` is a folder that run_clm.py or export_model.py has written, or such a repository on the Hugging Face hub (at
    `revision`). The model is the one the run was trained on, its adapter merged into the weights (which generates
    faster), in evaluation mode, on the CPU, with the run's rule attached. `dtype` is torch.float32 or torch.bfloat16.
    Raises ValueError for another dtype, UsageError if there is no such folder, RunError if the run is damaged or the
    model it was trained on cannot be loaded. HF_HUB_OFFLINE=1 uses what was downloaded before.

    Example::

        model, tokenizer = kvc.load("output/paper/kv_compression_0.5")
        cache = kvc.compress(model, tokenizer, text, ratio=0.9)
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is torch.float32 or torch.bfloat16, not {dtype}")
    run = os.fspath(run)
    results = results_of(run, revision)
    folder = run if Path(run).is_dir() else snapshot(run, revision)
    if "export" in results:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # loaders raise whatever their parsers do
            raise RunError(f"the model in {folder} cannot be loaded: {one_line(error)}") from error
    else:
        from kv_compression.settings import EMBEDDED  # only experiments need these two
        from kv_compression.training.loading import load_run

        base = results["model"]
        if base != EMBEDDED and not os.path.isdir(base):  # or downloads try again for a minute
            check_hub(base, "model", "an export of the run (export_model.py), which needs no other")
        tokenizer, model, _ = load_run(folder, "bf16" if dtype == torch.bfloat16 else "no")
    attach(model, folder)
    return model, tokenizer


def attach(model: nn.Module, source=None, *, rule: Rule | None = None, revision: str | None = None, **options) -> Patch:
    """Make a model attend by a rule until the returned patch is removed; add rows for the sentinels it needs.

    `model` is a transformers causal language model or a peft model around one. `source` says where the sentinels are
    from, and the rule unless `rule` gives another:

    - a folder that run_clm.py or export_model.py has written, or such a repository on the Hugging Face hub (at
      `revision`): the run's method, options and sentinels. Attach before or after `PeftModel.from_pretrained`; if
      before, the model's embedding need not be resized for the adapter.
    - a tokenizer: KV compression with the `options` of `methods.kv_compression.KVCompression`, for a model that is not
      trained yet. <CL> and <CR> are added to both. The model's configuration notes which rows have been set: neither
      a second call nor a trained model's rows are reset.
    - nothing: `rule` as it is. Nothing is added to the model.

    The patch has the `rule`. Its `remove()`, or the end of a with-block, leaves the model's attention as it was.
    Raises ValueError for options that the rule does not have or a model that is patched already, UsageError if there
    is no such folder, RunError if results.json is damaged or cannot be loaded.

    A trained model, from the hub or from a folder::

        model = AutoPeftModelForCausalLM.from_pretrained("owner/name")
        patch = kvc.attach(model, "owner/name")

    A new one::

        with kvc.attach(model, tokenizer, sink_tokens=1) as patch:
            logits = model(input_ids).logits  # mask and position ids follow from the sentinels in input_ids

    A ready rule::

        with kvc.attach(model, rule=LocalAttention(ratio=0.5)):
            logits = model(input_ids).logits
    """
    trained = SpanLengths()
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule is a rule of kv_compression.methods, not a {type(rule).__name__}")
    if options and (rule is not None or isinstance(source, str | os.PathLike)):
        raise ValueError(f"{', '.join(options)}: the options are the {'run' if rule is None else 'rule'}'s")
    if isinstance(source, str | os.PathLike):
        rule, trained = _prepare_for_run(model, os.fspath(source), revision, rule)
    elif revision is not None:
        raise ValueError("only a run has a revision")
    elif source is None and rule is not None:
        if rule.uses_sentinels and min(rule.cl_id, rule.cr_id) < 0:
            raise ValueError("the rule has no ids for <CL> and <CR>: attach(model, tokenizer, rule=…) gives it some")
    elif hasattr(source, "add_tokens"):
        rule = _prepare_for_tokenizer(model, source, _new_rule(options) if rule is None else rule)
    else:
        kind = type(source).__name__
        raise TypeError(f"source is a folder, a repository's name or a tokenizer, not a {kind} (a rule goes in rule=…)")
    attached = Patch(model, rule)
    attached.trained_spans = trained
    attached._hooks.append(GenerateGuard(causal_lm_of(model)))
    return attached


def options_of(method: type[Rule]) -> list[str]:
    """The options that a method's rule has beyond those of every rule."""
    common = {field.name for field in fields(Rule)}
    return [field.name for field in fields(method) if field.name not in common]


def _new_rule(options: dict) -> KVCompression:
    """KV compression with these options; ValueError if there are no such options."""
    known = options_of(KVCompression)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{unknown[0]} is no option of KV compression: choose from {', '.join(known)}")
    return KVCompression(**options)


class SpanLengths(NamedTuple):
    """The `longest` span that `compress` makes; unless `strict`, where the ratio demands it, up to 25 tokens instead.

    If `shortest`, they are no longer than it demands.
    """

    longest: int = 25
    shortest: bool = False
    strict: bool = True


def _prepare_for_run(model: nn.Module, run: str, revision: str | None, rule: Rule | None) -> tuple[Rule, SpanLengths]:
    """Give a model the rows of a run's sentinels; returns the run's rule, or `rule` with the run's sentinels, and the
    run's spans."""
    results = results_of(run, revision)
    trained = rule_of_run(results, run)
    rule = trained if rule is None else rule
    refuse_if_patched(model)
    if trained.uses_sentinels:
        restore_rows(causal_lm_of(model), trained.cl_id, trained.cr_id, merged="export" in results)
        rule = replace(rule, cl_id=trained.cl_id, cr_id=trained.cr_id)
    elif rule.uses_sentinels:
        raise ValueError(f"{run} was trained with {trained.name}: it has no sentinels to compress with")
    return rule, spans_of_run(results)


def spans_of_run(results: dict) -> SpanLengths:
    """How long spans were in training; words, in the protocol paper, are as good as tokens here."""
    settings = results["settings"]
    longest = settings.get("max_span_length", SpanLengths().longest)
    return SpanLengths(longest, settings.get("span_sampler") == "shortest", strict=False)


def _prepare_for_tokenizer(model: nn.Module, tokenizer, rule: Rule) -> Rule:
    """Add <CL> and <CR> to a tokenizer and a model; returns the rule with their ids."""
    refuse_if_patched(model)
    if not rule.uses_sentinels:
        return rule
    refuse_tokenizer_of_a_run(tokenizer, causal_lm_of(model))
    cl_id, cr_id = add_sentinels(tokenizer, causal_lm_of(model))
    return replace(rule, cl_id=cl_id, cr_id=cr_id)


def refuse_if_patched(model: nn.Module) -> None:
    """ValueError, before a model is changed, if it is patched already or cannot be."""
    if hasattr(decoder_of(model), "_sentinel_patch"):
        raise ValueError("the model is patched already: remove that patch first")
    check_architecture(causal_lm_of(model), decoder_of(model))


def refuse_tokenizer_of_a_run(tokenizer, model: nn.Module) -> None:
    """ValueError if the tokenizer is a run's, and the model's rows may be the run's but are not marked as set."""
    folder = str(getattr(tokenizer, "name_or_path", ""))
    if not folder or not (Path(folder) / RESULTS).is_file():
        return
    ids = tokenizer.convert_tokens_to_ids([CL_TOKEN, CR_TOKEN])
    rows = plain(model.get_input_embeddings()).weight.shape[0]
    if None not in ids and max(ids) < rows and unset_rows(model, *ids):
        raise ValueError(
            f"the tokenizer is that of the run {folder}, and the model may hold what the run has learnt: "
            f"attach(model, {folder!r}); to start anew, take the base model's tokenizer"
        )


def results_of(source: str, revision: str | None = None) -> dict:
    """results.json of a run's folder, or of a repository on the hub.

    UsageError if there is none, RunError if it is damaged or cannot be downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise UsageError(f"{source}: no such folder") from error
        folder = fetch(source, RESULTS, revision).parent
    results = read_results(folder)
    if results is None:
        raise UsageError(f"{source} holds no {RESULTS}: it is not the folder of a finished run of run_clm.py")
    return results


def rule_of_run(results: dict, source="the run") -> Rule:
    """The rule that a run's model was trained and scored under, for text of one document. RunError if it is damaged."""
    try:
        method = METHODS[results["method"]]
        settings = {**results["settings"]}
        options = {name: settings[name] for name in options_of(method) if name in settings}
        ids = {name: int(results["sentinels"][name]) for name in ("cl_id", "cr_id")} if method.uses_sentinels else {}
        if any(number < 0 for number in ids.values()):
            raise ValueError("sentinels are numbers from 0 on")
        return method(**ids, ratio=results["bound_ratio"], seed=results["seed"], **options)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{RESULTS} of {source} is damaged: {one_line(error)}") from error


@torch.no_grad()
def compress(
    model: nn.Module,
    tokenizer,
    text: str | Sequence[str],
    ratio: float | None = None,
    *,
    max_span_length: int | None = None,
    seed: int = 0,
    chunk: int = 128,
) -> SentinelCache:
    """Read a text, or several, into a cache that holds the share 1 − `ratio` of the keys; `attach` the model first.

    Under KV compression `ratio` is free (by default the one trained with): spans of at most `max_span_length` tokens,
    at places that `seed` fixes, become one key each, or as many as the rule has <CR>, so that exactly
    round(ratio · tokens) keys have left when the text has been read. By default spans are as long as in training, or up
    to 25 tokens if the ratio demands it. If a window (`recent_tokens`) is too wide for that, the last of them leave as
    tokens follow: a UserWarning says how many keys are held until then. Any other method drops by its own ratio. The
    text is read `chunk` tokens at a time, and peak memory depends on what is kept. Returns a cache with a row for every
    text, each compressed as it would be alone; `followed_by` continues it.
    ValueError if there is no text or spans cannot remove that share. (Protocol `matched`, this project.)

    Example::

        cache = kvc.compress(model, tokenizer, text, ratio=0.9)
        cache.length, cache.logical_length  # keys held, tokens of the text
        model.generate(**cache.followed_by(question), max_new_tokens=64)
    """
    patched = getattr(decoder_of(model), "_sentinel_patch", None)
    if patched is None:
        raise ValueError("the model has no rule to compress by: attach(model, …) first")
    rule, texts = patched.rule, [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("there is no text to compress")
    spans = getattr(patched, "trained_spans", SpanLengths())
    spans = spans if max_span_length is None else SpanLengths(max_span_length)
    rows = []
    for number, each in enumerate(texts):
        try:
            rows.append(mark(unended(tokenizer, each), rule, ratio, spans, seed))
        except ValueError as error:
            raise ValueError(f"text {number} of {len(texts)}: {error}" if len(texts) > 1 else str(error)) from error
    cache = SentinelCache(rule=rule)
    input_ids, padding = as_batch(rows, input_device(model))
    prefill(model, input_ids, cache, padding, chunk)
    if rule.recent_tokens:
        warn_of_late_keys(cache, rule.ratio if ratio is None else ratio)
    return cache


def warn_of_late_keys(cache: SentinelCache, ratio: float) -> None:
    """UserWarning if a row holds more keys than the share 1 − `ratio`, because of the rule's window."""
    for held, read in zip(cache.lengths.tolist(), cache.text_read.tolist()):
        kept = read - round(ratio * read)
        if held > kept:
            warnings.warn(
                f"the cache holds {held} keys of {read} tokens, {held / read:.2f} of them: the window of "
                f"{cache.rule.recent_tokens} tokens is too wide for ratio {ratio}, and {held - kept} keys leave only "
                "as tokens follow",
                stacklevel=4,
            )
            return


def mark(tokens: list[int], rule: Rule, ratio: float | None, spans: SpanLengths, seed: int) -> list[int]:
    """Token ids with sentinels around the spans that a rule compresses. ValueError if that share cannot be removed."""
    if not tokens:
        raise ValueError("there is no text to compress")
    if not rule.uses_sentinels:
        if ratio not in (None, rule.ratio):
            raise ValueError(f"{rule.name} was attached at ratio {rule.ratio}, and drops keys at no other")
        return tokens
    if {rule.cl_id, rule.cr_id} & set(tokens):
        raise ValueError("the text holds <CL> or <CR>, which are reserved")
    if ratio is None and not rule.ratio:
        raise ValueError("say how much to compress: ratio=0.9 keeps a tenth")
    ratio = rule.ratio if ratio is None else ratio
    first = min(rule.sink_tokens, len(tokens))
    longest = spans.longest
    if not spans.strict:
        most = max(longest, SpanLengths().longest)
        longest = max(longest, shortest_spans(len(tokens), ratio, most, rule.cr_tokens, first))
    shape = (len(tokens), ratio, longest, rule.cr_tokens, first)
    entries_to_remove(*shape)  # says what is wrong
    # A window that fits a training block may leave no room for spans in a shorter text.
    last = len(tokens) - min(rule.recent_tokens, widest_window(*shape))
    rng, region = np.random.default_rng(seed), {"cr_tokens": rule.cr_tokens, "first": first, "last": last}
    if spans.shortest:
        longest = shortest_spans(len(tokens), ratio, longest, **region)
    found = exact_spans(len(tokens), ratio, longest, rng, **region)
    return insert_sentinels(tokens, found, rule.cl_id, rule.cr_id, rule.cr_tokens)
