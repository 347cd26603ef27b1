#!/bin/sh
# Many runs, by any number of workers at once: sh sweep.sh [any flag of sweep.py or run_clm.py]
. "$(dirname -- "$0")/environment.sh"
# As in run_clm: on a machine with a GPU the embedded weights are not required; and claim 1 scores no text.
command -v nvidia-smi >/dev/null 2>&1 && embedded=
after= claim_2=
for word in "$@"; do
    case $word in --claims | --claims=*) after=claims ;; -*) after= ;; esac
    case $after$word in claims*2*) claim_2=yes ;; esac
done
[ "$claim_2" ] || scoring=
# shellcheck disable=SC2086,SC2154
find_python $embedded $scoring
exec "$python" "$here/sweep.py" "$@"
