#!/bin/sh
# Many runs, here or on slurm: sh sweep.sh [any flag of sweep.py or run_clm.py]
. "$(dirname -- "$0")/environment.sh"
# As in run_clm: on a machine with a GPU the embedded weights are not required. Scorers are needed for claim 2 alone.
command -v nvidia-smi >/dev/null 2>&1 && embedded=
after= claim_2= on_slurm=
for word in "$@"; do
    case $word in
    --claims | --claims=*) after=claims ;;
    --slurm) on_slurm=yes after= ;;
    -*) after= ;;
    esac
    case $after$word in claims*2*) claim_2=yes ;; esac
done
[ "$claim_2" ] || scoring=
[ "$on_slurm" ] || slurm=
# shellcheck disable=SC2086,SC2154
find_python $embedded $scoring $slurm
exec "$python" "$here/sweep.py" "$@"
