#!/usr/bin/env bash
# What needs a GPU, in parts that each end within LIMIT and can be continued by another call.
#
#   benchmarks/gpu.sh OUT correctness|bench|evidence|all [BEFORE]
#
# Leaves in OUT a few files of at most 15 MiB: correctness.log; bench.log and bench.tar.gz (a folder for each
# record); evidence.log and the run folders as runs.tar.gz.aa, .ab, ... BEFORE, by default OUT itself, is a folder that an
# earlier call left: records that it holds are not made again, and its runs go on.
#
#   DATA=folder     CIFAR-10 for the evidence (any --dataset_dir of sparsenet train); DATA_NAME: its name in reports
#   LIMIT=520       seconds for each part
#   QUICK=1         tiny networks, any device: proves that this script works
#   PYTHON=python3  with torch; the package is taken from src/, it need not be installed
set -euo pipefail

usage() {
    echo "usage: $0 OUT correctness|bench|evidence|all [BEFORE]" >&2
    exit 2
}

[ $# -ge 2 ] && [ $# -le 3 ] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
part=$2
before=$(cd "${3:-$1}" && pwd)
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "$script")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
limit=${LIMIT:-520}
quick=${QUICK:-}

begin() { # NAME: a log of its own for what this part prints
    exec > >(tee "$out/$1.log") 2>&1
    end=$((SECONDS + limit))
    echo "$1: $(date -u +%FT%TZ), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo no GPU)"
}

left() { echo $((end > SECONDS ? end - SECONDS : 0)); }

correctness() {
    begin correctness
    local tests=(tests/test_triton.py tests/test_step.py tests/test_ops.py)
    [ -z "$quick" ] || tests=(tests/test_topology.py)
    timeout -k 10 "$(left)" "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
}

record() { # NAME FLAGS...: made unless it is there already, as long as there is time
    local name=$1 began=$SECONDS
    shift
    if [ -e "$out/bench/$name/bench.json" ]; then
        echo "== $name: made before"
    elif [ "$(left)" -lt 20 ]; then
        missing+=("$name")
    else
        echo "== $name: sparsenet bench $*"
        if timeout -k 10 "$(left)" "$python" -m sparsenet.cli bench "$@" --out "$out/bench/$name"; then
            echo "== $name: $((SECONDS - began)) s"
        else
            missing+=("$name")
            echo "== $name: no result after $((SECONDS - began)) s"
        fi
    fi
}

networks() {
    local engines=shared-bf16-captured,triton-bf16-captured
    record step-100-24 --measures step,infer,memory --memory
    record epoch-100-24 --variants $engines --measures epoch --best_batch
    record first-100-24 --variants $engines,triton-bf16 --measures first
    record densenet121 --model densenet121 --batch_size 128 --measures step,infer,memory --memory \
        --variants torchvision-bf16,torchvision-bf16-nhwc,torchvision_efficient-bf16,reference-bf16,$engines \
        --variants triton-bf16,triton-bf16-lean-captured
    record others --model sparsenet_40_12,sparsenet_bc_100_24,densenet_bc_100_12 --precision bf16
    record depth --measures none --depths 40,100,250,500,1000 --steps 3 --variants reference-bf16,$engines
    record best-100-24 --measures none --best_batch --variants reference-bf16,reference-bf16-nhwc
    # last: compiling takes minutes, and where it does not end in time, this alone is missing
    record compiled-100-24 --measures step,infer,memory \
        --variants reference-fp32,reference-bf16,reference-bf16-nhwc-compiled,$engines
}

bench() {
    begin bench
    missing=()
    if [ -e "$before/bench.tar.gz" ]; then tar xzf "$before/bench.tar.gz" -C "$out"; fi
    mkdir -p "$out/bench"
    if [ -n "$quick" ]; then
        local tiny=(--batch_size 2 --image_size 8 --steps 1 --device cpu)
        record step --model sparsenet_40_12 "${tiny[@]}" --measures step --variants reference-fp32,shared-fp32
        record depth --measures none --depths 7,10 "${tiny[@]}" --variants shared-fp32
    else
        networks
    fi
    tar czf "$out/bench.tar.gz" -C "$out" bench
    rm -r "$out/bench"
    [ ${#missing[@]} -eq 0 ] || { echo "missing: ${missing[*]}; call again with $out as BEFORE"; return 1; }
}

evidence() {
    begin evidence
    missing=()
    if [ ! -d "$out/runs" ] && [ -e "$before/runs.tar.gz.aa" ]; then cat "$before"/runs.tar.gz.?? | tar xz -C "$out"; fi
    mkdir -p "$out/runs"
    if [ -n "$quick" ]; then
        train paper 3 --dataset digits --depth 7 --growth_rate 4 --device cpu
        train strong 2 --dataset digits --depth 7 --growth_rate 4 --device cpu --ema 0.9 --trivial_augment true
    elif [ -d "${DATA:-}" ]; then
        runs
    else
        echo "DATA: expected a folder with CIFAR-10 as sparsenet train takes it, found '${DATA:-}'"
        return 1
    fi
    tar cz -C "$out" runs | split -b 15M - "$out/new."
    rm -rf "$out"/runs.tar.gz.?? "$out/runs" # an archive may have had more parts than its successor
    for part in "$out"/new.??; do mv "$part" "$out/runs.tar.gz.${part##*.}"; done
    [ ${#missing[@]} -eq 0 ] || { echo "not at their end: ${missing[*]}; call again with $out as BEFORE"; return 1; }
}

runs() {
    local data=(--preset paper --dataset_dir "$DATA" ${DATA_NAME:+--dataset_name "$DATA_NAME"})
    local net=(--fetch sparse --depth 100 --growth_rate 24) seed
    # 94 and 95 %: how soon. Images grow from 16 pixels, so that early epochs are cheap.
    local fast=(--schedule onecycle --lr 0.4 --batch_size 256 --warmup 3 --weight_decay 5e-4 --ema 0.995 --first_size 16)
    # As the paper's in network, epochs and batch, stronger in what is seen and in how the rate falls.
    local strong=(--schedule cosine --warmup 5 --weight_decay 5e-4 --label_smoothing 0.1 --ema 0.9995)
    strong+=(--trivial_augment true --cutout 8 --cutmix 1)
    for seed in 0 1 2; do
        train "fast-15-seed$seed" 15 "${data[@]}" "${net[@]}" "${fast[@]}" --seed $seed
        train "fast-30-seed$seed" 30 "${data[@]}" "${net[@]}" "${fast[@]}" --seed $seed
    done
    train paper-seed0 300 "${data[@]}" "${net[@]}" --batch_size 64 --drop_1 150 --drop_2 225
    train densenet-bc-seed0 300 "${data[@]}" --fetch dense --depth 100 --growth_rate 12 --bottleneck true
    for seed in 0 1 2; do train "strong-seed$seed" 300 "${data[@]}" "${net[@]}" "${strong[@]}" --seed $seed; done
}

train() { # NAME EPOCHS FLAGS...: begun, resumed, or left alone where it is at its end, as long as there is time
    local name=$1 epochs=$2 run=$out/runs/$1 began=$SECONDS spare=25
    shift 2
    local flags=("$@" --max_epoch "$epochs" --out "$run") where=()
    if [ "$(done_epochs "$run")" -ge "$epochs" ]; then
        echo "== $name: made before"
        return
    elif [ "$(left)" -lt 60 ]; then
        missing+=("$name")
        return
    elif [ -e "$run/config.json" ]; then
        if [ -z "$quick" ]; then where=(--dataset_dir "$DATA"); fi
        flags=(--resume "$run" "${where[@]}")
    fi
    echo "== $name: sparsenet train ${flags[*]}"
    timeout -k 10 "$(left)" "$python" -m sparsenet.cli train "${flags[@]}" --time_limit $(($(left) - spare)) || true
    thin "$run"
    echo "== $name: $(done_epochs "$run") of $epochs epochs after $((SECONDS - began)) s more"
    [ "$(done_epochs "$run")" -ge "$epochs" ] || missing+=("$name")
}

done_epochs() { # RUN; one without a result has yet to conclude
    if [ -e "$1/result.json" ]; then echo $(($(wc -l <"$1/metrics.csv") - 1)); else echo 0; fi
}

thin() { # RUN: what has to be carried: the newest checkpoints only, and of a run at its end the best one only
    local kind
    for kind in last best; do
        find "$1/checkpoints" -name "$kind-*.json" 2>/dev/null | sort -r | tail -n +2 | while read -r old; do
            rm -f "$old" "${old%.json}.safetensors"
        done
    done
    if [ "$(done_epochs "$1")" -ge "$epochs" ]; then rm -f "$1"/checkpoints/last-*; fi
}

case $part in
    correctness | bench | evidence) "$part" ;;
    all)
        failed=0
        for each in correctness bench evidence; do
            "$script" "$out" "$each" "$before" || failed=1
        done
        exit $failed
        ;;
    *) usage ;;
esac
