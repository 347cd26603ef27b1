#!/bin/sh
# Both claims in small, on any laptop: sh quickstart.sh [RATIO]
#
# Fine-tunes the embedded model under full attention and every method at one ratio (0.5), then lets the models continue
# a few held-out documents, and ends with tables, a plot and what was found. What is there already is not made again:
# after Ctrl-C the same command continues.
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
find_python $embedded $scoring $reports

# stop STATUS: ends the quick start where a step has failed or was interrupted.
command="sh quickstart.sh${1+ $1}"
stop() {
    echo "stopped; $command continues from here" >&2
    exit "$1"
}
trap 'stop 130' INT

mkdir -p "$results" || exit
folders= files= number=0 count=6
# METHOD RATIO [--recipe RECIPE]
for run in "full_attention 0.0" "kv_compression $ratio" "kv_compression $ratio --recipe best" \
    "local_attention $ratio" "sink_attention $ratio" "scattered_attention $ratio"; do
    # shellcheck disable=SC2086
    set -- $run
    number=$((number + 1))
    folder=$results/${1}_$2${4:+_$4}
    folders="$folders $folder"
    files="$files $folder/generation.jsonl"
    [ -f "$folder/results.json" ] && continue
    echo "Run $number of $count: $run"
    "$python" "$here/run_clm.py" --preset embedded --output_dir "$folder" --skip_untrained --resume_from_checkpoint \
        --method "$1" --bound_ratio "$2" ${3:+"$3" "$4"} || stop $?
done
number=0
for folder in $folders; do
    number=$((number + 1))
    echo "Continuations $number of $count: ${folder##*/}"
    "$python" "$here/generate_c4.py" --model_dir "$folder" --num_documents 4 --num_continuations 2 || stop $?
done
echo "Scoring the continuations"
{
    echo "Claim 1: test perplexity after fine-tuning"
    # shellcheck disable=SC2086
    PYTHONPATH="$here" "$python" -m kv_compression.io.results $folders &&
        printf '\nClaim 2: continuations of held-out documents\n' &&
        "$python" "$here/eval_generation.py" $files --csv "$results/scores.csv" &&
        echo &&
        PYTHONPATH="$here" "$python" -m kv_compression.reporting.quickstart $folders
} >"$summary.partial" || stop $?
mv "$summary.partial" "$summary"
echo
cat "$summary"
