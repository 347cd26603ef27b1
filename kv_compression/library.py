"""The package in other people's code: put a trained or a new rule to work in a model, compress a text.

Knows models, tokenizers, and of a run its results.json alone: nothing here trains, and nothing is needed of what the
experiments need.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from kv_compression.attention import Patch, patch
from kv_compression.cache import SentinelCache, causal_lm_of, decoder_of
from kv_compression.errors import RunError, UsageError, one_line
from kv_compression.generation import prefill
from kv_compression.hub import fetch
from kv_compression.results import RESULTS, read_results
from kv_compression.sentinels import add_sentinels, insert_sentinels, make_room, start_at_mean, unended
from kv_compression.spans import entries_to_remove, exact_spans, widest_window
from kv_compression.visibility import METHODS, KVCompression, Rule

OF_A_RULE = ("sink_tokens", "cr_tokens", "cr_visibility", "recent_tokens")


def attach(model: nn.Module, source, *, revision: str | None = None, **options) -> Patch:
    """Make a model attend by a rule, and give it rows for the rule's sentinels.

    `model` is a transformers causal language model or a peft model around one. `source` says which rule:

    - a folder that run_clm.py or export_model.py has left, or such a repository on the Hugging Face hub (at
      `revision`): the method and options that were trained, and the run's sentinels;
    - a tokenizer: KV compression with the `options` `sink_tokens`, `cr_tokens`, `cr_visibility` and `recent_tokens`
      (`visibility.kv_compression`), for a model that is not trained yet; <CL> and <CR> are added to both.

    Before or behind `PeftModel.from_pretrained`; if before, the model's embedding need not be resized for the adapter.
    The returned patch has the `rule`; `remove()`, or the end of a with-block, leaves the model's attention as it was.
    Raises ValueError for options that the rule does not have or a model that is patched already, UsageError if there
    is no such folder, RunError if results.json is damaged or cannot be had.

    A trained model, from the hub or from a folder::

        model = AutoPeftModelForCausalLM.from_pretrained("owner/name")
        patch = kvc.attach(model, "owner/name")

    A new one::

        with kvc.attach(model, tokenizer, sink_tokens=1) as patch:
            logits = model(input_ids).logits  # mask and position ids follow from the sentinels in input_ids
    """
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "add_tokens"):
            raise TypeError(f"source is a folder, a repository's name or a tokenizer, not a {type(source).__name__}")
        if revision is not None:
            raise ValueError("a tokenizer has no revision")
        unknown = [name for name in options if name not in OF_A_RULE]
        if unknown:
            raise ValueError(f"{unknown[0]} is no option of KV compression: choose from {', '.join(OF_A_RULE)}")
        rule = KVCompression(**options)  # says what is wrong before anything is changed
        refuse_if_patched(model)
        cl_id, cr_id = add_sentinels(source, causal_lm_of(model))
        return patch(model, rule=replace(rule, cl_id=cl_id, cr_id=cr_id))
    if options:
        raise ValueError(f"{', '.join(options)}: the options are the run's, which {source} tells")
    results = results_of(os.fspath(source), revision)
    rule = rule_of(results, source)
    refuse_if_patched(model)
    if rule.uses_sentinels:
        restore_rows(causal_lm_of(model), rule, merged="export" in results)
    return patch(model, rule=rule)


def refuse_if_patched(model: nn.Module) -> None:
    """ValueError if it is, before a model changes."""
    if hasattr(decoder_of(model), "_sentinel_patch"):
        raise ValueError("the model is patched already: remove that patch first")


def results_of(source: str, revision: str | None = None) -> dict:
    """results.json of a run's folder, or of a repository on the hub. UsageError if there is none, RunError if it is
    damaged or the hub does not give it."""
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


def rule_of(results: dict, source="the run") -> Rule:
    """The rule that a run's model was trained and scored under, for text of one document. RunError if it is damaged."""
    try:
        method = METHODS[results["method"]]
        settings = {**results["settings"]}
        options = {name: settings[name] for name in OF_A_RULE if name in settings}
        ids = {name: int(results["sentinels"][name]) for name in ("cl_id", "cr_id")} if method.uses_sentinels else {}
        if any(number < 0 for number in ids.values()):
            raise ValueError("sentinels are numbers from 0 on")
        return method(**ids, ratio=results["bound_ratio"], seed=results["seed"], **options)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{RESULTS} of {source} is damaged: {one_line(error)}") from error


def restore_rows(model: nn.Module, rule: Rule, merged: bool) -> None:
    """Give a model's embeddings the rows for <CL> and <CR> that it had in its run.

    The adapter holds what they have learnt, where input and output embedding are tied for both; an output embedding
    of its own keeps what they began with, which no adapter holds. `merged` weights hold everything.
    """
    ids = [rule.cl_id, rule.cr_id]
    grown = make_room(model, *ids)
    embedding, head = (plain(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    if grown:
        start_at_mean(embedding, min(ids), ids)
    own_head = head is not None and head.weight is not embedding.weight
    if own_head and not merged:
        start_at_mean(head, min(ids), ids)


def plain(module: nn.Module | None) -> nn.Module | None:
    """The module itself, where peft has put a wrapper around it."""
    return getattr(module, "original_module", module)


@torch.no_grad()
def compress(
    model: nn.Module,
    tokenizer,
    text: str,
    ratio: float | None = None,
    *,
    max_span_length: int = 25,
    seed: int = 0,
    chunk: int = 128,
) -> SentinelCache:
    """Read a text into a cache that holds the share 1 − `ratio` of its keys; `attach` the model first.

    Under KV compression `ratio` is free (the one trained with is the default): spans of at most `max_span_length`
    tokens at places that `seed` fixes become one key each, or as many as the rule has <CR>, so that exactly
    round(ratio · tokens) keys leave. With `recent_tokens` the last of them leave when as many tokens have followed.
    Any other method drops by its own ratio. The text is read `chunk` tokens at a time, and peak memory follows what
    is kept. Returns a cache of one row; `followed_by` goes on from it. ValueError if the ratio cannot be had.
    (Protocol `matched`, this project.)

    Example::

        cache = kvc.compress(model, tokenizer, text, ratio=0.9)
        cache.length, cache.logical_length  # keys held, tokens of the text
        model.generate(**cache.followed_by(question), max_new_tokens=64)
    """
    patched = getattr(decoder_of(model), "_sentinel_patch", None)
    if patched is None:
        raise ValueError("the model has no rule to compress by: attach(model, …) first")
    rule = patched.rule
    ids = mark(unended(tokenizer, text), rule, ratio, max_span_length, seed)
    cache = SentinelCache(rule=rule)
    prefill(model, torch.tensor([ids], device=next(model.parameters()).device), cache, chunk=chunk)
    return cache


def mark(tokens: list[int], rule: Rule, ratio: float | None, max_span_length: int, seed: int) -> list[int]:
    """Token ids with the sentinels between which a rule compresses them. ValueError if they cannot be compressed so."""
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
    shape = (len(tokens), ratio, max_span_length, rule.cr_tokens, first)
    entries_to_remove(*shape)  # says what is wrong
    # A window that fits a training block may leave a shorter text no room for spans.
    last = len(tokens) - min(rule.recent_tokens, widest_window(*shape))
    rng = np.random.default_rng(seed)
    spans = exact_spans(len(tokens), ratio, max_span_length, rng, cr_tokens=rule.cr_tokens, first=first, last=last)
    return insert_sentinels(tokens, spans, rule.cl_id, rule.cr_id, rule.cr_tokens)
