"""Claim 2, second half: score the continuations that generate_c4.py has written.

Without arguments, every generation file below output/. Parses flags, calls `kv_compression.scoring`, prints a table.
"""

import hashlib
import itertools
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from kv_compression.generation import records
from kv_compression.generation.records import is_scorable, scores_path
from kv_compression.io import fields, ownership, strict_json, tables
from kv_compression.io.errors import Parser, UsageError, is_main_process, printable, quiet_libraries, run_script
from kv_compression.io.results import write_json, write_text

METRICS = ("rouge_l", "bertscore", "perplexity")
SHOWN: fields.Fields = {  # what the table needs of a scores.json, besides the scores
    "skipped": fields.is_counts,
    "num_documents": fields.is_count,
    "cache_fraction": fields.is_measured,
    "perplexity_token_weighted": fields.is_measured,
}


def parse():
    """The flags of this script."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="*", default=["output"], help="generation files, or folders to search (output)")
    parser.add_argument("--bertscore_model", help="(paper: roberta-large; embedded: all-MiniLM-L6-v2)")
    parser.add_argument("--bertscore_layer", type=int, help="of that model's layers (bert-score's choice; embedded: 6)")
    parser.add_argument("--fluency_model", help="(paper: EleutherAI/pythia-1b; embedded: SmolLM2-135M)")
    parser.add_argument("--csv", help="where the table goes as CSV (scores.csv in the first folder)")
    parser.add_argument("--overwrite", action="store_true", help="score files again that are scored already")
    return parser.parse_args()


def find_files(paths: list[str]) -> list[Path]:
    """The generation files that are named or lie below a named folder: those with an .about.json beside them.

    UsageError if a named file has nothing to score; below a folder it is only left out, as one that is just begun.
    """
    found = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        below = sorted(path.rglob("*.about.json")) if path.is_dir() else []
        found += [about.with_name(about.name.replace(".about.json", ".jsonl")) for about in below] or [path]
    files = []
    for path in filter(Path.is_file, dict.fromkeys(found)):
        if any(map(is_scorable, records.read(path)[0])):
            files.append(path)
        elif path in map(Path, paths):
            raise UsageError(f"{path} holds no continuations: name a file that generate_c4.py has written")
        else:
            print(printable(f"{path}: left out: it holds no continuations yet"))
    if not files:
        raise UsageError(f"no generation file in {', '.join(paths)}: generate_c4.py writes them")
    return files


def main() -> None:
    """Score what is not scored yet, then show everything."""
    flags = parse()
    named = find_files(flags.paths) if is_main_process() else []  # before the seconds that the imports take
    quiet_libraries()
    from kv_compression import settings as run_settings
    from kv_compression.io import processes

    state = processes.state()
    processes.load_whole_models()
    files = processes.on_main(lambda: named)
    folder = next((Path(name) for name in flags.paths if Path(name).is_dir()), files[0].parent)
    csv_path = Path(flags.csv or folder / "scores.csv")
    found = {path: processes.on_main(look_up, path, flags) for path in files}
    missing = [path for path, (*_, scores) in found.items() if scores is None]
    processes.on_main(check_outputs, missing, csv_path)
    scored, scorers = {}, {}
    for path, (about, models, made_from, scores) in found.items():
        if scores is None:
            if models not in scorers:
                scorers.clear()  # one pair of models at a time
                scorers[models] = processes.one_first(run_settings.load_scorers, models)
            scores = score(path, about, made_from, scorers[models])
            processes.on_main(write_json, scores_path(path), scores)
        scored[path] = scores
        trouble = "; ".join(f"{count} {reason}" for reason, count in scores["skipped"].items() if count)
        if trouble and state.is_main_process:
            print(printable(f"{path}: not scored: {trouble}"))
    if state.is_main_process:
        table = [row(path, scores) for path, scores in scored.items()]
        print(render(table, names_of(scored)))
        for line in comparisons(scored):
            print(line)
        write_text(csv_path, tables.csv_table(table))
    state.destroy_process_group()


def check_outputs(missing: list[Path], csv_path: Path) -> None:
    """Raise UsageError, before hours of scoring, if somebody else's file has the name of one that will be written."""
    if missing:
        ownership.check(map(scores_path, missing), instead="name the continuations otherwise")
        ownership.check([csv_path], instead="name another file with --csv")


def look_up(path: Path, flags) -> tuple:
    """What made a generation file, the models to score it with, what scores are made from, and those if it has them."""
    from kv_compression import settings as run_settings

    about = records.read_about(path) or {}
    named = (flags.bertscore_model, flags.fluency_model, flags.bertscore_layer)
    models = run_settings.scorers(about.get("preset", "embedded"), *named)
    digest = hashlib.sha256(records.read_bytes(path)).hexdigest()
    made_from = {"file_sha256": digest} | models.record()
    scores = None if flags.overwrite else read_scores(scores_path(path))
    if scores is not None and any(scores.get(name) != value for name, value in made_from.items()):
        scores = None
    return about, models, made_from, scores


def read_scores(path: Path) -> dict | None:
    """Scores written before, None if there are none that can be read."""
    try:
        content = strict_json.read(path)
        if not fields.has_all(content, fields.OF_SCORES | SHOWN):
            return None
        fields.check(content, fields.OF_SCORES | SHOWN, fields.OF_A_GENERATION)
    except (OSError, ValueError):
        return None
    return content


def score(path: Path, about: dict, made_from: dict, scorers: tuple) -> dict:
    """Everything that scores.json holds of one generation file; processes share its documents."""
    from kv_compression.generation import scoring
    from kv_compression.io import processes

    lines, problems = processes.on_main(records.read, path)
    scores = scoring.score_records(lines, *scorers)
    scores["skipped"]["half-written or damaged lines"] = len(problems)
    scores["damaged_lines"] = problems
    documents = scores["documents"]
    estimates = {
        metric: asdict(scoring.bootstrap([found[metric] for found in documents.values() if metric in found]))
        for metric in METRICS
    }
    held = [record["cache_length"] / record["prefix_tokens"] for record in records.usable(lines)]
    return {
        **{name: about.get(name) for name in ("method", "bound_ratio", "protocol", "preset", "documents_sha256")},
        **made_from,
        "num_documents": len(documents),
        "cache_fraction": sum(held) / len(held) if held else None,
        **estimates,
        **scores,
        "documents": {str(index): found for index, found in documents.items()},
    }


def row(path: Path, scores: dict) -> dict:
    """One line of the table."""
    line = {name: scores.get(name) for name in ("method", "bound_ratio", "num_documents", "cache_fraction")}
    for metric in METRICS:
        for name, value in scores[metric].items():
            line[metric if name == "mean" else f"{metric}_{name}"] = value
    return line | {"perplexity_token_weighted": scores["perplexity_token_weighted"], "file": str(path)}


def render(table: list[dict], names: dict[Path, str]) -> str:
    """The table as text, with the files' `names`: means with 95% confidence intervals."""

    def estimate(metric: str, digits: int):
        return lambda line: tables.estimate(line[metric], line[f"{metric}_low"], line[f"{metric}_high"], digits)

    columns = {
        "method": lambda line: names[Path(line["file"])],
        "ratio": lambda line: line["bound_ratio"],
        "documents": lambda line: line["num_documents"],
        "cache": lambda line: tables.figure(line["cache_fraction"], 3),
        "ROUGE-L": estimate("rouge_l", 4),
        "BERTScore": estimate("bertscore", 4),
        "perplexity": estimate("perplexity", 1),
        "token-weighted": lambda line: tables.figure(line["perplexity_token_weighted"], 1),
    }
    return tables.text_table(columns, sorted(table, key=lambda line: (str(line["method"]), line["bound_ratio"] or 0)))


def comparisons(scored: dict[Path, dict]) -> list[str]:
    """For every two methods at one ratio on the same documents: the difference of means and its p-value.

    Where a method has several files at a ratio (seeds, protocols, variants), its file is named. So few documents that
    no p-value could be small are not compared.
    """
    from kv_compression.generation.scoring import FEWEST_DOCUMENTS, least_p_value, paired_p_value

    lines, too_few, names = [], 0, names_of(scored)
    for (path, one), (other_path, other) in itertools.combinations(scored.items(), 2):
        same = ["documents_sha256", "bertscore_model", "bertscore_layer", "fluency_model"]
        methods = [scores.get("method") for scores in (one, other)]
        if "full_attention" not in methods:
            same.append("bound_ratio")
        if None in methods or methods[0] == methods[1] or any(one.get(name) != other.get(name) for name in same):
            continue
        if one.get("documents_sha256") is None:
            continue
        common = len(one["documents"].keys() & other["documents"].keys())
        if common < FEWEST_DOCUMENTS:
            too_few = max(too_few, common)
            continue
        parts = []
        for metric in METRICS:
            both = [
                (found[metric], other["documents"][index][metric])
                for index, found in one["documents"].items()
                if metric in found and metric in other["documents"].get(index, {})
            ]
            if both:
                first, second = zip(*both)
                difference = (sum(first) - sum(second)) / len(both)
                parts.append(f"{metric} {difference:+.4f} (p = {paired_p_value(first, second):.4f})")
        ratio = max(scores.get("bound_ratio") or 0 for scores in (one, other))
        lines.append(f"{names[path]} − {names[other_path]} at {ratio}: {', '.join(parts)}")
    if too_few:
        least = f"{least_p_value(too_few):g}"
        lines.append(f"differences are not tested: of {too_few} documents no p-value can fall below {least}")
    return lines


def names_of(scored: dict[Path, dict]) -> dict[Path, str]:
    """What each file is called: its method and, where several have that method and ratio, the file."""
    kinds = Counter(map(kind, scored.values()))
    names = {}
    for path, scores in scored.items():
        file = path.parent.name if path.name == "generation.jsonl" else f"{path.parent.name}/{path.name}"
        names[path] = printable(f"{scores.get('method')}" + f" ({file})" * (kinds[kind(scores)] > 1))
    return names


def kind(scores: dict) -> tuple:
    """What the table tells files apart by."""
    return (scores.get("method"), scores.get("bound_ratio"))


if __name__ == "__main__":
    sys.exit(run_script(main))
