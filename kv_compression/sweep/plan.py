"""Which runs a sweep consists of, in which order, and the flags of each."""

from collections.abc import Sequence
from typing import NamedTuple

from kv_compression.methods import METHODS
from kv_compression.methods.full_attention import FullAttention
from kv_compression.settings import OPTIONS_OF_METHODS

FULL = FullAttention.name  # the baseline


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    method: str
    ratio: float
    protocol: str
    seed: int = 0
    eval_only: bool = False
    per_protocol: bool = False  # whether methods without sentinels train differently under each protocol

    @property
    def name(self) -> str:
        """The run's folder within the sweep's."""
        name = f"{self.method}_{self.ratio}"
        if self.protocol == "paper" and (self.per_protocol or METHODS[self.method].uses_sentinels):
            name += "_paper"
        if self.seed:
            name += f"_seed{self.seed}"
        return name + ("_untrained" if self.eval_only else "")

    def flags(self, given: dict) -> list[str]:
        """The run's flags for run_clm.py: its own, and those `given` to all runs (by name) that its method takes.

        The untouched model is scored once, by the run with `eval_only`, and skipped by the others.
        """
        foreign = {name for name, methods in OPTIONS_OF_METHODS.items() if self.method not in methods}
        own = {"method": self.method, "bound_ratio": self.ratio, "protocol": self.protocol, "seed": self.seed}
        own |= {"eval_only": True} if self.eval_only else {"skip_untrained": True, "resume_from_checkpoint": True}
        return as_flags(own | {name: value for name, value in given.items() if name not in foreign})


def as_flags(values: dict) -> list[str]:
    """Values by name as command-line flags; those that are None are left out."""
    words = []
    for name, value in values.items():
        if value is not None:
            parts = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{name}", *map(str, parts)]
    return words


def plan(
    methods: Sequence[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    protocols: Sequence[str],
    accumulation: int = 1,
) -> list[PlannedRun]:
    """All runs, ordered so that the first ones already make a report: each seed's baseline, then ratios as in `spread`.

    A method without sentinels reads the same blocks under both protocols, and its results hold both ways of averaging.
    It runs once, except with gradient `accumulation`, where the protocols' learning rates differ.
    """
    per_protocol = accumulation > 1
    shared = protocols if per_protocol else ["matched" if "matched" in protocols else "paper"]
    runs = []
    for seed in seeds:
        runs += [PlannedRun(FULL, 0.0, protocol, seed) for protocol in shared]
        if seed == seeds[0]:  # the untouched model does not depend on the seed
            runs += [PlannedRun(FULL, 0.0, protocol, eval_only=True) for protocol in shared]
        for ratio in spread(ratios):
            for method in methods:
                own = protocols if METHODS[method].uses_sentinels else shared
                runs += [PlannedRun(method, ratio, protocol, seed) for protocol in own if method != FULL]
    return [run._replace(per_protocol=per_protocol) for run in runs]


def spread(values: Sequence[float]) -> list[float]:
    """The middle, the ends, then the middles of the gaps, so that the first few cover the range."""
    values = sorted(set(values))
    last = len(values) - 1
    order, gaps = [last // 2, last, 0], [(last // 2, last), (0, last // 2)]
    for low, high in gaps:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(middle, high), (low, middle)]
    return [values[index] for index in dict.fromkeys(order)]
