#!/bin/sh
# Claim 1 with scattered attention: sh run_clm_scattered_attention.sh RATIO [any run_clm.py flag]
. "$(dirname -- "$0")/environment.sh"
run_clm scattered_attention "$@"
