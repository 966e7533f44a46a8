#!/usr/bin/env bash
# Makes what needs a GPU, the most valuable first: for one that is at hand now and then.
#
#   benchmarks/gpu.sh OUT [BEFORE]
#
# Pieces run one after another. Each ends by its own second of the call at the latest, leaves its
# record in OUT at once, and takes nothing from the others by failing. BEFORE, by default OUT
# itself, is the folder that an earlier call left: what was made there is not made again (only a new
# OUT makes all anew), and its trainings go on.
#
# OUT holds a handful of files, each below 16 MiB:
#   gpu.log            all that was printed; its lines "== NAME: made" say what can be left out
#   correctness.log    the tests, with tracebacks
#   bench.jsonl        records of the benchmark, one a line; of two with one name the later counts
#   profile.txt        the kernels of a step by their time
#   runs.tar.gz.aa, …  trainings that have yet to go on, with their newest checkpoint
#   done.tar.gz.aa, …  trainings at their end, those of seed 0 with the weights; a later call does
#                      not need them
#
# The exit code is 1 where something failed, 3 where nothing did and something is yet to be made.
#
#   DATA=folder     CIFAR-10 for the trainings: any --dataset_dir of sparsenet train
#   DATA_NAME=name  its name in reports
#   LIMIT=540       seconds for all
#   PIECES='.*'     the names of the pieces to make, a regular expression
#   QUICK=1         tiny networks on a CPU: proves that this script works
#   PYTHON=python3  with torch; the package is taken from src/, it need not be installed. Packages
#                   that this Python lacks may lie in .cache/gpu (see README.md)
set -euo pipefail

[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: $0 OUT [BEFORE]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
before=$(cd "${2:-$1}" && pwd)
data=${DATA:+$(realpath "$DATA")} data_name=${DATA_NAME:-}
limit=${LIMIT:-540} pieces=${PIECES:-.*} quick=${QUICK:-} python=${PYTHON:-python3}
least=20 spare=25 # seconds: with which a piece is begun, and that a training needs to conclude
tiny_bench=() tiny_train=() seeds=(0 1 2)
net=sparsenet_100_24 others=sparsenet_40_12,sparsenet_bc_100_24,densenet_bc_100_12
plain=reference-fp32,reference-bf16,reference-bf16-nhwc
if [ -n "$quick" ]; then
    least=1 spare=3 seeds=(0)
    tiny_bench=(--model sparsenet_40_12 --batch_size 2 --image_size 8 --steps 1)
    tiny_train=(--preset digits --depth 10 --growth_rate 4 --first_size 4 --batch_size 64)
    tiny_train+=(--device cpu --implementation shared)
    export OMP_NUM_THREADS=1
fi
log=$out/gpu.log
cd "$(dirname "$0")/.."
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=240
[ ! -d .cache/gpu ] || PYTHONPATH+=:.cache/gpu
if ! problem=$("$python" -c "import msgspec, jinja2, safetensors" 2>&1); then
    echo "$0: expected the packages msgspec, jinja2 and safetensors, found: ${problem##*$'\n'};" \
        "benchmarks/README.md says how to bring them along in .cache/gpu" >&2
    exit 1
fi
work=$(mktemp -d) # what is large or unfinished stays out of OUT until it is packed
failed=() missing=() training=

# --- the frame ------------------------------------------------------------------------------------

say() { echo "$*" | tee -a "$log"; }

last_line() { tail -n 1 "$1" | cut -c -240; }

left() { # [UNTIL]: seconds
    local until=${1:-$limit}
    [ "$until" -lt "$limit" ] || until=$limit
    echo $((until > SECONDS ? until - SECONDS : 0))
}

# UNTIL COMMAND...: returns its exit code; if it was not done 124, or 137 where it was killed.
within() {
    local seconds
    seconds=$(left "$1")
    shift
    [ "$seconds" -gt 0 ] || return 124
    # In the background, because waiting can be interrupted.
    timeout -k 10 -s "${signal:-TERM}" "$seconds" "$@" 3>&- &
    wait $!
}

made() { grep -q "^== $1: made" "$log"; }

piece() { # NAME UNTIL COMMAND...: which returns 0: made, 3: to be continued, or else: failed
    local name=$1 until=$2 began=$SECONDS code=3 how
    shift 2
    [[ $name =~ ^($pieces)$ ]] || return 0
    if made "$name"; then
        say "$name was made before"
        return
    fi
    if [ "$(left "$until")" -ge "$least" ]; then "$@" && code=0 || code=$?; fi
    case $code in
        0) how=made ;;
        3) how="not at its end" missing+=("$name") ;;
        *) how=FAILED failed+=("$name") ;;
    esac
    say "== $name: $how, $((SECONDS - began)) s; $(left) s remain"
}

begin() {
    local file kind
    if [ "$before" != "$out" ]; then
        for file in gpu.log correctness.log bench.jsonl profile.txt; do
            [ ! -e "$before/$file" ] || cp "$before/$file" "$out"
        done
        for file in "$before"/{runs,done}.tar.gz.??; do
            [ ! -e "$file" ] || cp "$file" "$out"
        done
    fi
    touch "$log"
    already=$(wc -l <"$log")
    for kind in runs done; do
        mkdir "$work/$kind"
        if [ -e "$out/$kind.tar.gz.aa" ] && ! cat "$out/$kind.tar.gz."?? | tar xz -C "$work"; then
            say "$out/$kind.tar.gz.*: damaged, what it held begins anew"
            rm -r "$work/$kind" && mkdir "$work/$kind"
        fi
    done
}

pack() { # KIND: in parts, in place of an earlier archive, which may have had more of them
    local part
    if [ -n "$(ls "$work/$1")" ]; then
        tar cz -C "$work" "$1" | split -b 15M - "$out/new.$1." || return
    fi
    rm -f "$out/$1.tar.gz."??
    for part in "$out/new.$1."??; do
        [ ! -e "$part" ] || mv "$part" "$out/$1.tar.gz.${part##*.}"
    done
}

stopped() { # EXIT CODE: what is running saves first
    trap '' INT TERM
    exec >&3 2>&3 # whatever was redirected
    say "stopped by a signal"
    jobs -p | xargs -r kill 2>/dev/null || true
    wait
    exit "$1"
}

leave() {
    # shellcheck disable=SC2086 # a name and a number
    if [ -n "$training" ]; then keep $training; fi
    rm -rf "$work"
}

# --- the kinds of piece ---------------------------------------------------------------------------

VERSIONS='
import importlib.metadata as known, os, platform, sys, torch
def version(name):
    try: return f"{name} {known.version(name)}"
    except known.PackageNotFoundError: return f"no {name}"
names = "torch triton numpy torchvision pytest hypothesis msgspec safetensors filelock"
names += " pillow pyarrow rich matplotlib"
print("Python", platform.python_version(), *map(version, names.split()), sep=", ")
if not torch.cuda.is_available(): sys.exit("no GPU that PyTorch can use")
free, total = (round(size / 2**30) for size in torch.cuda.mem_get_info())
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(),
      f"{free} of {total} GiB free, CUDA", torch.version.cuda, "cuDNN",
      torch.backends.cudnn.version(), os.cpu_count(), "CPU cores")'

environment() { # fails without a GPU
    local asked=name,driver_version,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit
    local code=0 commit
    commit=$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)
    say "$(date -u +%FT%TZ), commit $commit," \
        "src $(find src -name '*.py' | sort | xargs cat | sha256sum | cut -c -16)"
    say "$(nvidia-smi --query-gpu=$asked,temperature.gpu --format=csv,noheader 2>&1 || true)"
    within 60 "$python" -c "$VERSIONS" >"$work/versions" 2>&1 || code=1
    say "$(tail -n 3 "$work/versions")"
    [ -n "$quick" ] || return $code
}

# The tests that run on a GPU. Beside them the reference is compiled, which takes most of its piece.
correctness() {
    local tests=(tests/test_triton.py tests/test_step.py -k "triton or cuda") code=0 ahead
    local report=$out/correctness.log
    if ! "$python" -c "import pytest, hypothesis" 2>/dev/null; then
        say "no pytest or no hypothesis: the kernels are checked as the benchmark does it"
        record $others triton-fp32,triton-bf16,triton-bf16-captured --measures step --steps 1
        return
    fi
    [ -z "$quick" ] || tests=(tests/test_topology.py)
    timeout -k 10 "$(left "$until")" "$python" -m benchmarks.steps --once \
        "$(here reference-bf16-nhwc-compiled)" "${tiny_bench[@]}" >"$work/ahead" 2>&1 3>&- &
    ahead=$!
    # Other versions may warn of what ours do not. Interrupted by SIGINT, pytest reports until then.
    signal=INT PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 within "$until" env --default-signal=INT \
        "$python" -m pytest -o addopts=-v -o faulthandler_timeout=45 -p no:cacheprovider -W ignore \
        --tb=short --maxfail=8 --continue-on-collection-errors "${tests[@]}" \
        >"$report" 2>&1 || code=1
    grep -aE '^(FAILED|ERROR) |^=.*(passed|failed|error|deselected)' "$report" | tr -d = |
        cut -c -240 | tee -a "$log" ||
        say "killed: $(grep -aE ' (FAILED|ERROR) ' "$report") $(last_line "$report")"
    wait "$ahead" || say "compiling ahead: not done, $(last_line "$work/ahead")"
    return $code
}

sanitized() { # what a kernel touches that is not its own
    local report=$work/sanitizer
    within "$until" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
        "$python" -m pytest -o addopts=-v -p no:cacheprovider -W ignore --tb=line \
        -x tests/test_triton.py -k whole_network >"$report" 2>&1 && return
    cat "$report" >>"$log"
    grep -aE -m 12 '^=====.*(Invalid|Misaligned|at |by thread|SUMMARY)' "$report" ||
        last_line "$report"
    return 1
}

here() { # VARIANTS: with QUICK, such as run on a CPU
    local cpu='s/triton/shared/g; s/torchvision/reference/g; s/-captured|-compiled//g'
    cpu+='; s/bf16/fp32/g'
    if [ -n "$quick" ]; then sed -E "$cpu" <<<"$1"; else echo "$1"; fi
}

# MODELS VARIANTS FLAGS...: adds a line to bench.jsonl. A variant that fails is left out, and the
# piece has failed.
record() {
    local models=$1 variants code=0 status
    variants=$(here "$2")
    shift 2
    if [ -n "$quick" ]; then
        set -- "$@" "${tiny_bench[@]}" --device cpu
    else
        set -- --model "$models" "$@"
    fi
    while [ -n "$variants" ] && [ "$(left "$until")" -ge "$least" ]; do
        say "benchmarks.bench --variants $variants $*"
        status=0
        within "$until" "$python" -m benchmarks.bench --variants "$variants" "$@" --json \
            >"$work/record" 2>"$work/error" || status=$?
        cat "$work/error" >>"$log"
        case $status in
            0)
                {
                    printf '{"record": "%s", ' "$name"
                    tr -d '\n' <"$work/record" | sed 's/^{ *//'
                    echo
                } >"$work/line"
                cat "$work/line" >>"$out/bench.jsonl"
                table "$work/record"
                return $code
                ;;
            124 | 137)
                say "not done in its time"
                return 3
                ;;
        esac
        code=1
        say "failed: $(last_line "$work/error")"
        variants=$(fewer "$variants" "$(tail -n 1 "$work/error")")
    done
    return 1
}

table() { # FILE: as Markdown
    "$python" -m benchmarks.bench.tables "$1" 2>&1 | tee -a "$log" || true
}

# VARIANTS ERROR: prints the variants without the one that the error names first. Where it names
# none, those of triton are left out, or the last one.
fewer() {
    local all kept wrong
    all=$(tr ',' '\n' <<<"$1")
    wrong=$(grep -oE '[a-z_]+-(fp32|bf16)(-[a-z]+)*' <<<"$2" | head -n 1 || true)
    kept=$(grep -vxF "$wrong" <<<"$all" || true)
    [ "$kept" != "$all" ] || kept=$(grep -v '^triton-' <<<"$all" || true)
    [ "$kept" != "$all" ] || kept=$(head -n -1 <<<"$all")
    paste -sd, <<<"$kept"
}

profiled() { # VARIANT...
    local code=0 variants
    read -ra variants <<<"$(here "$*")"
    within "$until" "$python" -m benchmarks.steps "${variants[@]}" "${tiny_bench[@]}" \
        >"$out/profile.txt" 2>"$work/error" || code=1
    cat "$work/error" >>"$log"
    grep -aE 'ms a step|TB/s|failed' "$out/profile.txt" | tee -a "$log" ||
        say "$(last_line "$work/error")"
    return $code
}

train() { # EPOCHS FLAGS...: begun or gone on with, to the end or as long as there is time
    local epochs=$1 run=$work/runs/$name status=0 where=() flags seconds
    shift
    seconds=$(($(left "$until") - spare))
    [ "$seconds" -gt "$spare" ] || return 3
    if [ -n "$quick" ]; then
        epochs=3
    elif [ -d "$data" ]; then
        where=(--dataset_dir "$data")
    else
        say "DATA: expected a folder with CIFAR-10 as sparsenet train takes it, found '$data'"
        return 3
    fi
    if [ -e "$run/config.json" ]; then
        flags=(--resume "$run" "${where[@]}")
    else
        rm -rf "$run"
        flags=("$@" "${where[@]}" ${data_name:+--dataset_name "$data_name"})
        flags+=(--max_epoch "$epochs" --out "$run")
    fi
    say "sparsenet train ${flags[*]}"
    training="$name $epochs"
    within "$until" "$python" -m sparsenet.cli train "${flags[@]}" --time_limit "$seconds" \
        >>"$log" 2>&1 || status=$?
    tail -n 2 "$log"
    training=
    keep "$name" "$epochs"
    [ ! -e "$work/done/$name" ] || return 0
    case $status in 0 | 124 | 137) return 3 ;; *) return 1 ;; esac
}

# NAME EPOCHS: packs a training. At its end it keeps the weights of seed 0, before that whatever
# going on needs.
keep() {
    local run=$work/runs/$1 old
    if [ "$(done_epochs "$run")" -ge "$2" ]; then
        rm -f "$run"/checkpoints/last-*
        [[ $1 == *-seed0 ]] || rm -f "$run"/checkpoints/*
        mv "$run" "$work/done"
        pack done
    elif [ -e "$run/checkpoints" ]; then
        rm -f "$run"/checkpoints/best-*
        find "$run/checkpoints" -name "last-*.json" | sort -r | tail -n +2 | while read -r old; do
            rm -f "$old" "${old%.json}.safetensors"
        done
    fi
    pack runs
}

done_epochs() { # RUN; one without a result has yet to conclude
    if [ -e "$1/result.json" ]; then echo $(($(wc -l <"$1/metrics.csv") - 1)); else echo 0; fi
}

# --- the pieces -----------------------------------------------------------------------------------

exec 3>&1
trap leave EXIT
trap 'stopped 143' TERM
trap 'stopped 130' INT
begin
environment || { say "FAILED: expected a GPU; nothing was tried"; exit 1; }

# Part one. A piece has the seconds from the UNTIL of the one before to its own for sure, and what
# was saved before on top.
piece correctness 130 correctness
if ! made correctness; then # a kernel may hang: first what needs none
    piece reference-100-24 190 record $net $plain,shared-bf16-captured --measures step,infer
fi
piece step-100-24 250 record $net $plain,shared-bf16-captured,triton-bf16,triton-bf16-captured \
    --measures step,infer
engine=triton # unless neither the tests nor the benchmark found it right
right='^.record.: "step-100-24".*"variant": "triton-bf16-captured"'
made correctness || grep -qsE "$right" "$out/bench.jsonl" || engine=shared
piece epoch-100-24 315 record $net $engine-bf16-captured --measures epoch
piece compiled-100-24 390 record $net \
    reference-bf16,$engine-bf16-captured,reference-bf16-nhwc-compiled --measures step,infer
piece densenet121 445 record densenet121 \
    torchvision-bf16-nhwc,reference-bf16-nhwc,$engine-bf16-captured \
    --batch_size 64 --measures step,infer

paper=(--preset paper --fetch sparse --depth 100 --growth_rate 24)
paper+=(--precision bf16 --implementation $engine)
# 94 and 95 %: how soon. Images grow from 16 pixels, so that early epochs are cheap.
fast=("${paper[@]}" --optimizer muon --schedule onecycle --lr 0.4 --batch_size 256 --warmup 3)
fast+=(--weight_decay 5e-4 --ema 0.995 --first_size 16)
# As the paper's in network, epochs and batch, stronger in what is seen and in how the rate falls.
strong=("${paper[@]}" --schedule cosine --warmup 5 --weight_decay 5e-4 --label_smoothing 0.1)
strong+=(--ema 0.9995 --trivial_augment true --cutout 8 --cutmix 1)
piece fast-15-seed0 515 train 15 "${fast[@]}" "${tiny_train[@]}" --seed 0
piece profile "$limit" profiled reference-bf16-nhwc $engine-bf16-captured $engine-bf16
if grep -qsE 'CUDA error|illegal memory' "$out/correctness.log"; then
    piece sanitizer "$limit" sanitized
fi

# Later calls.
[ -n "$quick" ] || least=60
for seed in "${seeds[@]}"; do
    piece fast-15-seed$seed "$limit" train 15 "${fast[@]}" "${tiny_train[@]}" --seed $seed
    piece fast-30-seed$seed "$limit" train 30 "${fast[@]}" "${tiny_train[@]}" --seed $seed
done
piece memory-100-24 "$limit" record $net \
    reference-bf16,reference-bf16-nhwc,shared-bf16-captured,$engine-bf16,$engine-bf16-captured \
    --measures parts
long=("${paper[@]}" "${tiny_train[@]}" --first_size 0 --seed 0)
piece paper-seed0 "$limit" train 300 "${long[@]}"
piece densenet-bc-seed0 "$limit" train 300 "${long[@]}" \
    --fetch dense --growth_rate 12 --bottleneck true
if [ -z "$quick" ]; then
    both=shared-bf16-captured,$engine-bf16-captured
    piece epochs-100-24 "$limit" record $net reference-bf16,$both --measures epoch
    piece first-100-24 "$limit" record $net $both,$engine-bf16 --measures first
    piece others "$limit" record $others reference-bf16,$both
    piece densenet121-memory "$limit" record densenet121 \
        torchvision-bf16,reference-bf16,$both --batch_size 64 --measures parts
    piece depth "$limit" record $net reference-bf16,$both \
        --measures none --depths 40,100,250,500,1000 --steps 3
fi
for seed in "${seeds[@]}"; do
    piece strong-seed$seed "$limit" train 300 "${strong[@]}" "${tiny_train[@]}" --seed $seed
done

yet=()
for name in "${missing[@]}"; do made "$name" || yet+=("$name"); done
echo "This call, with the newest last:"
tail -n +$((already + 1)) "$log" | grep '^== ' || true
if [ ${#yet[@]} -gt 0 ]; then
    names=$(printf '%s\n' "${yet[@]}" | sort -u | paste -sd' ')
    say "yet to be made, by a call with $out as BEFORE: $names"
fi
[ ${#failed[@]} -eq 0 ] || { say "FAILED: ${failed[*]}"; exit 1; }
[ ${#yet[@]} -eq 0 ] || exit 3
