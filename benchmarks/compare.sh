#!/usr/bin/env bash
# The comparisons in results/: many small networks, one recipe.
#
#   benchmarks/compare.sh topologies|depths|longer OUT DATA [JOBS]
#
# topologies: networks of about equal multiply-accumulates (dense ones 5 and 11 % more), 4 epochs,
# seeds 0 to 2.
# depths: 40 to 400 layers, concatenated and summed, 1 epoch of images of 16 by 16, seed 0.
# longer: SparseNet-40-12 and the dense networks of as many parameters and as many
# multiply-accumulates, 20 epochs of images that grow, seeds 0 to 2.
#
# Leaves a run folder for each network and seed in OUT, JOBS (2) at a time with one thread each.
# Called again it goes on: what has a result is left alone, what was stopped is resumed. It returns
# 1 where one has no result at the end. DATA is any --dataset_dir of sparsenet train, and
# DATA_NAME its name in reports; SEEDS replaces the seeds.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 topologies|depths|longer OUT DATA [JOBS]" >&2; exit 2; }
what=$1 out=$2 data=$3 jobs=${4:-2}
mkdir -p "$out"

sum="--aggregation sum" dense="--fetch dense"
case $what in
    topologies)
        seeds="0 1 2" recipe="--max_epoch 4 --lr 0.2 --warmup 1 --weight_decay 3e-4"
        networks=( # millions of multiply-accumulates and thousands of parameters behind each
            "sparsenet-40-12 --depth 40 --growth_rate 12"          # 78.3, 189.5
            "densenet-22-12 $dense --depth 22 --growth_rate 12"    # 82.3, 291.0
            "sparsenet-sum-40-23 $sum --depth 40 --growth_rate 23" # 78.1, 175.1
            "sparsenet-22-12 --depth 22 --growth_rate 12"          # 33.2, 79.1
            "densenet-22-8 $dense --depth 22 --growth_rate 8"      # 36.7, 131.2
            "sparsenet-sum-22-21 $sum --depth 22 --growth_rate 21" # 33.2, 74.0
        )
        ;;
    depths)
        seeds=0 recipe="--max_epoch 1 --lr 0.1 --warmup 0.25 --weight_decay 3e-4"
        recipe+=" --image_size 16 --shift 2"
        networks=()
        for depth in 40 100 202 400; do
            networks+=("sparsenet-$depth-8 --depth $depth --growth_rate 8")
            networks+=("sparsenet-sum-$depth-16 $sum --depth $depth --growth_rate 16")
            networks+=("densenet-sum-$depth-16 $sum $dense --depth $depth --growth_rate 16")
        done
        for depth in 40 100; do
            networks+=("densenet-$depth-8 $dense --depth $depth --growth_rate 8")
        done
        ;;
    longer)
        seeds="0 1 2" recipe="--max_epoch 20 --optimizer muon --lr 0.2 --first_size 16"
        recipe+=" --label_smoothing 0.1 --weight_decay 5e-4"
        networks=(
            "sparsenet-40-12 --depth 40 --growth_rate 12"          # 78.3, 189.5
            "densenet-40-5 $dense --depth 40 --growth_rate 5"      # 49.3, 189.7
            "densenet-40-6 $dense --depth 40 --growth_rate 6,7,7"  # 78.3, 326.0
        )
        ;;
    *) echo "$0: expected topologies, depths or longer, found $what" >&2; exit 2 ;;
esac
recipe+=" --preset paper --schedule onecycle --ema 0.995"

export OMP_NUM_THREADS=1

start() { # FLAGS...: as soon as fewer than JOBS are running
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
    sparsenet train "$@" &
}

data=(--dataset_dir "$data")
runs=()
for seed in ${SEEDS:-$seeds}; do
    for network in "${networks[@]}"; do
        read -r name flags <<<"$network"
        run=$out/$name-seed$seed
        runs+=("$run")
        if [ -e "$run/result.json" ]; then
            continue
        elif [ -e "$run/config.json" ]; then
            start --resume "$run" "${data[@]}"
        else
            rm -rf "$run" # a start that did not get as far as a run
            # shellcheck disable=SC2086 # flags are words
            start $flags $recipe --seed "$seed" "${data[@]}" --out "$run" \
                ${DATA_NAME:+--dataset_name "$DATA_NAME"}
        fi
    done
done
wait
failed=0
for run in "${runs[@]}"; do
    [ -e "$run/result.json" ] || { echo "$run: no result; call again to go on" >&2; failed=1; }
done
exit $failed
