#!/usr/bin/env bash
# Copies run folders into a folder of records, without checkpoints; of seeds above 0 no pictures.
#
#   benchmarks/publish.sh RUN... FOLDER
#
# Of the data's folder only the name is kept.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 RUN... FOLDER" >&2; exit 2; }
to=${!#}
[ ! -e "$to/config.json" ] || { echo "$to: expected a folder of records, found a run" >&2; exit 1; }
for run in "${@:1:$#-1}"; do
    if [ ! -e "$run/result.json" ]; then
        echo "$run: expected a run with a result, found none" >&2
        exit 1
    fi
    record=$to/$(basename "$run")
    mkdir -p "$record"
    cp "$run"/*.json "$run"/*.csv "$run"/*.txt "$run"/*.log "$record"
    case $record in *-seed[1-9]*) ;; *) cp "$run"/*.png "$run"/*.svg "$record" ;; esac
    sed -i -E 's|("dataset_dir": ")[^"]*/|\1|' "$record/config.json"
done
