"""What a compressed cache remembers: facts are put into text, the text is compressed, and they are asked for."""

import sys

from kv_compression.io.errors import quiet_libraries, run_script
from kv_compression.io.flags import parse_request
from kv_compression.io.results import results_of_run
from kv_compression.recall.request import RecallRequest


def main() -> None:
    """Ask what has not been asked yet."""
    request = parse_request(RecallRequest, __doc__)
    if request.model_dir:  # before the seconds that the imports take
        results_of_run(request.model_dir)
    quiet_libraries()
    from kv_compression.recall.run import measure_recall

    print(measure_recall(request))


if __name__ == "__main__":
    sys.exit(run_script(main))
