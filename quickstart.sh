#!/bin/sh
# Both claims in small, on any laptop: sh quickstart.sh [RATIO]
#
# Fine-tunes the embedded model under full attention and the three methods at one ratio (0.5) and shows a table.
. "$(dirname -- "$0")/environment.sh"
[ $# -le 1 ] || check_ratio "" "sh quickstart.sh [RATIO]"
ratio=${1-0.5}
check_ratio "$ratio" "sh quickstart.sh [RATIO]"
find_python

results=output/embedded/quickstart
folders=
for run in "full_attention 0.0" "kv_compression $ratio" "local_attention $ratio" "scattered_attention $ratio"; do
    method=${run% *}
    folder=$results/${method}_${run#* }
    folders="$folders $folder"
    [ -f "$folder/results.json" ] && continue
    "$python" "$here/run_clm.py" --preset embedded --method "$method" --bound_ratio "${run#* }" --output_dir "$folder" ||
        exit
done
# shellcheck disable=SC2086
PYTHONPATH="$here" exec "$python" -m kv_compression.results $folders
