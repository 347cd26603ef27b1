"""The cache that really drops compressed entries.

A `SentinelCache` goes where transformers takes a cache. A patched model asks it, before every forward pass, which of
the keys it holds the new tokens see and which position ids they get; after the pass it drops every key that no
later token can see, in all layers. The `Rule` says which keys these are. Only folding, in which a span is compressed
after it was read, knows a method: KV compression.
"""

import copy
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kv_compression.io.errors import UsageError
from kv_compression.methods.kv_compression import CL, CR, DROPPED, TEXT, KVCompression
from kv_compression.methods.rule import History, Rule, Tokens, own_key, rows_of
from kv_compression.model.architectures import decoder_of

PER_SLOT = ("kinds", "positions", "visible_from", "real")  # tensors (batch, slots)
PER_ROW = ("text_read", "real_read", "digest", "began", "fingerprint")  # tensors (batch,)


class SentinelLayer(DynamicLayer):
    """The keys and values of one layer, `(batch, heads, slots, head_dim)`; slots can leave."""

    def keep(self, rows: list[Tensor], slots: int) -> None:
        """Keep the slots `rows[b]` of every row b, in order, padded to `slots`; the storage of the rest is freed."""
        self.keys = _kept(self.keys, rows, slots)
        self.values = _kept(self.values, rows, slots)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; layers may lie on different devices."""
        if self.is_initialized:
            super().batch_select_indices(indices.to(self.keys.device))


def _kind(states: Tensor) -> tuple:
    """What keys or values have in common with others of their layer: dtype, heads, width."""
    return states.dtype, states.shape[1], states.shape[3]


def _kept(states: Tensor, rows: list[Tensor], slots: int) -> Tensor:
    if len(rows) == 1:
        return states.index_select(2, rows[0].to(states.device))
    batch, heads, _, width = states.shape
    kept = states.new_zeros(batch, heads, slots, width)
    for row, index in enumerate(rows):
        kept[row, :, : len(index)] = states[row].index_select(1, index.to(states.device))
    return kept


class SentinelCache(Cache):
    """Keys and values of what later tokens can still see, for a model with an `attention.Patch`.

    Rows of a batch may compress differently: they are padded on the right to the longest and masked. Lengths are
    counted in keys per layer. `get_seq_length` counts the tokens read, as transformers' generation expects, `length`
    the keys held.

    With `cl_id` and `cr_id` the rule is KV compression; `rule` names any other. The patch must be of the same rule.

    Example, with sentinels in `input_ids` `(batch, length)`::

        with attach(model, tokenizer) as patch:
            cache = SentinelCache(rule=patch.rule)
            model.generate(input_ids, past_key_values=cache)
        cache.length, cache.logical_length, cache.bytes, cache.removed_fraction
        cache.save("prefix.safetensors")
        cache = SentinelCache.load("prefix.safetensors")
    """

    def __init__(self, cl_id: int | None = None, cr_id: int | None = None, *, rule: Rule | None = None):
        if (cl_id is None or cr_id is None) == (rule is None):
            raise ValueError("SentinelCache needs either cl_id and cr_id, or rule=…")
        super().__init__(layer_class_to_replicate=SentinelLayer)
        self.rule = rule or KVCompression(cl_id, cr_id)
        if self.rule.isolate_documents or self.rule.position_ids_by_document:
            raise ValueError("a cache reads one document a row: there is nothing to isolate")
        self._decoder = None
        self._forget()

    def _forget(self) -> None:
        for name in PER_SLOT + PER_ROW:
            setattr(self, name, None)
        self._tokens_read = 0
        self._undoable = 0  # tokens read since a key last left
        self._is_quiet = True  # all text to come sees every slot
        self._skips_settling = False
        self._fold = None  # the order of the slots in which a fold reads
        self._admitted = False
        self.repeats_rows = False

    def __repr__(self) -> str:
        return f"SentinelCache({self.rule.name}, length={self.length}, logical_length={self.logical_length})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, sentinels included, whether or not their keys are still held."""
        return self._tokens_read

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Slots known of: before a forward pass the one that the next key will have."""
        return self.slots

    def text_after(self, input_ids: Tensor, padding: Tensor | None = None) -> int:
        """Text tokens of the longest row once tokens `(batch, new)` have been read (`padding` as in `admit`)."""
        real = None if padding is None else padding[:, -input_ids.shape[1] :]
        read = self.rule.text(input_ids, real).sum(-1)
        return int((read if self.text_read is None else self.text_read + read).max())

    def resume(self, tokens_read: int) -> None:
        """Continue where a saved cache was, once its tensors are here."""
        self._tokens_read = tokens_read
        self._is_quiet = self._sees_all()

    @property
    def slots(self) -> int:
        """Keys that a layer has room for, padding of shorter rows included."""
        return 0 if self.kinds is None else self.kinds.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Keys held by every row, long `(batch,)`."""
        return torch.zeros(0, dtype=torch.long) if self.real is None else self.real.sum(-1)

    @property
    def length(self) -> int:
        """Keys held by the longest row."""
        return int(self.lengths.max()) if self.slots else 0

    @property
    def logical_length(self) -> int:
        """Text tokens read by the longest row: what an uncompressed cache would hold."""
        return 0 if self.text_read is None else int(self.text_read.max())

    @property
    def removed_fraction(self) -> float:
        """1 − keys held ÷ text tokens read, over all rows: what compression saves of a plain cache."""
        read = 0 if self.text_read is None else int(self.text_read.sum())
        return 1 - int(self.lengths.sum()) / read if read else 0.0

    @property
    def bytes(self) -> int:
        """Memory that keys and values take in all layers."""
        states = [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in states)

    def admit(self, decoder: nn.Module, input_ids: Tensor, padding: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Take note of tokens `(batch, new)` that are about to be read.

        Returns which keys they see, bool `(batch, new, slots + new)` or None if they see all, and their position ids.
        `padding` is 0 where a token is padding, `(batch, ≥ new)`; its last columns count.
        """
        if self.slots and len(self.layers) > decoder.config.num_hidden_layers:
            raise UsageError(f"the cache holds {len(self.layers)} layers, more than the model has: it is another's")
        self._decoder = weakref.ref(decoder)
        batch, new = input_ids.shape
        if self.kinds is None:
            nothing = input_ids.new_zeros(batch, 0)
            self.kinds, self.positions, self.visible_from, self.real = nothing, nothing, nothing, nothing.bool()
            self.text_read, self.real_read, self.digest, self.began, _ = History.none(batch, input_ids.device)
            self.fingerprint = self.text_read
        self._fit_rows(batch)
        self._admitted = True
        if self._fold is not None:
            return self._seen(new), self.positions[:, -new:]

        real = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding[:, -new:].bool()
        text = self.rule.text(input_ids, real)
        positions = (self.text_read[:, None] + text.cumsum(-1) - 1).clamp(min=0)
        kinds, history = self.rule.remember(input_ids, real, self._history)
        self.digest, self.began = history.digest, history.began
        self._note(kinds, positions, real)
        self.fingerprint = self.fingerprint + fingerprint_of(input_ids, positions, text)
        self.text_read = self.text_read + text.sum(-1)
        self.real_read = self.real_read + real.sum(-1)
        self._tokens_read += new
        self._undoable += new
        plain = padding is None or bool(real.all())
        self._skips_settling = self._is_quiet and plain and self.rule.is_quiet(self._last(new), self._history)
        if new == 1 and self._skips_settling:
            return None, positions
        return self._seen(new), positions

    @property
    def _history(self) -> History:
        """What was read, as a rule knows it."""
        is_open = self.rule.is_open(self._tokens) if self.slots else torch.zeros_like(self.began)
        return History(self.text_read, self.real_read, self.digest, self.began, is_open)

    def _note(self, kinds: Tensor, positions: Tensor, real: Tensor) -> None:
        """Add slots for new tokens."""
        self.kinds = torch.cat([self.kinds, kinds], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.visible_from = torch.cat([self.visible_from, torch.zeros_like(positions)], dim=1)
        self.real = torch.cat([self.real, real], dim=1)

    @property
    def _tokens(self) -> Tokens:
        """The slots as a rule reads them."""
        return Tokens(self.kinds, self.positions, self.visible_from, ~self.real, self._tokens_read + 1)

    def _last(self, new: int) -> Tokens:
        """The last slots as a rule reads them."""
        return Tokens(*(part[:, -new:] for part in self._tokens[:4]), self._tokens_read + 1)

    def _seen(self, new: int) -> Tensor:
        """What the last `new` slots see, bool `(batch, new, slots)`; padding sees itself."""
        tokens, (batch, slots) = self._tokens, self.kinds.shape
        if self._fold is None:
            seen = rows_of(self.rule.sees(tokens), batch, slots, slots - new, self.kinds.device)
        else:  # as if the slots stood in the fold's order
            place = self._fold.argsort(dim=-1)
            rule = self.rule.sees(_reordered(tokens, self._fold))
            rows = torch.arange(batch, device=place.device).view(-1, 1, 1)
            seen = rule(rows, 0, place[:, slots - new :, None], place[:, None, :])
        seen = seen & self.real[:, None, :]
        return seen | (own_key(new, slots, seen.device) & ~self.real[:, slots - new :, None])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Add new keys and values to a layer; returns all it holds (called by the model's attention)."""
        if not self._admitted:
            raise ValueError("a SentinelCache works in a patched model only: attach(model, rule=…) patches it")
        if self.slots > key_states.shape[2]:
            layer = self.layers[layer_idx] if layer_idx < len(self.layers) else SentinelLayer()
            held = [part if part is None else _kind(part) for part in (layer.keys, layer.values)]
            if held != [_kind(key_states), _kind(value_states)]:
                raise UsageError(f"the cache does not hold keys of layer {layer_idx} as the model makes them")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def settle(self) -> None:
        """Drop every key that no later token can see; called when all layers have read the admitted tokens."""
        self._admitted = False
        fold, self._fold = self._fold, None
        if fold is not None:
            settled = _reordered(self.rule.settled(_reordered(self._tokens, fold)), fold.argsort(dim=-1))
        elif self._skips_settling:
            return
        else:
            settled = self.rule.settled(self._tokens)
        if not torch.equal(settled.kinds, self.kinds):
            self._undoable = 0
        self.kinds, self.visible_from = settled.kinds, settled.visible_from
        self._drop(self.rule.keeps(settled, self._history))
        self._is_quiet = self._sees_all()

    def _drop(self, keep: Tensor) -> None:
        """Keep the slots where `keep` `(batch, slots)` is True, but no padding."""
        keep = keep & self.real
        if bool(keep.all()):
            return
        rows = [row.nonzero().flatten() for row in keep]
        slots = max(map(len, rows))
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep(rows, slots)
        pad = torch.nn.utils.rnn.pad_sequence
        for name in ("kinds", "positions", "visible_from"):
            held = [values[row] for values, row in zip(getattr(self, name), rows)]
            empty = DROPPED if name == "kinds" and isinstance(self.rule, KVCompression) else 0
            setattr(self, name, pad(held, batch_first=True, padding_value=empty))
        lengths = torch.tensor([len(row) for row in rows], device=keep.device)
        self.real = torch.arange(slots, device=keep.device) < lengths[:, None]
        self._undoable = 0
        self._is_quiet = self._sees_all()

    def _sees_all(self) -> bool:
        """Whether all text to come sees every slot, and none is padding."""
        return bool(self.real.all()) and self.rule.is_quiet(self._tokens, self._history)

    def compress(self, first, last, model: nn.Module | None = None) -> None:
        """Fold a span of text that is already in the cache into its <CR>, by reading <CL> and <CR> alone.

        `first` and `last` are inclusive text positions (ints, or one per row; a row whose last is below its first is
        left alone). The cache is then exactly what reading the span between sentinels would have left, if nothing was
        read since; tokens read since have seen the span itself. `model` defaults to the one that filled the cache,
        which must still be patched. Raises ValueError if the cache does not hold the whole span as plain text. (This
        project.)
        """
        decoder = decoder_of(model) if model is not None else self._decoder and self._decoder()
        if not isinstance(self.rule, KVCompression) or decoder is None or not self.slots:
            raise ValueError("only a cache for KV compression that a model has filled can compress a span")
        batch, device = len(self.kinds), self.kinds.device
        first = torch.as_tensor(first, device=device).expand(batch)
        last = torch.as_tensor(last, device=device).expand(batch)
        if bool(self.rule.is_open(self._tokens).any()):
            raise ValueError("a span is still open: its <CR> has to be read first")
        span = self.real & (self.kinds == TEXT)
        span &= (first[:, None] <= self.positions) & (self.positions <= last[:, None])
        wanted = (last - first + 1).clamp(min=0)
        if bool((span.sum(-1) != wanted).any()):
            raise ValueError(f"the cache does not hold text {first.tolist()} … {last.tolist()} uncompressed")
        patched = getattr(decoder, "_sentinel_patch", None)
        if patched is None or not patched.rule.same_as(self.rule):
            raise ValueError("the model is not patched with the cache's rule")
        slots, crs = self.slots, self.rule.cr_tokens
        self._note_fold(span, first, last)
        sentinels = torch.tensor([[self.rule.cl_id] + [self.rule.cr_id] * crs], device=device).expand(batch, -1)
        try:
            with torch.no_grad():
                decoder(input_ids=sentinels, past_key_values=self, use_cache=True)
        except BaseException:
            self._truncate(slots)
            raise
        self.began = self.began | (last >= first)

    def _note_fold(self, span: Tensor, first: Tensor, last: Tensor) -> None:
        """Add slots for a <CL> and its <CR>, and order all slots as if they stood around their span."""
        folds, crs = (last >= first)[:, None], self.rule.cr_tokens
        behind = self.positions > last[:, None]
        kinds = torch.tensor([CL] + [CR] * crs, device=span.device).expand(len(span), -1)
        positions = torch.cat([(first - 1).clamp(min=0)[:, None], last[:, None].expand(-1, crs)], dim=1)
        self._note(torch.where(folds, kinds, DROPPED), positions.clamp(min=0), folds.expand(-1, 1 + crs))
        places = torch.where(span, 2, torch.where(behind, 4, 0))
        own = torch.tensor([1] + [3] * crs, device=span.device).expand(len(span), -1)
        self._fold = torch.cat([places, own], dim=1).argsort(dim=-1, stable=True)

    def drop_oldest(self, count: Tensor) -> None:
        """Drop the first `count[b]` keys of every row, compressed or not: no rule asks for this, a `Budget` does."""
        age = self.positions.masked_fill(~self.real, torch.iinfo(torch.long).max)
        rank = age.argsort(dim=-1, stable=True).argsort(dim=-1)
        self._drop(rank >= count[:, None])

    def _truncate(self, slots: int) -> None:
        """Remove all but the first `slots`: what was added by a forward pass that failed or is being undone."""
        self._fold, self._admitted = None, False
        for name in PER_SLOT:
            setattr(self, name, getattr(self, name)[:, :slots].contiguous())
        for layer in self.layers:
            if layer.is_initialized and layer.keys.shape[2] > slots:
                layer.keys = layer.keys[:, :, :slots].contiguous()
                layer.values = layer.values[:, :, :slots].contiguous()

    def crop(self, tokens_to_remove: int) -> None:
        """Unread the last `-tokens_to_remove` tokens. ValueError if a key has left the cache since they were read."""
        count = -tokens_to_remove
        if count < 0:
            raise ValueError("crop takes the number of tokens to unread as a negative number")
        if count > self._undoable:
            raise ValueError(
                f"only the last {self._undoable} tokens can be unread, keys have left the cache before: assisted "
                "generation needs a rule under which generated text stays"
            )
        if count:
            if bool(self.digest.any()):
                raise ValueError("a draw that depends on all that was read cannot be unread")
            folds = isinstance(self.rule, KVCompression)
            text = self.real & (self.kinds == TEXT) if folds else self.real
            self.text_read = self.text_read - text[:, -count:].sum(-1)
            self.real_read = self.real_read - self.real[:, -count:].sum(-1)
            self._truncate(self.slots - count)
            self._tokens_read -= count
            self._undoable -= count
            self.fingerprint = torch.full_like(self.fingerprint, -1)  # of tokens that nobody names here
            self._is_quiet = self._sees_all()

    def reset(self) -> None:
        """Forget everything; the memory is freed."""
        self.layers.clear()  # a layer's own reset may keep its memory
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        super().batch_select_indices(indices)
        if self.kinds is not None:
            indices = indices.to(self.kinds.device)
            for name in PER_SLOT + PER_ROW:
                setattr(self, name, getattr(self, name)[indices])
            self._compact()

    def _compact(self) -> None:
        """Let the padding go that only rows which have left needed."""
        if not bool(self.real.any(0).all()):
            self._drop(self.real)
        self._is_quiet = self._sees_all()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, so that one prefill serves several continuations."""
        super().batch_repeat_interleave(repeats)
        if self.kinds is not None:
            for name in PER_SLOT + PER_ROW:
                setattr(self, name, getattr(self, name).repeat_interleave(repeats, dim=0))

    def followed_by(self, input_ids: Tensor | Mapping, attention_mask: Tensor | None = None) -> dict:
        """What `model.generate` takes to continue this cache with new tokens `(batch, new)`, at least one per row.

        `input_ids` may also be what a tokenizer returns. `attention_mask` `(batch, new)` is 0 where a token is padding,
        on either side; padding is moved to the left, where generation needs it. A cache of one row takes any number of
        rows of tokens.

        Generation works on a copy, so that the cache can be followed by something else afterwards; the keys are
        shared, as no key ever changes. Beams and several sequences a row (`num_beams`, `num_return_sequences`) repeat
        the copy's rows. Sentinels are not generated. `generate` then returns the new tokens and its own, not those
        that the cache has read::

            output = model.generate(**cache.followed_by(question), max_new_tokens=64)

        Raises ValueError if rows or shapes do not fit.
        """
        from kv_compression.model import following

        return following.inputs_after(self, input_ids, attention_mask)

    def copy(self) -> "SentinelCache":
        """A cache that continues independently; the keys are shared, as no key ever changes."""
        own = copy.copy(self)
        own.layers = [copy.copy(layer) for layer in self.layers]
        return own

    def _fit_rows(self, batch: int) -> None:
        """Repeat a followed copy's rows as `generate` has repeated its inputs; ValueError if other rows are given."""
        rows, repeatable, self.repeats_rows = len(self.kinds), self.repeats_rows, False
        if rows == batch:
            return
        if not repeatable or batch % rows:
            raise ValueError(
                f"the cache holds {rows} rows, but {batch} were given: generate takes several beams or sequences a row "
                "with **cache.followed_by(new_tokens); cache.batch_repeat_interleave repeats rows"
            )
        self.batch_repeat_interleave(batch // rows)

    def save(self, path) -> None:
        """Write the cache to a safetensors file, to read it back with `load` under the same model."""
        from kv_compression.model import saving

        saving.save(self, Path(path))

    @classmethod
    def load(cls, path, device="cpu") -> "SentinelCache":
        """Read a cache that `save` wrote. RunError if the file is missing, damaged or something else."""
        from kv_compression.model import saving

        return saving.load(Path(path), device)


def _reordered(tokens: Tokens, order: Tensor) -> Tokens:
    """Tokens in another order, long `(batch, length)`."""
    return Tokens(*(part.gather(-1, order) for part in tokens[:4]), tokens.bound)


def fingerprint_of(input_ids: Tensor, positions: Tensor, text: Tensor) -> Tensor:
    """A number for the text tokens at these positions, long `(batch,)`: those of pieces add up to the whole text's."""
    mixed = (input_ids + 1) * 0x1E3779B97F4A7C15 ^ (positions + 1) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 29)) * 0x14D049BB133111EB * text).sum(-1)
