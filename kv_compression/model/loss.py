"""The loss of a causal language model, without ever holding the logits of a batch.

Scoring the whole vocabulary costs a small model as much time and memory as all its layers. Here the scores are made,
used for loss and gradient, and dropped, a few tokens at a time, and only for tokens that have a label. Knows models
and labels, no method.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from kv_compression.methods.sentinels import IGNORED
from kv_compression.model.architectures import causal_lm_of, decoder_of, input_device

SCORES_AT_ONCE = 1 << 26  # tokens times vocabulary
SCORES_AT_ONCE_ON_CPU = 1 << 23  # little enough to stay near the processor


class TokenLosses(nn.Module):
    """A causal language model that returns the negative log-likelihood of every label instead of logits.

    `forward(labels, **inputs)` gives nats, float32 `(batch, length)`, 0 where a label is -100. `labels` are aligned
    with the inputs, not shifted. Where the model's logits are not simply its frozen head on its last hidden states
    (some architectures scale or cap them; it is tried once, on one token), they are made as the model makes them.
    (This project.)
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._chunked = _has_plain_head(model) and not _head_of(model).weight.requires_grad

    def layers(self) -> list[nn.Module]:
        """The model's layers: what is worth compiling, and what processes may each hold a part of."""
        names = set(self._no_split_modules)
        return [module for module in decoder_of(self.model).modules() if type(module).__name__ in names]

    @property
    def _no_split_modules(self) -> list[str]:
        """The class names of `layers`, by the name under which accelerate asks for them."""
        return list(causal_lm_of(self.model)._no_split_modules or [])

    def hidden_states(self, **inputs) -> Tensor:
        """The decoder's last hidden states, `(batch, length, width)`."""
        return decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state

    def forward(self, labels: Tensor, teacher: Tensor | None = None, distill_weight: float = 0.0, **inputs) -> Tensor:
        """Losses, float32 `(batch, length)`.

        With `teacher` (last hidden states of the same model without its adapters) a loss is (1 − distill_weight)
        times the label's and distill_weight times the KL divergence of the teacher's prediction from the model's.
        """
        if not self._chunked:
            if teacher is not None:
                raise ValueError("distillation needs a model whose logits are its head on its last hidden states")
            return token_losses(self.model(**inputs, use_cache=False).logits, labels)
        hidden = self.hidden_states(**inputs).flatten(0, 1)
        flat = labels.flatten().to(hidden.device)  # a model may be spread over devices
        teacher = None if teacher is None else teacher.flatten(0, 1)
        if flat.device.type == "cpu":  # elsewhere, asking which labels count would stall the device
            wanted = (flat != IGNORED).nonzero().flatten()
            some = self._losses(
                hidden[wanted], flat[wanted], None if teacher is None else teacher[wanted], distill_weight
            )
            losses = torch.zeros(flat.shape).index_copy(0, wanted, some)
        else:
            losses = self._losses(hidden, flat, teacher, distill_weight)
        return losses.view(labels.shape)

    def _losses(self, hidden: Tensor, labels: Tensor, teacher: Tensor | None, distill_weight: float) -> Tensor:
        return _ChunkedLoss.apply(hidden, *_head_of(self.model), labels, teacher, distill_weight)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every label in nats from logits, float32 `(batch, length)`, 0 where it is -100."""
    labels = labels.to(logits.device)
    flat = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


class _Head(NamedTuple):
    """An output embedding: `weight` (vocabulary, width), `bias` or None, and the `rows` of it with these `indices`
    that peft trains in their stead, None if there are none."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    indices: Tensor | None


def _head_of(model: nn.Module) -> _Head:
    """The model's output embedding. (Called as a module, peft copies the whole matrix to put its rows in.)"""
    head = causal_lm_of(model).get_output_embeddings()
    adapter = getattr(head, "token_adapter", head)
    deltas = getattr(adapter, "trainable_tokens_delta", None)
    if deltas is None:
        return _Head(head.weight, getattr(head, "bias", None), None, None)
    base = adapter.base_layer
    active = [] if adapter.disable_adapters or adapter.merged else list(adapter.active_adapters)
    if not active:
        return _Head(base.weight, getattr(base, "bias", None), None, None)
    rows = torch.cat([deltas[name] for name in active])
    indices = tuple(index for name in active for index in adapter.token_indices[name])
    return _Head(base.weight, getattr(base, "bias", None), rows, _on_device(indices, rows.device))


@lru_cache(maxsize=16)
def _on_device(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices as a tensor, made once: the device would have to be waited for each time."""
    return torch.tensor(indices, device=device)


@torch.no_grad()
def _has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are its output embedding, where the states are, applied to its last hidden states."""
    head = causal_lm_of(model).get_output_embeddings()
    if head is None:
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    training = model.training
    model.eval()
    try:
        hidden = decoder_of(model)(input_ids=token, use_cache=False).last_hidden_state
        if _head_of(model).weight.device != hidden.device:  # offloaded, or on another device of several
            return False
        return torch.equal(head(hidden), model(input_ids=token, use_cache=False).logits)
    finally:
        model.train(training)


class _ChunkedLoss(torch.autograd.Function):
    """Cross entropy of `linear(hidden, weight, bias)`, the rows `indices` of the frozen `weight` replaced by `rows`.

    The gradient is made with the loss, while the scores exist.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, indices, labels, teacher, distill_weight):
        dtype, device, count = hidden.dtype, hidden.device, len(hidden)
        weight, bias, own = (None if part is None else part.to(dtype) for part in (weight, bias, rows))
        own_bias = None if bias is None or own is None else bias[indices]
        needs_gradient = hidden.requires_grad or (rows is not None and rows.requires_grad)
        losses = torch.empty(count, dtype=torch.float32, device=device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        row_gradient = torch.empty(count, 0 if rows is None else len(rows), dtype=dtype, device=device)
        at_once = max((SCORES_AT_ONCE_ON_CPU if device.type == "cpu" else SCORES_AT_ONCE) // len(weight), 1)
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            scores = linear(hidden[part], weight, bias)
            if own is not None:
                scores[:, indices] = linear(hidden[part], own, own_bias)
            log_p = scores.log_softmax(-1, dtype=torch.float32)
            label = labels[part, None].clamp(min=0)
            share = torch.full(label.shape, 1.0 if teacher is None else 1 - distill_weight, device=device)
            loss = share * -log_p.gather(-1, label)
            if teacher is not None:
                log_q = linear(teacher[part], weight, bias).log_softmax(-1, dtype=torch.float32)
                q = log_q.exp()
                loss += distill_weight * (q * (log_q - log_p)).sum(-1, keepdim=True)
            counts = labels[part, None] != IGNORED
            losses[part] = (loss * counts).squeeze(-1)
            if not needs_gradient:
                continue
            by_score = log_p.exp_().scatter_add_(-1, label, -share)  # softmax minus the target distribution
            if teacher is not None:
                by_score -= distill_weight * q
            by_score = by_score.mul_(counts).to(dtype)
            gradient[part] = by_score @ weight
            if own is not None:
                row_gradient[part] = by_score[:, indices]
                gradient[part] += row_gradient[part] @ (own - weight[indices])
        ctx.save_for_backward(hidden, gradient, row_gradient)
        ctx.has_rows = rows is not None
        return losses

    @staticmethod
    def backward(ctx, upstream):
        hidden, gradient, row_gradient = ctx.saved_tensors
        upstream = upstream[:, None].to(hidden.dtype)
        of_rows = (row_gradient * upstream).T.float() @ hidden.float() if ctx.has_rows else None
        return gradient * upstream, None, None, of_rows, None, None, None, None
