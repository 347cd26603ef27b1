"""Export a run of run_clm.py as one full model, its adapter merged into the weights."""

import argparse
import sys
from pathlib import Path

from kv_compression.io import results
from kv_compression.io.errors import UsageError, quiet_libraries, run_script
from kv_compression.io.flags import Parser


def parse() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_dir", required=True, help="the output folder of a run of run_clm.py")
    add("--output_dir", required=True, help="a new folder")
    add("--mixed_precision", choices=["auto", "no", "bf16"], default="auto", help="of the weights (that of the run)")
    add("--push_to_hub", nargs="?", const="", metavar="REPO", help="upload it (default name: its folder's)")
    add("--hub_private", action="store_true", default=None, help="make a new repository private")
    flags = parser.parse_args()
    if flags.hub_private and flags.push_to_hub is None:
        raise UsageError("--hub_private needs --push_to_hub")
    return flags


def main() -> None:
    """Export the run unless that is done, and upload the export if asked to."""
    flags = parse()
    results.results_of_run(flags.model_dir)  # before the seconds that the imports take
    quiet_libraries()
    from kv_compression.io import hub
    from kv_compression.sharing import export, model_card

    output = Path(flags.output_dir)
    repository = None if flags.push_to_hub is None else hub.destination(flags.push_to_hub, output)
    exported = export.export(flags.model_dir, output, flags.mixed_precision)
    print(f"{flags.model_dir} is exported to {output}" if exported else f"{output} holds this export already")
    if repository:
        model_card.write_card(output, exported or results.read_results(output), repository)
        print(f"uploaded to {hub.push(output, repository, flags.hub_private)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
