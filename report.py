"""Everything that was measured below a folder as report.md, CSV tables and plots, with a verdict on each claim.

Parses flags, calls `kv_compression.reporting`, prints where the report is.
"""

import sys
from pathlib import Path

from kv_compression.io.errors import UsageError, quiet_libraries, run_script
from kv_compression.io.flags import Parser


def parse(argv: list[str] | None = None):
    """The flags of this script."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "folder", nargs="?", default="output", help="where results lie, at any depth, or a results.json (output)"
    )
    parser.add_argument("--output_dir", help="where the report goes (the folder itself)")
    return parser.parse_args(argv)


def main() -> None:
    """Collect, compare, write."""
    flags = parse()
    folder = Path(flags.folder)  # looked for before the seconds that the imports take
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder")
    if folder.is_file():
        if folder.suffix != ".json":
            raise UsageError(f"{folder} is a file: name the folder where results lie, at any depth")
        folder = folder.parent
    quiet_libraries()
    from kv_compression.reporting import collecting, writing

    found = collecting.collect(folder)
    path = writing.write(found, Path(flags.output_dir or folder))
    print(f"{found.tally()}: {path}")


if __name__ == "__main__":
    sys.exit(run_script(main))
