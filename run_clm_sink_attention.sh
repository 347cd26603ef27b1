#!/bin/sh
# Claim 1 with sink attention: sh run_clm_sink_attention.sh RATIO [any run_clm.py flag]
. "$(dirname -- "$0")/environment.sh"
run_clm sink_attention "$@"
