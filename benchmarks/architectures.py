"""Which architectures are right: every causal language model of transformers, tiny and random, against itself.

Of each: the logits of the untouched model against the patched one's under full attention; one pass against reading
through a `SentinelCache` piece by piece; padding on either side against none; one masked pass against a cache that
drops keys, under KV compression, local and sink attention; the attention implementations against each other; and
whether each layer reads exactly the keys that the rule and the model's own pattern (windows, chunks) let it see, by
gradients. All numbers but the last are largest differences of logits ÷ the largest logit.

Run: python benchmarks/architectures.py [TYPE …] [--markdown FILE] [--json FILE]. All types take some minutes on one
core. The exit status is 1 if an architecture that is accepted is wrong.
"""

import json
import os
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from torch import Tensor, nn

from benchmarks.flags import new_file
from benchmarks.tiny_models import all_names, tiny_model
from kv_compression.io.errors import RunError, one_line
from kv_compression.io.flags import Parser
from kv_compression.methods.full_attention import TextOnly
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule, dense_mask
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model.attention import GROUPED, Patch
from kv_compression.model.cache import SentinelCache

CL, CR = 61, 62
LENGTH = 43  # far more than the windows of 8; no size in a model equals it, so that it marks the axis of tokens
TOLERANCE = 1e-5
PIECES = [7, 1, 1, 11, 1, 1, 5, 2, LENGTH]
TEXT = torch.randint(5, 60, (1, LENGTH), generator=torch.Generator().manual_seed(1))
SPANS = [(6, 14), (19, 25), (29, 33)]
COMPRESSED = TEXT.clone()
for _first, _last in SPANS:
    COMPRESSED[0, _first], COMPRESSED[0, _last] = CL, CR
KV = KVCompression(CL, CR)
WINDOW_KV = KVCompression(CL, CR, sink_tokens=1, recent_tokens=3)
NARROW = LocalAttention(ratio=0.9)
RULES = {
    "kv": (KV, COMPRESSED),
    "kv, sink and window": (WINDOW_KV, COMPRESSED),
    "local": (LocalAttention(ratio=0.5), TEXT),
    "sinks": (SinkAttention(ratio=0.5), TEXT),
}
COLUMNS = ["full", "cache", "padding", "compressed", "others", "keys"]


@dataclass
class Verdict:
    """What was found of one architecture.

    `differences` are by check; `refused` and `failed` hold what was said instead, by the package in one line of its
    own or by anything else. `missed` lists, by rule and layer, how many keys a layer reads that it must not and how
    many it does not read that it should.
    """

    name: str
    model_class: str = ""
    dtype: str = ""
    reason: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missed: dict[str, list] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """The checks whose difference is too large."""
        return [check for check, found in self.differences.items() if not found <= TOLERANCE]

    @property
    def status(self) -> str:
        """One of: not built, refused, right, right but for what is refused, wrong, fails."""
        if not self.dtype:
            return "not built"
        if self.wrong:
            return "wrong"
        if self.failed:
            return "fails"
        if self.refused:
            return "partly refused" if self.differences else "refused"
        return "right"

    def largest(self, column: str) -> float | None:
        """The largest difference of the checks `column: …`."""
        return max((found for check, found in self.differences.items() if check.split(": ")[0] == column), default=None)

    @property
    def why(self) -> str:
        """One line: why it is not built or refused, or what failed."""
        if self.status == "refused":
            return "; ".join(dict.fromkeys(self.refused.values()))
        said = [
            f"{text} [{checks[0]}{f' and {len(checks) - 1} more' if checks[1:] else ''}]"
            for text, checks in _by_text(self.failed | self.refused).items()
        ]
        return self.reason or "; ".join(said)


def _by_text(said: dict[str, str]) -> dict[str, list[str]]:
    checks: dict[str, list[str]] = {}
    for check, text in said.items():
        checks.setdefault(text, []).append(check)
    return checks


def _refusal(error: Exception) -> bool:
    """Whether the package itself has said no, in words of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = (last.line or "").lstrip().startswith("raise")
    return said and isinstance(error, (ValueError, RunError)) and "kv_compression" in Path(last.filename).parts


class Checks:
    """All checks of one model, into a `Verdict`."""

    def __init__(self, name: str):
        self.verdict = Verdict(name)
        self.model, self.plain, self.own = None, None, None
        try:
            self.model = tiny_model(name)
            self.verdict.model_class = type(self.model).__name__
            self.plain = self._untouched()
        except Exception as error:
            self.verdict.reason = one_line(error)

    def _untouched(self) -> Tensor:
        """Logits of the untouched model, in fp64 where it can: differences are then no rounding."""
        for dtype in (torch.float64, torch.float32):
            try:
                logits = one_pass(self.model.to(dtype), TEXT)
            except (RuntimeError, ValueError):
                if dtype == torch.float32:
                    raise
                continue
            if not logits.isfinite().all():
                raise ValueError("its logits are not finite")
            self.verdict.dtype = str(dtype).removeprefix("torch.")
            return logits

    def run(self) -> Verdict:
        """Carry out what can be."""
        if self.plain is None:
            return self.verdict
        if not self.check("patch", self.accepted):
            return self.verdict
        self.check("full: one pass", self.full_attention)
        self.check("full: unseen sentinels", self.unseen_sentinels)
        self.check("full: with use_cache", self.full_attention_with_a_plain_cache)
        self.check("cache: in pieces", lambda: self.cached(Rule(), TEXT, PIECES))
        self.check("cache: one by one", lambda: self.cached(Rule(), TEXT[:, :20], [1] * 20))
        for side in ("left", "right"):
            self.check(f"padding: on the {side}", lambda side=side: self.padded(side, cache=False))
            self.check(f"padding: on the {side}, cache", lambda side=side: self.padded(side, cache=True))
        for name, (rule, ids) in RULES.items():
            self.check(f"compressed: {name}", lambda rule=rule, ids=ids: self.cached(rule, ids, PIECES))
        self.check("compressed: keys left", self.keys_left)
        for implementation in ("eager", GROUPED):
            self.check(f"others: {implementation}", lambda which=implementation: self.other(which))
        for name, (rule, ids) in {"kv": RULES["kv"], "kv, sink and window": RULES["kv, sink and window"]}.items():
            self.check(f"keys: {name}", lambda name=name, rule=rule, ids=ids: self.keys_read(name, rule, ids))
        self.check("keys: local", lambda: self.keys_read("local", NARROW, TEXT))
        self.check("keys: own token", self.own_token_only)
        self.check("keys: far tokens", self.far_tokens)
        return self.verdict

    def check(self, name: str, measure: Callable[[], float | None]) -> bool:
        """Note a difference, or what was said instead of one. None is noted as nothing."""
        try:
            found = measure()
        except Exception as error:
            (self.verdict.refused if _refusal(error) else self.verdict.failed)[name] = one_line(error)
            return False
        if found is not None:
            self.verdict.differences[name] = found
        return True

    def apart(self, one: Tensor, other: Tensor) -> float:
        """The largest difference of logits ÷ the largest logit."""
        if one.shape != other.shape:
            return float("inf")
        return float((one - other).abs().nan_to_num(float("inf")).max() / self.plain.abs().max())

    def accepted(self) -> None:
        with Patch(self.model, Rule()):
            pass

    def full_attention(self) -> float:
        return self.apart(self.one_pass(Rule(), TEXT), self.plain)

    def unseen_sentinels(self) -> float:
        """Text among sentinels that nothing sees against the text alone: positions are the rule's, not places."""
        text = (COMPRESSED != CL) & (COMPRESSED != CR)
        with_sentinels = self.one_pass(TextOnly(CL, CR), COMPRESSED)[text][None]
        return self.apart(with_sentinels, one_pass(self.model, COMPRESSED[text][None]))

    def full_attention_with_a_plain_cache(self) -> float | None:
        try:
            with torch.no_grad():
                expected = self.model(TEXT, use_cache=True).logits
        except Exception:
            return None  # it cannot do that untouched
        with torch.no_grad(), Patch(self.model, Rule()):
            return self.apart(self.model(TEXT, use_cache=True).logits, expected)

    def one_pass(self, rule: Rule, ids: Tensor, **kwargs) -> Tensor:
        with Patch(self.model, rule):
            return one_pass(self.model, ids, **kwargs)

    def cached(self, rule: Rule, ids: Tensor, pieces: list[int]) -> float:
        with Patch(self.model, rule):
            read, _ = in_pieces(self.model, ids, rule, pieces)
            return self.apart(read, one_pass(self.model, ids))

    def padded(self, side: str, cache: bool) -> float:
        """A long and a short row in one batch against each alone."""
        short = TEXT[:, 3:32]
        ids, real = TEXT.repeat(2, 1), torch.ones(2, LENGTH, dtype=torch.long)
        at = slice(LENGTH - short.shape[1], LENGTH) if side == "left" else slice(0, short.shape[1])
        ids[1], real[1] = 0, 0
        ids[1, at], real[1, at] = short[0], 1
        with Patch(self.model, Rule()):
            rows = [one_pass(self.model, row)[0] for row in (TEXT, short)]
            if cache:
                both = in_pieces(self.model, ids, Rule(), PIECES, real)[0]
            else:
                both = one_pass(self.model, ids, attention_mask=real)
        return max(self.apart(both[0], rows[0]), self.apart(both[1, at], rows[1]))

    def keys_left(self) -> float:
        """0 if the closed spans have left the cache, else the number of keys too many."""
        with Patch(self.model, KV):
            _, cache = in_pieces(self.model, COMPRESSED, KV, PIECES)
        gone = sum(last - first for first, last in SPANS)  # a span's text and its <CL>
        return float(max(cache.length - (LENGTH - gone), 0))

    def other(self, implementation: str) -> float | None:
        """Another attention implementation than the model's usual one, under KV compression."""
        if self.model.config._attn_implementation == implementation:
            return None
        try:
            other = tiny_model(self.verdict.name, implementation).to(self.plain.dtype)
        except Exception:
            return None  # transformers itself refuses it
        with Patch(other, KV):
            return self.apart(one_pass(other, COMPRESSED), self.one_pass(KV, COMPRESSED))

    def keys_read(self, name: str, rule: Rule, ids: Tensor) -> float:
        """Keys that layers read and must not, or do not read and should: rule and own pattern against gradients.

        The own pattern of a layer is what it reads in the untouched model, taken by positions; keys at the query's own
        position, as sentinels have it, are in it if the layer mixes tokens at all.
        """
        if self.own is None:
            self.own = keys_read(with_gradients(layer_calls(self.model, TEXT)), range(LENGTH))
        with Patch(self.model, rule):
            patched = with_gradients(layer_calls(self.model, ids))
        if not patched or len(patched) != len(self.own):
            raise RuntimeError("its layers were not found")
        queries = torch.tensor([5, 7, 10, 14, 15, 18, 22, 25, 26, 33, 34, 38, LENGTH - 1])
        positions = rule.position_ids(ids)[0]
        visible = dense_mask(rule.visible(ids), 1, LENGTH, ids.device)[0][queries]
        same = (positions[queries, None] == positions) & (queries[:, None] != torch.arange(LENGTH))
        missed = []
        for layer, (found, pattern) in enumerate(zip(keys_read(patched, queries.tolist()), self.own)):
            allowed = pattern[positions[queries]][:, positions]
            allowed = torch.where(same, bool((pattern & ~torch.eye(LENGTH, dtype=torch.bool)).any()), allowed) & visible
            counts = int((found & ~allowed).sum()), int((allowed & ~found).sum())
            if any(counts):
                missed.append((layer, patched[layer][0], *counts))
        if missed:
            self.verdict.missed[name] = missed
        return float(sum(leaked + lost for *_, leaked, lost in missed))

    def own_token_only(self) -> float:
        """How many other tokens change what the first layer is given at a token."""
        other = COMPRESSED.clone()
        other[0, 22] = 5 if other[0, 22] != 5 else 6
        with Patch(self.model, KV):
            given = [layer_calls(self.model, ids)[0][1] for ids in (COMPRESSED, other)]
        moved = (given[0] - given[1]).detach().abs().movedim(token_axis(given[0]), 0).flatten(1).amax(1) > 0
        return float(moved.sum() - moved[22].long())

    def far_tokens(self) -> float | None:
        """How much the last logits change with tokens that no chain of layers reaches under local attention."""
        first = LENGTH - 1
        for _ in layer_calls(self.model, TEXT):
            first = int(first * NARROW.ratio)
        local = self.one_pass(NARROW, TEXT)
        if self.apart(local, self.plain) < 1e-3:
            raise RuntimeError("local attention changes nothing: the mask is not in effect")
        if first < 2:
            return None
        other = TEXT.clone()
        other[0, :first] = TEXT[0, :first].flip(0)
        return self.apart(local[:, -1], self.one_pass(NARROW, other)[:, -1])


@torch.no_grad()
def one_pass(model: nn.Module, ids: Tensor, **kwargs) -> Tensor:
    """Logits without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_pieces(model: nn.Module, ids: Tensor, rule: Rule, pieces: list[int], real: Tensor | None = None):
    """Logits of a text read through a `SentinelCache` piece by piece, and the cache."""
    cache, logits = SentinelCache(rule=rule), []
    start = 0
    for size in pieces:
        part = slice(start, start + size)
        mask = {} if real is None else {"attention_mask": real[:, part]}
        logits.append(model(ids[:, part], past_key_values=cache, use_cache=True, **mask).logits)
        start += size
        if start >= ids.shape[1]:
            break
    return torch.cat(logits, dim=1), cache


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def is_states(value) -> bool:
    """Whether something holds a vector for every token."""
    return torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1 and LENGTH in value.shape


def token_axis(states: Tensor) -> int:
    """The axis of the tokens."""
    return states.shape.index(LENGTH)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Everything in a list of modules, lists within lists too: layers, or the attentions of one; no experts."""
    lists = [part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and "expert" not in name]
    return [layer for part in lists for layer in part]


def layer_calls(model: nn.Module, ids: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """One pass: the name, the input and the output of every call of a layer, cut off from all other layers."""
    calls, leaves, hooks = [], [], []

    def cut(layer: nn.Module, args: tuple, kwargs: dict):
        args = list(args)
        for given, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                if is_states(given[key]):
                    leaves.append(given[key].detach().clone().requires_grad_())
                    given[key] = leaves[-1] * 1
                    return tuple(args), kwargs
        leaves.append(None)

    def note(layer: nn.Module, args: tuple, kwargs: dict, output):
        leaf = leaves.pop()
        states = next((value for value in tensors_in(output) if is_states(value)), None)
        if leaf is not None and states is not None:
            calls.append((type(layer).__name__, leaf, states))

    for layer in layers_of(model):
        hooks.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
        hooks.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        with torch.enable_grad():
            model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def with_gradients(calls: list[tuple[str, Tensor, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
    """The calls that the model does not make without gradients."""
    return [call for call in calls if call[2].requires_grad]


def keys_read(calls: list[tuple[str, Tensor, Tensor]], queries) -> list[Tensor]:
    """Which inputs of each layer its outputs at `queries` depend on, bool `(queries, tokens)` for every call."""
    generator = torch.Generator().manual_seed(0)
    outputs = [states.movedim(token_axis(states), 0) for _, _, states in calls]
    weights = [torch.randn(states[0].shape, generator=generator).to(states.dtype) for states in outputs]
    seen = [torch.zeros(len(queries), LENGTH, dtype=torch.bool) for _ in calls]
    for row, query in enumerate(queries):
        total = sum((states[query] * weight).sum() for states, weight in zip(outputs, weights))
        leaves = [leaf for _, leaf, _ in calls]
        for layer, gradient in enumerate(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)):
            if gradient is not None:
                seen[layer][row] = (gradient.movedim(token_axis(gradient), 0).flatten(1) != 0).any(1)
    return seen


def table(verdicts: list[Verdict]) -> str:
    """The findings as a Markdown table."""
    lines = ["| architecture | verdict | " + " | ".join(COLUMNS) + " | why |", "|---" * (len(COLUMNS) + 3) + "|"]
    for verdict in verdicts:
        found = [verdict.largest(column) for column in COLUMNS]
        numbers = ["" if value is None else f"{value:.0e}" if value % 1 else f"{value:.0f}" for value in found]
        cells = [verdict.name, verdict.status, *numbers, textwrap.shorten(verdict.why, 240).replace("|", "\\|")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(verdicts: list[Verdict]) -> str:
    """The findings as a page of documentation."""
    counts = Counter(verdict.status for verdict in verdicts).most_common()
    summary = ", ".join(f"{count} {status}" for status, count in counts)
    return f"""# Architectures

Written by `python benchmarks/architectures.py --markdown docs/architectures.md`. Every causal language model that
transformers {transformers.__version__} can build, tiny and random: {summary}.

A text of {LENGTH} tokens, windows and chunks of 8. Numbers are largest differences of logits ÷ the largest logit, in
fp64 where the model can; right is at most {TOLERANCE:.0e}.

- *full*: the patched model under full attention against the untouched one, also with sentinels that nothing sees.
- *cache*: one pass against a `SentinelCache` that reads piece by piece.
- *padding*: rows padded on the left and on the right, in one pass and through the cache, against each row alone.
- *compressed*: one masked pass against a cache that drops keys, under KV compression (also with a sink and a window),
  local and sink attention.
- *others*: eager and grouped attention against the usual implementation.
- *keys*: how many keys the layers read that the rule or their own pattern (window, chunk) forbids, or do not read
  though both allow it, by gradients.

{table(verdicts)}
"""


def main() -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types with all their variants; default: all")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as a page of documentation")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="a new file for all that was measured")
    args = parser.parse_args()
    names = all_names()
    if unknown := set(args.types) - {part for name in names for part in (name, name.split(" (")[0])}:
        parser.error(
            f"transformers {transformers.__version__} has no causal language model {', '.join(sorted(unknown))}"
        )
    if args.types:
        names = [name for name in names if name in args.types or name.split(" (")[0] in args.types]
    torch.set_num_threads(1)
    verdicts = []
    for name in names:
        verdicts.append(Checks(name).run())
        wrong = [f"{check} {verdicts[-1].differences[check]:.0e}" for check in verdicts[-1].wrong]
        print(f"{name}: {verdicts[-1].status}", "; ".join([*wrong, verdicts[-1].why]), flush=True)
    print("\n" + table(verdicts), "\n\n" + str(dict(Counter(verdict.status for verdict in verdicts))))
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page(verdicts))
    if args.json:
        found = [asdict(verdict) | {"status": verdict.status, "why": verdict.why} for verdict in verdicts]
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(verdict.status in ("wrong", "fails") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
