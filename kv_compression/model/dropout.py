"""Dropout whose draws depend on the seed, the step and the block, and on nothing that ran before.

So a run that was broken off, or is spread over other processes, drops what it would have dropped anyhow. Knows modules
and random bits, no method and no loop.
"""

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

LEVELS = 1 << 16  # a probability is kept to 1/65536
SHIFTS = (5, 3, 7, 2)  # with these two modules drop the same place about as often as by chance
ROUNDED_UP_TO = 128  # tokens; some devices draw other bits for another length, which padding should not decide


class Draws:
    """The random bits of one forward and backward pass, which all `BlockDropout` of a model share.

    `table` is int16 `(batch, tokens, width)`, None until `draw` is called.
    """

    def __init__(self, width: int):
        self.width = width
        self.table: Tensor | None = None

    def draw(self, seed: int, step: int, blocks: Sequence[int], length: int, device: torch.device) -> None:
        """Draw for a batch of so many tokens a row, row i being block `blocks[i]`."""
        tokens = -(-length // ROUNDED_UP_TO) * ROUNDED_UP_TO
        words = torch.empty(len(blocks), -(-tokens * self.width // 4), dtype=torch.long, device=device)
        generator = torch.Generator(device)
        for row, block in zip(words, blocks):
            generator.manual_seed(random.Random(f"{seed} {step} {block}").getrandbits(63))
            row.random_(-(2**63), None, generator=generator)
        self.table = words.view(torch.int16)[:, : tokens * self.width].view(len(blocks), tokens, self.width)


class BlockDropout(nn.Dropout):
    """Dropout of inputs `(batch, length, width)` by the bits of a `Draws`; without one, or for other shapes, torch's.

    Each module scrambles the same bits by constants of its own, `number`, which is many times cheaper than drawing
    bits for each, and leaves nothing to draw again where activations are recomputed. (This project.)
    """

    def __init__(self, p: float, draws: Draws, number: int):
        super().__init__(p)
        self.draws = draws
        constants = random.Random(number)
        offsets = [constants.randrange(-LEVELS // 2, LEVELS // 2) for _ in range(len(SHIFTS) + 1)]
        # As a buffer: compiled code is then the same for all modules. As long: processes cannot send each other shorts.
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        table = self.draws.table
        if not self.training or not self.p or table is None or not self._fits(x, table):
            return super().forward(x)
        levels = 2 * round(self.p * LEVELS / 2)  # that are dropped, of all
        bits = self._scrambled(table[:, : x.shape[1], : x.shape[2]])
        dropped = bits.bitwise_right_shift_(1).sub_(levels // 2 - LEVELS // 4).bitwise_right_shift_(15)
        return _Masked.apply(x, dropped.bitwise_not_(), LEVELS / (LEVELS - levels))

    def _scrambled(self, table: Tensor) -> Tensor:
        """Other bits, every value as likely as before, as each step can be undone. (In place, and without products of
        short integers: a CPU is slow at both.)"""
        first, *others = self.offsets.to(table.dtype).unbind()
        bits = table + first
        shifted = torch.empty_like(bits)
        for shift, offset in zip(SHIFTS, others):
            torch.bitwise_left_shift(bits, shift, out=shifted)
            bits.bitwise_xor_(shifted).add_(offset)
        return bits

    @staticmethod
    def _fits(x: Tensor, table: Tensor) -> bool:
        return x.dim() == 3 and len(x) == len(table) and x.shape[1] <= table.shape[1] and x.shape[2] <= table.shape[2]


class _Masked(torch.autograd.Function):
    """`x` times `scale` where `kept` (int16) is -1, 0 where it is 0. (Bitwise, which a CPU does faster than torch.where
    or a product with a mask.)"""

    @staticmethod
    def forward(ctx, x, kept, scale):
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _masked(x, kept, scale)

    @staticmethod
    def backward(ctx, gradient):
        return _masked(gradient, *ctx.saved_tensors, ctx.scale), None, None


def _masked(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(integer) & kept.to(integer)).view(x.dtype) * scale


def replace_dropout(modules: Iterable[nn.ModuleDict], width: int) -> Draws:
    """Put a `BlockDropout` in the place of every dropout in these, for inputs at most so wide; returns their draws."""
    draws = Draws(width)
    number = 0
    for holder in modules:
        for name, module in holder.items():
            if isinstance(module, nn.Dropout):
                holder[name] = BlockDropout(module.p, draws, number)
                number += 1
    return draws
