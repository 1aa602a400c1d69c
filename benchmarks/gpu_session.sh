#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes:
#
#     bash benchmarks/gpu_session.sh [--dry-run]
#
# The most valuable comes first. Within the first minute it is known which kernels launch, which are
# right on three shapes, and what one call takes. Then: build, the same for what was built, every
# implementation against fp64, the table of benchmarks, implementations compared, the tests for a
# GPU, compute-sanitizer, a sweep over the number of tokens, ncu, compiled contestants. Each stage
# has a time limit of its own and the session one for all, so that what overruns takes time from the
# last stages only. A stage that fails does not keep the others from running; the exit status is 1
# if any did. Files are complete at any time, and session.json is written after every stage.
#
# Logs and JSON go to $OUT (default benchmarks/results/gpu):
#     session.log, session.json     what was printed, ncu's sections included; stages with status
#     first.json, first-cuda.json   launch, errors and time of one call
#     check.json                    errors and limits of the checks
#     loops.json                    rollouts and whole steps beside plain loops
#     benchmark.json, comparison.json, sweep.json, compiled.json
#                                   for `python -m benchmarks.report`
#
#     OUT      folder for logs and results
#     PYTHON   interpreter with torch (default python3)
#     WHEELS   folder of wheels to put on the path first, for a machine without a package index
#
# Wheels for the packages that are compared (Python 3.12 there; by their METADATA and imports):
#     liger_kernel 0.8.5               imports torch and triton only
#     trl 1.16.0                       imports transformers, accelerate, pandas, pyarrow, psutil,
#                                      jinja2, pyyaml, rich, peft (if installed), and datasets
#     datasets 5.2.0, dill 0.4.1, multiprocess 0.70.19
#                                      what trl needs and torch's usual companions lack; they import
#                                      pandas, pyarrow, fsspec, xxhash, httpx, huggingface_hub
# 3 MB in all. Without them those contestants are skipped, with the reason. The stage "loops" runs
# the training loop and fails without its packages: tyro, docstring-parser, typeguard, pydantic,
# pydantic-core, annotated-types, typing-inspection, rapidfuzz, json-repair and bm25s (7 MB), beside
# transformers, accelerate, tokenizers, pyyaml, rich and jinja2. The benchmarks themselves need
# pytest; pytest-xdist makes the tests faster.
#
# --dry-run needs no GPU: it takes tiny shapes and the CPU's implementations (after the first look
# all in one process), and prints the commands of the stages that need one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run=false
case "${1:-}" in
--dry-run) dry_run=true ;;
"") ;;
*)
    echo "usage: bash benchmarks/gpu_session.sh [--dry-run]" >&2
    exit 2
    ;;
esac
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results/gpu}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
log="$out/session.log"
: >"$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Contestants of very different appetites share one allocator.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

session_seconds=530
patience=1 # a dry run measures nothing, and may share its machine
$dry_run && session_seconds=3000 patience=5
failed=()
stages=() # lines of session.json

say() { echo "$*" | tee -a "$log"; }

# run NAME SECONDS COMMAND...: run it within its limit and the session's, log it, set $problem.
run() {
    local name="$1" limit="$2" started=$SECONDS status
    local left=$((session_seconds - SECONDS))
    shift 2
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        problem="$name: not run, no time is left"
        say "== $problem"
        record "$name" null 0
        return
    fi
    say "== $name (at most $limit s): $*"
    timeout --kill-after=3 $((limit * patience)) "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    problem=
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        problem="$name: over its limit of $limit s"
    elif [ "$status" -ne 0 ]; then
        problem="$name: exit status $status"
    fi
    say "== $name: status $status after $((SECONDS - started)) s, $SECONDS s in all"
    record "$name" "$status" $((SECONDS - started))
}

# record NAME STATUS SECONDS: one more stage in session.json, which is never half written.
record() {
    stages+=("  {\"stage\": \"$1\", \"status\": $2, \"seconds\": $3}")
    local IFS=$'\n'
    printf '[\n%s\n]\n' "$(sed '$!s/$/,/' <<<"${stages[*]}")" >"$out/.session.json"
    mv "$out/.session.json" "$out/session.json"
}

# stage NAME SECONDS COMMAND...: run it, remember whether it failed.
stage() {
    run "$@"
    [ -n "$problem" ] && failed+=("$problem")
}

# gpu_stage: the same, but only shown in a dry run.
gpu_stage() {
    if $dry_run; then
        say "== $1 (at most $2 s), not in a dry run: ${*:3}"
    else
        stage "$@"
    fi
}

# optional_gpu_stage: the same, but its failure does not count as the session's.
optional_gpu_stage() {
    if $dry_run; then
        say "== $1 (at most $2 s), not in a dry run: ${*:3}"
    else
        run "$@"
        [ -n "$problem" ] && say "OPTIONAL $problem"
    fi
}

compared=hero-triton,hero-cuda,hero-split
# Rounding to 16 bits passes the limit of 0.3 % for one seed in fifty where tensors are tiny (67 rows).
if $dry_run; then
    export OMP_NUM_THREADS=1 # tiny shapes: threads would only wait for each other
    size=smallest table=dry-run comparison=dry-run sweep=dry-run-sweep seconds=0
    contestants=hero,eager more=(--skip-memory) first=() processes=(--one-process --seed 0)
else
    size=full table=gpu comparison=comparison sweep=sweep seconds=2
    contestants=hero,hero-own-head,eager,chunked,liger-fused,liger-chunked,trl-chunked
    more=() processes=() first=(--subjects "triton,triton-split")
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        say "No CUDA device: run this on a GPU machine, or with --dry-run." >&2
        exit 1
    fi
    nvidia-smi 2>&1 | tee -a "$log"
fi
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    export PYTHONPATH="$PYTHONPATH:$site"
    stage wheels 20 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --target "$site" "$WHEELS"/*.whl
fi

jobs=() # most of the time of the tests goes into compiling kernels
"$python" -c 'import xdist' 2>/dev/null && jobs=(-n 8)
look=("$python" -m benchmarks.gpu_check --first-look)
check=("$python" -m benchmarks.gpu_check --quiet --groups)
exact=rows,operation,logprobs,behaviour
benchmark=("$python" -m pytest benchmarks/test_divergence.py -p no:cacheprovider "${more[@]}")
# Only our kernels are instrumented; torch's own would take the whole session.
mapfile -t kernels < <(sed -nE 's/^def (\w+_kernel)\(.*/\1/p' hero_kernels/triton/*.py)
kernels+=(divergence_rows) # part of the name of the row kernel in CUDA
sanitizer=(compute-sanitizer --error-exitcode 1 --print-limit 20)
for kernel in "${kernels[@]}"; do
    sanitizer+=(--kernel-name "kns=$kernel")
done

stage first 60 "${look[@]}" "${first[@]}" --seconds $((57 * patience)) --out "$out/first.json"
gpu_stage build 65 env HERO_BUILD_CPP=0 HERO_BUILD_CUDA=1 "$python" setup.py build_ext --inplace
gpu_stage first-cuda 20 "${look[@]}" --subjects cuda --seconds 18 --out "$out/first-cuda.json"
stage check 80 "${check[@]}" "$exact,large" "${processes[@]}" --seconds $((77 * patience)) --size "$size" \
    --out "$out/check.json"
stage benchmarks 100 "${benchmark[@]}" --cases "$table" --seconds "$seconds" \
    --contestants "$contestants" --results "$out/benchmark.json"
stage comparison 45 "${benchmark[@]}" --cases "$comparison" --seconds "$seconds" \
    --contestants "hero,$compared" --results "$out/comparison.json"
gpu_stage tests 70 "$python" -m pytest tests/hero_kernels -p no:cacheprovider "${jobs[@]}" \
    -k '(triton or cuda or gpu) and not (interpreter or compile or emulator)'
gpu_stage memcheck 28 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer[@]}" --tool memcheck "${check[@]}" "$exact" --one-process --size smallest --seed 0
gpu_stage racecheck 28 "${sanitizer[@]}" --tool racecheck "${check[@]}" "$exact" \
    --one-process --size smallest --seed 0
stage sweep 40 "${benchmark[@]}" --cases "$sweep" --seconds 0 --call-limit 600 \
    --contestants hero,eager --results "$out/sweep.json"
# In what time is left: rollouts and whole steps beside plain loops, then what ncu sees. Compiling
# takes longer than all the rest: one case.
optional_gpu_stage loops 60 "$python" -m pytest benchmarks/test_rollout.py benchmarks/test_step.py \
    -p no:cacheprovider --results "$out/loops.json"
optional_gpu_stage ncu 30 ncu --set basic \
    --kernel-name "regex:$(IFS='|' && echo "${kernels[*]}")" --filter-mode per-launch-config \
    --launch-count 1 --clock-control none \
    "${look[@]}" --groups one-call --one-process
optional_gpu_stage compiled 90 "${benchmark[@]}" --cases gpu --seconds 2 \
    -k qwen3-4b_8192_bfloat16_jsd_100_trained \
    --contestants hero,compiled,auto-chunked,liger-compiled --results "$out/compiled.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED %s\n' "${failed[@]}" | tee -a "$log"
    exit 1
fi
say "All stages passed; results in $out"
