#!/bin/sh
# The style checks and all tests: sh run_tests.sh [any pytest flag]
. "$(dirname -- "$0")/environment.sh"
# shellcheck disable=SC2086,SC2154
find_python $embedded $scoring $phrases $slurm $reports pytest hypothesis ruff
cd "$here" || exit
"$python" -m ruff check . && "$python" -m ruff format --check . && exec "$python" -m pytest "$@"
