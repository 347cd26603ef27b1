"""Saved caches: a safetensors file that holds nothing which a reader would have to trust."""

import itertools
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kv_compression.io.errors import RunError, one_line
from kv_compression.io.fields import is_count
from kv_compression.io.tensor_files import read_tensors, write_tensors
from kv_compression.methods import METHODS
from kv_compression.methods.rule import NEVER, Rule
from kv_compression.model.cache import PER_ROW, PER_SLOT, SentinelCache, SentinelLayer

FORMAT = "kv_compression.SentinelCache 4"


def save(cache: SentinelCache, path: Path) -> None:
    """`SentinelCache.save`."""
    tensors = {
        name: getattr(cache, name).contiguous() for name in PER_SLOT + PER_ROW if getattr(cache, name) is not None
    }
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            tensors[f"keys.{number}"] = layer.keys.contiguous()
            tensors[f"values.{number}"] = layer.values.contiguous()
    options = asdict(cache.rule) | {"ratio": float(cache.rule.ratio)}
    note = {"format": FORMAT, "rule": cache.rule.name, "options": options, "tokens_read": cache.get_seq_length()}
    try:
        write_tensors(path, tensors, note)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def load(path: Path, device="cpu") -> SentinelCache:
    """`SentinelCache.load`."""
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    tensors, note = read_tensors(path) or ({}, None)
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        raise RunError(f"{path} is damaged, or not a saved SentinelCache of this version")
    try:
        cache = SentinelCache(rule=_rule_of(note))
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        _restore(cache, tensors, note.get("tokens_read"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read as a saved SentinelCache: {one_line(error)}") from error
    return cache


def _restore(cache: SentinelCache, tensors: dict[str, Tensor], tokens_read: int) -> None:
    """Fill an empty cache with what was saved; ValueError if its parts are not of one cache."""
    if not is_count(tokens_read) or tokens_read >= NEVER:
        raise ValueError(f"tokens_read is {tokens_read}")
    if not tensors and not tokens_read:
        return
    layers = range((len(tensors) - len(PER_SLOT + PER_ROW)) // 2)
    states = [(f"keys.{number}", f"values.{number}") for number in layers]
    if not states or tensors.keys() != {*PER_SLOT, *PER_ROW, *itertools.chain(*states)}:
        raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
    batch, slots = (*tensors["kinds"].shape, 0, 0)[:2]
    for name in PER_SLOT + PER_ROW:
        shape = (batch, slots) if name in PER_SLOT else (batch,)
        dtype = torch.bool if name in ("real", "began") else torch.long
        if not batch or tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)} instead of {shape}")
        setattr(cache, name, tensors[name])
    of_states = tensors["keys.0"].dtype
    for keys, values in ((tensors[keys], tensors[values]) for keys, values in states):
        cache.layers.append(_layer(keys, values, of_states, batch, slots))
    _check(cache, tokens_read)
    cache.resume(tokens_read)


def _layer(keys: Tensor, values: Tensor, dtype: torch.dtype, batch: int, slots: int) -> SentinelLayer:
    """A layer of these keys and values; ValueError if they cannot be of one layer."""
    if keys.dtype != dtype or values.dtype != dtype or not dtype.is_floating_point:
        raise ValueError(f"keys are {keys.dtype}, values {values.dtype}, others {dtype}")
    for part in (keys, values):  # latent attention has values of another width
        if part.dim() != 4 or part.shape[::2] != (batch, slots) or 0 in part.shape[1::2]:
            raise ValueError(f"keys or values of {tuple(part.shape)} for {batch} rows of {slots} slots")
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"keys have {keys.shape[1]} heads, values {values.shape[1]}")
    layer = SentinelLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _check(cache: SentinelCache, tokens_read: int) -> None:
    """ValueError for numbers that no model can have read."""
    padded = torch.arange(cache.slots, device=cache.real.device) >= cache.lengths[:, None]
    in_range = {
        "real": (cache.real != padded) & cache.real.any(0),
        "kinds": (cache.kinds >= 0) & (cache.kinds < cache.rule.num_kinds),
        "positions": (cache.positions >= 0) & (cache.positions < cache.text_read[:, None].clamp(min=1)),
        "visible_from": (cache.visible_from >= 0) & (cache.visible_from <= 2 * NEVER),
        "text_read": (cache.text_read >= 0) & (cache.text_read <= tokens_read),
        "real_read": (cache.real_read >= cache.text_read) & (cache.real_read <= tokens_read),
    }
    wrong = [name for name, fits in in_range.items() if not bool(fits.all())]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be what a model has read")


def _rule_of(note: dict) -> Rule:
    """The rule that a saved cache's note tells of; ValueError if there is no such rule."""
    name, options = note.get("rule"), note.get("options")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError("its rule is unknown")
    plain = asdict(METHODS[name]())
    if not isinstance(options, dict) or options.keys() != plain.keys():
        raise ValueError("its rule has other options")
    for option, value in options.items():
        if type(value) is not type(plain[option]) or (isinstance(value, int) and not -1 <= value < 1 << 32):
            raise ValueError(f"{option} is {value}")
    return METHODS[name](**options)
