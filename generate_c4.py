"""Claim 2, first half: continue the prefixes of C4 documents with a model that run_clm.py has fine-tuned."""

import sys

from kv_compression.generation.request import GenerationRequest
from kv_compression.io.errors import is_main_process, quiet_libraries, run_script
from kv_compression.io.flags import parse_request
from kv_compression.io.results import results_of_run


def main() -> None:
    """Generate what is missing."""
    request = parse_request(GenerationRequest, __doc__)
    if is_main_process():  # before the seconds that the imports take
        results_of_run(request.model_dir)
    quiet_libraries()
    from kv_compression.generation.run import generate

    line = generate(request)
    if is_main_process():
        print(line)


if __name__ == "__main__":
    sys.exit(run_script(main))
