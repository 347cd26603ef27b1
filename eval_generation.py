"""Claim 2, second half: score the continuations that generate_c4.py has written.

Without arguments, every generation file below output/.
"""

import sys

from kv_compression.generation.records import find_files
from kv_compression.generation.request import ScoringRequest
from kv_compression.io.errors import is_main_process, quiet_libraries, run_script
from kv_compression.io.flags import parse_request


def main() -> None:
    """Score what has no scores yet, then show everything."""
    request = parse_request(ScoringRequest, __doc__)
    files = find_files(request.paths) if is_main_process() else []  # before the seconds that the imports take
    quiet_libraries()
    from kv_compression.generation.run import score

    text = score(request, files)
    if is_main_process():
        print(text)


if __name__ == "__main__":
    sys.exit(run_script(main))
