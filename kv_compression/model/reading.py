"""Reading texts into a cache: several as a batch, long ones in chunks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kv_compression.model.cache import SentinelCache


def as_batch(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of token ids as a batch `(rows, longest)` padded on the right, and its attention mask if any is padded."""
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)], real[number, : len(row)] = torch.tensor(row), 1
    return input_ids.to(device), None if bool(real.all()) else real.to(device)


@torch.no_grad()
def prefill(
    model: nn.Module, input_ids: Tensor, cache: SentinelCache, attention_mask: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """Read prefixes `(batch, length)`, padded on the right, into the cache in chunks.

    Returns the logits after every row's last token, `(batch, vocabulary)`. Peak memory depends on the chunk and on what
    the cache keeps, not on the length. (This project.)
    """
    batch, length = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    last = (real * torch.arange(length, device=real.device)).argmax(-1)
    found = [None] * batch
    for start in range(0, length, chunk):
        within = range(start, start + chunk)
        ending = {row: position - start for row, position in enumerate(last.tolist()) if position in within}
        wanted = sorted(set(ending.values())) or [0]  # scoring the whole vocabulary costs as much as a layer or more
        logits = model(
            input_ids=input_ids[:, start : start + chunk],
            attention_mask=None if attention_mask is None else real[:, start : start + chunk],
            past_key_values=cache,
            logits_to_keep=torch.tensor(wanted),
        ).logits
        for row, position in ending.items():
            found[row] = logits[row, wanted.index(position)]
    return torch.stack(found)
