"""The package in other people's code: put a trained or a new rule to work in a model, compress a text.

Knows models, tokenizers, and of a run its results.json alone: nothing here trains, and nothing is needed of what the
experiments need.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from kv_compression.generation.sampling import as_batch, prefill
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.hub import check_hub, fetch, snapshot
from kv_compression.io.results import RESULTS, read_results
from kv_compression.methods import METHODS
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.rule import Rule
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.architectures import check_architecture
from kv_compression.model.attention import Patch, patch
from kv_compression.model.cache import SentinelCache
from kv_compression.model.following import refuse_misreading
from kv_compression.model.parts import causal_lm_of, decoder_of, input_device
from kv_compression.model.vocabulary import (
    CL_TOKEN,
    CR_TOKEN,
    add_sentinels,
    make_room,
    mark_rows,
    plain,
    refuse_unwritable,
    start_at_mean,
    unended,
    unset_rows,
)
from kv_compression.spans.exact import entries_to_remove, exact_spans, widest_window

OF_A_RULE = ("sink_tokens", "cr_tokens", "cr_visibility", "recent_tokens")


def load(run, *, revision: str | None = None, dtype: torch.dtype = torch.float32):
    """A trained run's model and tokenizer, ready to use: `(model, tokenizer)`.

    `run` is a folder that run_clm.py or export_model.py has left, or such a repository on the Hugging Face hub (at
    `revision`). The model is the one the run was trained on, its adapter merged into the weights (which generates
    faster), in evaluation mode, on the CPU, with the run's rule attached. `dtype` is torch.float32 or torch.bfloat16.
    Raises ValueError for another dtype, UsageError if there is no such folder, RunError if the run is damaged or the
    model it was trained on cannot be had; HF_HUB_OFFLINE=1 uses what was downloaded before.

    Example::

        model, tokenizer = kvc.load("output/paper/kv_compression_0.5")
        cache = kvc.compress(model, tokenizer, text, ratio=0.9)
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is torch.float32 or torch.bfloat16, not {dtype}")
    results = results_of(os.fspath(run), revision)
    folder = os.fspath(run) if Path(run).is_dir() else snapshot(os.fspath(run), revision)
    if "export" in results:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # loaders raise whatever their parsers do
            raise RunError(f"the model in {folder} cannot be loaded: {one_line(error)}") from error
    else:
        from kv_compression.settings import EMBEDDED  # what experiments need, the rest of the library does without

        base = results["model"]
        if base != EMBEDDED and not os.path.isdir(base):  # or downloads try again for a minute
            check_hub(base, "model", "an export of the run (export_model.py), which needs no other")
        from kv_compression.training.run import load_run

        tokenizer, model, _ = load_run(folder, "bf16" if dtype == torch.bfloat16 else "no")
    attach(model, folder)
    return model, tokenizer


def attach(model: nn.Module, source, *, revision: str | None = None, **options) -> Patch:
    """Make a model attend by a rule, and give it rows for the rule's sentinels.

    `model` is a transformers causal language model or a peft model around one. `source` says which rule:

    - a folder that run_clm.py or export_model.py has left, or such a repository on the Hugging Face hub (at
      `revision`): the method and options that were trained, and the run's sentinels;
    - a tokenizer: KV compression with the `options` `sink_tokens`, `cr_tokens`, `cr_visibility` and `recent_tokens`
      (`visibility.kv_compression`), for a model that is not trained yet; <CL> and <CR> are added to both. Which rows
      have been set stands in the model's configuration: neither a second call nor a trained model's rows are reset.

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
        refuse_tokenizer_of_a_run(source, causal_lm_of(model))
        cl_id, cr_id = add_sentinels(source, causal_lm_of(model))
        return _patched(model, replace(rule, cl_id=cl_id, cr_id=cr_id))
    if options:
        raise ValueError(f"{', '.join(options)}: the options are the run's, which {source} tells")
    results = results_of(os.fspath(source), revision)
    rule = rule_of(results, source)
    refuse_if_patched(model)
    if rule.uses_sentinels:
        restore_rows(causal_lm_of(model), rule, merged="export" in results)
    return _patched(model, rule)


def _patched(model: nn.Module, rule: Rule) -> Patch:
    patched = patch(model, rule=rule)
    patched._hooks.append(CarefulGenerate(causal_lm_of(model)))
    return patched


class CarefulGenerate:
    """A model's `generate` that refuses tokens which a filled `SentinelCache` would misread, until `remove()`."""

    def __init__(self, model: nn.Module):
        self.model = model
        model.generate = MethodType(_careful_generate, model)  # bound, so that a copy of the model has its own

    def remove(self) -> None:
        """Give the model its own `generate` back. Doing so twice is harmless."""
        self.model.__dict__.pop("generate", None)


ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@wraps(GenerationMixin.generate)
def _careful_generate(self, inputs=None, generation_config=None, *args, **kwargs):
    cache = kwargs.get("past_key_values")
    ids = kwargs.get("input_ids") if inputs is None else inputs
    if isinstance(cache, SentinelCache) and ids is not None:
        config = generation_config or self.generation_config
        if kwargs.get("use_cache", getattr(config, "use_cache", None)) is False:
            raise ValueError("use_cache=False reads all tokens again at every step, on top of what the cache holds")
        assisted = any(kwargs.get(name) or getattr(config, name, None) for name in ASSISTED)
        refuse_misreading(cache, ids, kwargs.get("attention_mask"), slices=not assisted)
    return type(self).generate(self, inputs, generation_config, *args, **kwargs)


def refuse_if_patched(model: nn.Module) -> None:
    """ValueError if it is, or cannot be, before a model changes."""
    if hasattr(decoder_of(model), "_sentinel_patch"):
        raise ValueError("the model is patched already: remove that patch first")
    check_architecture(causal_lm_of(model), decoder_of(model))


def refuse_tokenizer_of_a_run(tokenizer, model: nn.Module) -> None:
    """ValueError if a run's tokenizer meets rows of which nobody can say whether they are the run's, which stay."""
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
        known = {field.name for field in fields(method)} & set(OF_A_RULE)
        options = {name: settings[name] for name in known if name in settings}
        ids = {name: int(results["sentinels"][name]) for name in ("cl_id", "cr_id")} if method.uses_sentinels else {}
        if any(number < 0 for number in ids.values()):
            raise ValueError("sentinels are numbers from 0 on")
        return method(**ids, ratio=results["bound_ratio"], seed=results["seed"], **options)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{RESULTS} of {source} is damaged: {one_line(error)}") from error


def restore_rows(model: nn.Module, rule: Rule, merged: bool) -> None:
    """Give a model's embeddings the rows for <CL> and <CR> that it had in its run.

    The adapter holds what they have learnt, where input and output embedding are tied for both; an output embedding
    of its own keeps what they began with, which no adapter holds. `merged` weights hold everything. What was set
    before is left alone.
    """
    ids = (rule.cl_id, rule.cr_id)
    unset = unset_rows(model, *ids)
    if not unset:
        return
    refuse_unwritable(model)
    grown = make_room(model, *ids)
    embedding, head = (plain(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    if grown:
        start_at_mean(embedding, unset, ids)
    own_head = head is not None and head.weight is not embedding.weight
    if own_head and not merged:
        start_at_mean(head, unset, ids)
    mark_rows(model, *ids)


@torch.no_grad()
def compress(
    model: nn.Module,
    tokenizer,
    text: str | Sequence[str],
    ratio: float | None = None,
    *,
    max_span_length: int = 25,
    seed: int = 0,
    chunk: int = 128,
) -> SentinelCache:
    """Read a text, or several, into a cache that holds the share 1 − `ratio` of the keys; `attach` the model first.

    Under KV compression `ratio` is free (the one trained with is the default): spans of at most `max_span_length`
    tokens at places that `seed` fixes become one key each, or as many as the rule has <CR>, so that exactly
    round(ratio · tokens) keys have left when the text has been read. Where a window (`recent_tokens`) is too wide for
    that, the last of them leave as tokens follow: a UserWarning says how many keys are held until then. Any other
    method drops by its own ratio. The text is read `chunk` tokens at a time, and peak memory follows what is kept.
    Returns a cache with a row for every text, each compressed as it would be alone; `followed_by` continues it.
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
    rows = []
    for number, each in enumerate(texts):
        try:
            rows.append(mark(unended(tokenizer, each), rule, ratio, max_span_length, seed))
        except ValueError as error:
            raise ValueError(f"text {number} of {len(texts)}: {error}" if len(texts) > 1 else str(error)) from error
    cache = SentinelCache(rule=rule)
    input_ids, padding = as_batch(rows, input_device(model))
    prefill(model, input_ids, cache, padding, chunk)
    if rule.uses_sentinels:
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
