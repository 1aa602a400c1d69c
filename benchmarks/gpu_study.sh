#!/usr/bin/env bash
# The studies of a language model on a GPU, in calls of under ten minutes that go on from each other:
#
#     MODEL=DIR [WEBSHOP=DIR] bash benchmarks/gpu_study.sh [--dry-run]
#
# Runs `hero study lm-shop`, then lm-webshop and lm-bfcl. A run that is finished is kept; one that is
# cut starts again, and takes two to four minutes by estimate (no GPU was at hand). Call it until it
# says that all is finished. What was not done for want of data is named.
#
#     MODEL    folder of Qwen2.5-Coder-0.5B-Instruct, or of any causal LM with a chat template
#     WEBSHOP  folder with WebShop's files (docs/environments/webshop.md); without it that study is left out
#     STATE    folder of the studies, kept from call to call (default runs/gpu-study)
#     OUT      folder for rows, tables and logs (default benchmarks/results/gpu-study)
#     LIMIT    seconds of one call (default 560)
#     PYTHON   interpreter with torch (default python3)
#     WHEELS   folder of wheels to put on the path first, as for gpu_session.sh; also peft
#
# BFCL needs `hero envs get bfcl`; on a machine without a package index carry that folder there and
# set XDG_CACHE_HOME. A model of 1 GB reaches a machine that takes 64 MiB a call in pieces:
# `split -b 60M model.safetensors piece-` here, one piece a call, and `cat piece-* > model.safetensors`
# there. Rows and tables are a few MB.
#
# --dry-run takes the studies' small versions (`hero study --smoke`), and needs no GPU.
#
# Exit status: 0 all finished, 3 time ran out, 1 something failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=()
case "${1:-}" in
--dry-run) smoke=(--smoke) ;;
"") ;;
*)
    echo "usage: MODEL=DIR [WEBSHOP=DIR] bash benchmarks/gpu_study.sh [--dry-run]" >&2
    exit 2
    ;;
esac
if [ ! -f "${MODEL:-}/config.json" ]; then
    echo "MODEL must be the folder of a model, with its config.json; got '${MODEL:-}'." >&2
    exit 2
fi
python="$(command -v "${PYTHON:-python3}")"
limit="${LIMIT:-560}"
state="${STATE:-runs/gpu-study}" out="${OUT:-benchmarks/results/gpu-study}"
mkdir -p "$state" "$out"
state="$(cd "$state" && pwd)" out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
    export PYTHONPATH="$PYTHONPATH:$state/site"
    [ -d "$state/site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --target "$state/site" "$WHEELS"/*.whl || exit 1
fi

# The studies name the model by its hub id and the data by a folder: here both are links.
mkdir -p "$state/Qwen"
ln -sfn "$(cd "$MODEL" && pwd)" "$state/Qwen/Qwen2.5-Coder-0.5B-Instruct"
studies=(lm-shop)
if [ -n "${WEBSHOP:-}" ]; then
    ln -sfn "$(cd "$WEBSHOP" && pwd)" "$state/webshop"
    studies+=(lm-webshop)
else
    echo "lm-webshop is left out: WEBSHOP is not set."
fi
if "$python" -c 'import sys; from hero.envs.bfcl.package import data_folder; sys.exit(not data_folder().is_dir())'; then
    studies+=(lm-bfcl)
else
    echo "lm-bfcl is left out: its data is not there (hero envs get bfcl)."
fi

result=0
for study in "${studies[@]}"; do
    left=$((limit - SECONDS))
    echo "== $study, $left s left"
    [ "$left" -gt 20 ] || { result=3 && break; }
    folder="$state/$study"
    (cd "$state" && timeout --signal=INT --kill-after=10 "$left" \
        "$python" -m hero study "$study" "${smoke[@]}" --output-dir "$folder") 2>&1 | tee -a "$out/$study.log"
    status=${PIPESTATUS[0]}
    mkdir -p "$out/$study"
    (cd "$folder" && cp -r rows report* rates.json study.json "$out/$study/" 2>/dev/null)
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        result=3 && break
    fi
    [ "$status" -eq 0 ] || result=1
done
case $result in
0) echo "All finished; results in $out" ;;
3) echo "Time ran out: call it again, it goes on." ;;
*) echo "FAILED: see the logs in $out" ;;
esac
exit $result
