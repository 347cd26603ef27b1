"""A decode step, the cache's bytes and the prefill, against the prefix's length, at ratios 0, 0.5 and 0.9.

Random weights, so that nothing is downloaded. All in one run, as ratios, for one shape of Llama:
- this project's SentinelCache at each ratio, spans of 25 tokens by the exact sampler;
- an uncompressed DynamicCache (the baseline of every ratio), and one as short as what is kept ("plain, same length");
- the masked full recomputation of every token, the way a simulated cache generates;
- kvpress presses at the same kept length, if installed (pip install --no-deps -r requirements-benchmarks.txt).

On a CUDA GPU also, with RedPajama-3B's shape in bf16: the largest batch that fits at 2,048 tokens of context, and the
tokens per second there, at ratios 0 and 0.9. Run: python benchmarks/decoding.py [--lengths 512 …] [--json FILE]
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from transformers import DynamicCache

from benchmarks.flags import new_file
from kv_compression.io.flags import Parser
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from kv_compression.model.reading import prefill
from kv_compression.spans.exact import exact_spans

transformers.logging.set_verbosity_error()
CL, CR = 1, 2
KV = KVCompression(CL, CR)
RATIOS = (0.0, 0.5, 0.9)


def llama(device: str):
    """A Llama of 8 layers, 8 query and 4 key heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=16384,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).eval()


def redpajama_3b():
    """RedPajama-INCITE-3B's shape with random weights, bf16, on the GPU."""
    config = transformers.GPTNeoXConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rotary_pct=1.0,
        vocab_size=50432,
        max_position_embeddings=2304,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        torch.set_default_dtype(torch.float32)
    return model


def seconds(action, repeats: int) -> float:
    """Median seconds of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def text(batch: int, length: int, device) -> torch.Tensor:
    return torch.randint(3, 8000, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)


def marked(tokens: torch.Tensor, ratio: float) -> torch.Tensor:
    """The same spans in every row."""
    spans = exact_spans(tokens.shape[1], ratio, 25, 0)
    return torch.tensor([insert_sentinels(row, spans, CL, CR) for row in tokens.tolist()], device=tokens.device)


def bytes_of(cache: DynamicCache) -> int:
    return sum(
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in cache.layers
    )


def plain(model, tokens, chunk: int | None = None) -> DynamicCache:
    """A DynamicCache filled at once, or in chunks."""
    cache = DynamicCache(config=model.config)
    for part in tokens.split(chunk or tokens.shape[1], dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def compressed(model, ids, chunk: int = 512) -> SentinelCache:
    cache = SentinelCache(CL, CR)
    prefill(model, ids, cache, chunk=chunk)
    return cache


def presses() -> dict:
    """The kvpress methods compared with, empty if it is not installed."""
    try:
        from kvpress import KnormPress, SnapKVPress, StreamingLLMPress
    except ImportError:
        return {}
    return {press.__name__: press for press in (KnormPress, StreamingLLMPress, SnapKVPress)}


def pressed(model, tokens, press) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with press(model):
        position = torch.arange(tokens.shape[1], device=tokens.device)  # kvpress looks for it in the layers' arguments
        model(tokens, past_key_values=cache, cache_position=position, logits_to_keep=1)
    return cache


def decode(model, cache, steps: int) -> float:
    """Median seconds of a decode step."""
    token = torch.full((1, 1), 5, device=model.device)
    return seconds(lambda: model(token, past_key_values=cache), steps)


@torch.no_grad()
def measure(model, length: int, steps: int) -> list[dict]:
    """All ways at one prefix length; the DynamicCache's row comes first."""
    tokens = text(1, length, model.device)
    repeats = 3
    cache = plain(model, tokens)
    rows = [row("DynamicCache", 0.0, length, cache.get_seq_length(), bytes_of(cache))]
    rows[0]["prefill_s"] = seconds(lambda: plain(model, tokens), repeats)
    rows[0]["step_s"] = decode(model, cache, steps)
    for ratio in RATIOS:
        ids = marked(tokens, ratio)
        with Patch(model, KV):
            cache = compressed(model, ids)
            entry = row("SentinelCache", ratio, length, cache.length, cache.bytes)
            entry["prefill_s"] = seconds(lambda ids=ids: compressed(model, ids), repeats)
            entry["step_s"] = decode(model, cache, steps)
            rows.append(entry)
            entry = row("masked recomputation", ratio, length, length, None)
            longer = torch.cat([ids, tokens[:, :1]], dim=1)
            entry["step_s"] = seconds(lambda ids=longer: model(ids, use_cache=False, logits_to_keep=1), 1)
            rows.append(entry)
        kept = rows[-2]["kept"]
        cache = plain(model, tokens[:, :kept])
        entry = row("plain, same length", ratio, length, kept, bytes_of(cache))
        entry["step_s"] = decode(model, cache, steps)
        rows.append(entry)
        for name, press in presses().items() if ratio else ():
            same = press(compression_ratio=1 - kept / length)
            cache = pressed(model, tokens, same)
            entry = row(name, ratio, length, cache.layers[0].keys.shape[2], bytes_of(cache))
            entry["prefill_s"] = seconds(
                lambda press=press, kept=kept: pressed(model, tokens, press(compression_ratio=1 - kept / length)),
                repeats,
            )
            entry["step_s"] = decode(model, cache, steps)
            rows.append(entry)
    for entry in rows:
        for name in ("prefill_s", "step_s", "bytes"):
            if entry.get(name) is not None:
                entry[f"{name}_ratio"] = entry[name] / rows[0][name]
    return rows


def row(way: str, ratio: float, length: int, kept: int, size: int | None) -> dict:
    return {"way": way, "ratio": ratio, "length": length, "kept": kept, "bytes": size}


def largest_batch(model, ratio: float, context: int = 2048) -> dict:
    """The largest batch whose decoding fits on the GPU, and its tokens per second."""

    def attempt(batch: int) -> float | None:
        torch.cuda.empty_cache()
        try:
            with torch.no_grad(), Patch(model, KV):
                ids = marked(text(1, context, "cuda"), ratio)
                cache = compressed(model, ids, chunk=128)
                cache.batch_repeat_interleave(batch)
                token = torch.full((batch, 1), 5, device="cuda")
                return seconds(lambda: model(token, past_key_values=cache), 10)
        except torch.OutOfMemoryError:
            return None

    best, batch = (0, 0.0), 8
    while (step := attempt(batch)) is not None:
        best, batch = (batch, step), batch * 2
    low, high = best[0], batch
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        step = attempt(middle)
        if step is None:
            high = middle
        else:
            low, best = middle, (middle, step)
    return {"ratio": ratio, "batch": best[0], "tokens_per_second": best[0] / best[1]}


def main() -> None:
    """Measure and print Markdown tables."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=20, help="decode steps that the median is taken of")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="a new file for all numbers")
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = f"{torch.get_num_threads()} threads, " if device == "cpu" else ""
    print(
        f"Llama, 8 layers, width 512, fp32, {device}, {threads}torch {torch.__version__}; × is against DynamicCache\n"
    )
    print("| prefix | way | ratio | kept | cache MiB | × | prefill s | × | step ms | × |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    model, found = llama(device), []
    for length in flags.lengths:
        for entry in measure(model, length, flags.steps):
            found.append(entry)
            size = f"{entry['bytes'] / 2**20:.2f} | {entry['bytes_ratio']:.3f}" if entry["bytes"] else "- | -"
            first = f"{entry['prefill_s']:.3f} | {entry['prefill_s_ratio']:.2f}" if "prefill_s" in entry else "- | -"
            print(
                f"| {length} | {entry['way']} | {entry['ratio']} | {entry['kept']} | {size} | {first} "
                f"| {1e3 * entry['step_s']:.2f} | {entry['step_s_ratio']:.2f} |",
                flush=True,
            )
    if device == "cuda":
        model = redpajama_3b()
        found += [largest_batch(model, ratio) for ratio in (0.0, 0.9)]
        print("\n| ratio | largest batch at 2,048 tokens | tokens/s |\n|---|---|---|")
        for entry in found[-2:]:
            print(f"| {entry['ratio']} | {entry['batch']} | {entry['tokens_per_second']:.0f} |")
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
