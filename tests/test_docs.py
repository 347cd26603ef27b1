"""README and docs: what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [
    "run_clm.py",
    "generate_c4.py",
    "eval_generation.py",
    "eval_recall.py",
    "export_model.py",
    "report.py",
    "sweep.py",
]
# Flags of other programs, and those of the published scripts that docs/reproduction.md maps to ours.
OTHERS = {
    *("--config_file", "--machine_rank", "--main_process_ip", "--multi_gpu", "--num_processes", "--cpu"),
    *("--no-deps", "--index-url", "--growth", "--markdown", "--help"),
    *("--compress", "--peft", "--lora", "--hub_model_id", "--hub_token", "--with_tracking", "--report_to"),
    *("--config_name", "--model_type", "--use_slow_tokenizer", "--overwrite_cache", "--no_keep_linebreaks"),
    *("--ratio",),  # a misspelt flag, shown as such
}


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"(?:kv_compression|tests|benchmarks|configs|results|docs)/[\w./]+\.\w+", page.read_text())
    example = "kv_compression/methods/strided_attention.py"  # the README's method that one might add
    assert not [name for name in named if name != example and not (ROOT / name).exists()]


def test_every_flag_is_that_of_a_script():
    helps = [
        subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
        for script in SCRIPTS
    ]
    known = set(re.findall(r"--[a-z][\w-]*", " ".join(helps)))
    for page in PAGES:
        if page.name != "architectures.md":
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - known <= OTHERS, page.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_tree_names_files_that_exist():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    rooms = re.findall(r"^  ((?:\w+/ ?)+) (.+)$", tree, re.MULTILINE)
    assert len(rooms) > 5
    for names, line in rooms:
        folders = [ROOT / "kv_compression" / name for name in names.split()]
        for file in re.findall(r"\w+\.py", line):
            assert any((folder / file).exists() for folder in folders), f"{names} {file}"
