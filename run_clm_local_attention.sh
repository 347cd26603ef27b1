#!/bin/sh
# Claim 1 with local attention: sh run_clm_local_attention.sh RATIO [any run_clm.py flag]
. "$(dirname -- "$0")/environment.sh"
run_clm local_attention "$@"
