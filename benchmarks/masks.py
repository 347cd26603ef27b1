"""Building masks and position ids: the vectorised rules against plain Python, time and bytes.

For 64 blocks of each length, half of their tokens in spans: the time to make all masks and position ids with
`kv_compression`, the time that the same rules take token by token in plain Python (measured on as many blocks as fit
in a minute, scaled to 64), and the bytes of stored L × L masks against the bytes of the token ids that masks are made
from. Run: python benchmarks/masks.py [--lengths 256 2048] [--blocks 64]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.sentinels import insert_sentinels, position_ids
from kv_compression.spans.exact import exact_spans

CL, CR = 1, 2


def plain_python(ids: list[int]) -> tuple[list[list[bool]], list[int]]:
    """Mask and positions of one block, token by token: spans are looked up first, then every pair is decided."""
    length = len(ids)
    opened = {}  # the index of every <CR>: where its span begins
    span_of = [None] * length
    start = 0
    for index, token in enumerate(ids):
        if token == CL:
            start = index
        elif token == CR:
            opened[index] = start
            for inside in range(start, index):
                span_of[inside] = index
    mask, positions, count = [], [], 0
    for q in range(length):
        row = [False] * length
        row[q] = True
        if ids[q] == CR:
            for k in range(opened[q], q):
                row[k] = True
        elif ids[q] != CL:
            for k in range(q):
                if ids[k] == CR or (ids[k] != CL and span_of[k] in (None, span_of[q])):
                    row[k] = True
        mask.append(row)
        if ids[q] in (CL, CR):
            positions.append(positions[-1] if positions else 0)
        else:
            positions.append(count)
            count += 1
    return mask, positions


def random_blocks(count: int, length: int) -> torch.Tensor:
    """Blocks of token ids `(count, length)` with half of the text compressed, sentinels included."""
    rows = []
    for seed in range(count):
        text = torch.randint(3, 50000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows.append(insert_sentinels(text, exact_spans(length, 0.5, 25, seed), CL, CR)[:length])
    return torch.tensor(rows)


def fastest(build, repeats: int) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    build()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        build()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--blocks", type=int, default=64)
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{flags.blocks} blocks, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| length | vectorised | plain Python | times faster | stored masks | token ids | times smaller |")
    print("|---|---|---|---|---|---|---|")
    for length in flags.lengths:
        ids = random_blocks(flags.blocks, length)
        on_device = ids.to(device)

        def vectorised(on_device=on_device):
            mask = KVCompression(CL, CR).mask(on_device)
            positions = position_ids(on_device, CL, CR)
            if device == "cuda":
                torch.cuda.synchronize()
            return mask, positions

        fast = fastest(vectorised, 10)
        mask, positions = vectorised()
        slow, done, start = 0.0, 0, time.perf_counter()
        while done < flags.blocks and slow < 60:
            slow_mask, slow_positions = plain_python(ids[done].tolist())
            done += 1
            slow = time.perf_counter() - start
            assert done > 1 or (mask[0].tolist(), positions[0].tolist()) == (slow_mask, slow_positions)
        slow *= flags.blocks / done
        stored, tokens = mask.numel() * mask.element_size(), ids.numel() * ids.element_size()
        print(
            f"| {length} | {1e3 * fast:.1f} ms | {slow:.1f} s | {slow / fast:.0f} "
            f"| {stored / 2**20:.1f} MiB | {tokens / 2**10:.0f} KiB | {stored / tokens:.0f} |"
        )


if __name__ == "__main__":
    main()
