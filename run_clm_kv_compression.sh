#!/bin/sh
# Claim 1 with KV compression: sh run_clm_kv_compression.sh RATIO [any run_clm.py flag]
. "$(dirname -- "$0")/environment.sh"
run_clm kv_compression "$@"
