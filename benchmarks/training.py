"""A training step against the published way of training, against plain causal attention, and against the machine.

Random weights, so that nothing is downloaded: the shape of Pythia-160M on a CPU, of RedPajama-3B on a CUDA GPU. All in
one run, every way in a process of its own (for its peak memory), on the same blocks of 256 tokens with sentinels:
- published: fp32, eager attention, an L x L mask stored with every block, LoRA and the whole input embedding trained,
  the logits of a batch at once;
- plain causal: this project's step on the unpatched model, with torch's causal kernel and with this project's;
- ours: the step of run_clm.py, and what its flags change; "matched" has the sentinels on top of 256 text tokens.

Tokens are text tokens, sentinels do not count. Model FLOPs are what LoRA has to compute, sentinels included: 4 for each
weight that is multiplied with and token, and 6 for each layer, channel, token and key in the causal half; the peak is
that of one large matrix product of the way's own precision here.

With --growth: how mask, forward pass and training step grow from blocks of 256 to 8,192 tokens at as many tokens a
step, dense mask against block mask (FlexAttention; on a CPU it has no backward pass), as the keys stand and sorted, at
ratio 0.9. "Tiles" is the share of the 128 x 128 tiles that a block mask does not leave out.

Run: python benchmarks/training.py [--steps N] [--batch N] [--growth] [--json FILE]
"""

import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from kv_compression.io.errors import quiet_libraries

quiet_libraries()

import accelerate
import peft
import torch
import transformers
from torch._inductor.exc import InductorError
from torch.nn.functional import cross_entropy

from benchmarks.flags import new_file
from kv_compression.data.blocks import Blocks
from kv_compression.io.flags import Parser
from kv_compression.io.machine import has_bf16
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.rule import Rule, block_mask, dense_mask, in_order
from kv_compression.methods.sentinels import insert_sentinels
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model import lora
from kv_compression.model.attention import Patch
from kv_compression.settings import Settings
from kv_compression.spans.exact import exact_spans
from kv_compression.spans.plan import SpanPlan
from kv_compression.training import loop as training_loop
from kv_compression.training.schedule import Schedule, StepData

CL, CR = 50277, 50278
RATIO, SPAN = 0.5, 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # width, layers, heads, batch
    "cpu": (768, 12, 12, 4),
    "cuda": (2560, 32, 32, 12),
}
WAYS = {  # flags of Settings on top of the defaults; None for what is not ours
    "published": None,
    "plain causal, torch's kernel": {"method": "full_attention", "attn_implementation": "sdpa"},
    "plain causal, ours": {"method": "full_attention"},
    "ours": {},
    "ours, matched": {"protocol": "matched"},
    "ours, fp32": {"mixed_precision": "no"},
    "ours, --gradient_checkpointing": {"gradient_checkpointing": True},
    "ours, --compile": {"compile": True},
    "ours, FlexAttention": {"attn_implementation": "sorted_flex_attention"},
}
NOT_ON_CPU = ("ours, FlexAttention",)


def gpt_neox(implementation: str, dtype, width: int, layers: int, heads: int, positions: int = 8192):
    """A GPT-NeoX with random weights."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=50432,
        max_position_embeddings=positions,
    )
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)


def marked_blocks(count: int, length: int, ratio: float, text_tokens: int | None = None) -> torch.Tensor:
    """Random text with spans of up to 25 tokens, cut to `length` tokens, sentinels among them."""
    rows = []
    for seed in range(count):
        text = torch.randint(3, 50000, (text_tokens or length,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows.append(insert_sentinels(text, exact_spans(len(text), ratio, SPAN, seed), CL, CR)[:length])
    return torch.tensor(rows)


def measure(action, steps: int) -> dict:
    """Seconds of the fastest of some calls after two to warm up, and the peak memory in GiB."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        action()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if DEVICE == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(times[2:]), "memory": memory / 2**30}


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product: the best of some."""
    size = 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def published_step(blocks: Blocks, size: int, shape: tuple[int, int, int]):
    """A step as the published code does it, as far as its description tells."""
    model = gpt_neox("eager", torch.float32, *shape)
    targets = list(lora.ATTENTION_PROJECTIONS["gpt_neox"])
    how = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none", "target_modules": targets}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **how)).train()
    model.get_input_embeddings().weight.requires_grad_(True)
    rule = KVCompression(CL, CR)
    batch = blocks.batch(range(size))
    ids, labels = batch["input_ids"], batch["labels"]
    masks = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    masks.masked_fill_(~rule.mask(ids)[:, None], torch.finfo(torch.float32).min)
    inputs = {"input_ids": ids, "attention_mask": masks, "position_ids": rule.position_ids(ids)}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def step():
        on_device = {name: value.to(DEVICE) for name, value in inputs.items()}
        logits = model(**on_device, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), labels.to(DEVICE).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(blocks: Blocks, size: int, shape: tuple[int, int, int], flags: dict):
    """A step of run_clm.py with these settings, its reading of blocks and mask making included."""
    common = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "num_train_epochs": 10_000}
    common |= {"bound_ratio": RATIO if flags.get("method") is None else 0.0}
    common |= {"attn_implementation": "sdpa" if DEVICE == "cuda" else "grouped"}
    settings = Settings(**common | {"mixed_precision": "bf16" if has_bf16() else "no"} | flags)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    model = gpt_neox(settings.attn_implementation, dtype, *shape)
    sentinels = (CL, CR) if settings.method == "kv_compression" else ()
    model = lora.add_lora(model, lora.lora_targets(model, None), settings.r, sentinels)
    accelerator = accelerate.Accelerator(mixed_precision=settings.mixed_precision)
    prepared = training_loop.prepare(model, accelerator, settings)
    schedule = Schedule(settings, len(blocks), 1)
    scheduler = transformers.get_scheduler("constant", prepared.optimizer)
    data = StepData(blocks, schedule, 0, fixed_spans=False)
    prepared.token_losses.train()
    rule = KVCompression(CL, CR) if sentinels else FullAttention()
    causal_kernel = settings.method == "full_attention" and settings.attn_implementation == "sdpa"
    patch = None if causal_kernel else Patch(model, rule).__enter__()
    number = 0

    def step():
        nonlocal number
        micro_batches = data[number]
        if causal_kernel:  # torch's causal kernel takes no mask
            for micro_batch in micro_batches:
                micro_batch.inputs.pop("attention_mask")
        loss = training_loop.optimizer_step(prepared, micro_batches, accelerator, scheduler, patch, settings, number)
        number += 1
        return loss

    return step


def run_way(name: str, size: int, steps: int) -> dict:
    """One row of the table."""
    width, layers, heads, _ = SHAPES[DEVICE]
    shape = (width, layers, heads)
    flags = WAYS[name]
    if flags and flags.get("protocol") == "matched":
        text = torch.randint(3, 50000, (size, 256), generator=torch.Generator().manual_seed(0))
        blocks = Blocks(text, "train", SpanPlan(True, RATIO, SPAN, 0), CL, CR)
    else:
        blocks = Blocks(marked_blocks(size, 256, RATIO), "train", None, CL, CR)
    step = published_step(blocks, size, shape) if flags is None else our_step(blocks, size, shape, flags)
    found = measure(step, steps)
    text_tokens = sum(blocks.num_targets(index) + 1 for index in range(size))
    read = sum(len(blocks[index]) for index in range(size))
    weights = 12 * layers * width**2 + 50432 * width
    flops = read * (4 * weights + 6 * layers * width * 256)
    dtype = torch.float32 if flags is None or flags.get("mixed_precision") == "no" or not has_bf16() else torch.bfloat16
    found |= {"name": name, "tokens_per_second": text_tokens / found["seconds"]}
    found |= {"flops": flops / found["seconds"], "peak": matmul_peak(dtype)}
    return found


def compare(size: int, steps: int, only: list[str] | None) -> list[dict]:
    """Measure every way in a process of its own."""
    rows = []
    for name in only or [name for name in WAYS if DEVICE == "cuda" or name not in NOT_ON_CPU]:
        command = [sys.executable, __file__, "--way", name, "--batch", str(size), "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """The comparison as Markdown."""
    by_name = {row["name"]: row["tokens_per_second"] for row in rows}
    plain = max((speed for name, speed in by_name.items() if name.startswith("plain")), default=None)

    def ratio(row, base):
        return f"{row['tokens_per_second'] / base:.2f}" if base else "-"

    lines = ["| way | ms a step | tokens/s | × published | × fastest plain causal | peak GiB | TFLOP/s | of peak |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['name']} | {1e3 * row['seconds']:.0f} | {row['tokens_per_second']:.0f} "
            f"| {ratio(row, by_name.get('published'))} | {ratio(row, plain)} | {row['memory']:.2f} "
            f"| {row['flops'] / 1e12:.3f} | {row['flops'] / row['peak']:.0%} |"
        )
    return "\n".join(lines)


def growth(steps: int, lengths: list[int]) -> list[dict]:
    """How cost grows with the block, at as many tokens a step."""
    rows = []
    for rule in (KVCompression(CL, CR), SinkAttention(ratio=0.9)):
        for length in lengths:
            rows.append(grown(rule, length, max(lengths) // length, steps))
            print(rows[-1], file=sys.stderr)
    return rows


def grown(rule: Rule, length: int, batch: int, steps: int) -> dict:
    """Milliseconds of making a mask, of a forward pass and of a step forth and back, for blocks of one length."""
    ids = marked_blocks(batch, length, 0.9 if rule.uses_sentinels else 0.0).to(DEVICE)
    mask_mod = rule.visible(ids)

    def milliseconds(action):
        return 1e3 * measure(action, steps)["seconds"]

    def passes(implementation: str, rule: Rule | None, back: bool):
        torch._dynamo.reset()  # another shape is another program: a CPU's compiler does not take shapes that vary
        model = gpt_neox(implementation, torch.float32, 256, 2, 4).get_decoder()

        def action():
            with (
                torch.set_grad_enabled(back),
                nullcontext() if rule is None else Patch(model, rule),
            ):
                states = model(ids, use_cache=False).last_hidden_state
                if back:
                    states.sum().backward()

        try:
            return milliseconds(action)
        except InductorError as error:  # a CPU's compiler does not take every mask
            print(f"{implementation}: {str(error).splitlines()[0]}", file=sys.stderr)
            return None

    row = {"method": rule.name, "block": length, "batch": batch}
    row["mask, dense"] = milliseconds(lambda: dense_mask(mask_mod, *ids.shape, ids.device))
    row["mask, block"] = milliseconds(lambda: block_mask(mask_mod, *ids.shape, ids.device))
    row["forward, causal"] = passes("sdpa", None, False)
    row["forward, dense"] = passes("sdpa", rule, False)
    row["forward, block"] = passes("flex_attention", rule, False)
    row["forward, sorted"] = passes("sorted_flex_attention", rule, False)
    row["step, causal"] = passes("sdpa", None, True)
    row["step, dense"] = passes("sdpa", rule, True)
    row["step, block"] = passes("flex_attention", rule, True) if DEVICE == "cuda" else None
    row["step, sorted"] = passes("sorted_flex_attention", rule, True) if DEVICE == "cuda" else None
    row["tiles"] = 1 - block_mask(mask_mod, *ids.shape, ids.device).sparsity() / 100
    in_their_order = in_order(mask_mod, rule.key_order(ids))
    row["tiles, sorted"] = 1 - block_mask(in_their_order, *ids.shape, ids.device).sparsity() / 100
    return row


def growth_table(rows: list[dict]) -> str:
    """The growth as Markdown."""

    def cell(name, value):
        if isinstance(value, float):
            return f"{value:.0%}" if name.startswith("tiles") else f"{value:.1f}"
        return "-" if value is None else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(name, value) for name, value in row.items()) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure and print Markdown tables."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=SHAPES[DEVICE][-1])
    parser.add_argument("--growth", action="store_true", help="the growth with the block, in place of the comparison")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), help="these ways alone")
    parser.add_argument("--way", choices=list(WAYS), help="one way, in this process, as JSON")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="a new file for the numbers")
    flags = parser.parse_args()
    if flags.way:
        print(json.dumps(run_way(flags.way, flags.batch, flags.steps)))
        return
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    rows = growth(flags.steps, flags.lengths) if flags.growth else compare(flags.batch, flags.steps, flags.only)
    if rows:
        print(growth_table(rows) if flags.growth else table(rows))
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
