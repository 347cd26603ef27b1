#!/bin/sh
# Both claims in small, on any laptop: sh quickstart.sh [RATIO]
#
# Fine-tunes the embedded model under full attention and every method at one ratio (0.5), shows their perplexities,
# then lets the models continue a few held-out documents and scores that. What is there already is not made again.
. "$(dirname -- "$0")/environment.sh"
[ $# -le 1 ] || check_ratio "" "sh quickstart.sh [RATIO]"
ratio=${1-0.5}
check_ratio "$ratio" "sh quickstart.sh [RATIO]"

results=output/embedded/quickstart
summary=$results/summary_$ratio.txt
if [ -f "$summary" ]; then
    cat "$summary"
    exit
fi
# shellcheck disable=SC2086,SC2154
find_python $embedded $scoring

mkdir -p "$results" || exit
folders=
files=
for run in "full_attention 0.0" "kv_compression $ratio" "local_attention $ratio" "sink_attention $ratio" \
    "scattered_attention $ratio"; do
    folder=$results/${run% *}_${run#* }
    folders="$folders $folder"
    files="$files $folder/generation.jsonl"
    [ -f "$folder/results.json" ] ||
        "$python" "$here/run_clm.py" --preset embedded --method "${run% *}" --bound_ratio "${run#* }" \
            --output_dir "$folder" || exit
done
for folder in $folders; do
    "$python" "$here/generate_c4.py" --model_dir "$folder" --num_documents 4 --num_continuations 4 || exit
done
{
    echo "Claim 1: test perplexity after fine-tuning"
    # shellcheck disable=SC2086
    PYTHONPATH="$here" "$python" -m kv_compression.results $folders &&
        echo "Claim 2: continuations of held-out documents" &&
        "$python" "$here/eval_generation.py" $files --csv "$results/scores.csv"
} >"$summary.partial" || exit
mv "$summary.partial" "$summary"
cat "$summary"
