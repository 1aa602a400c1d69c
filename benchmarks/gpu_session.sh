#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes:
#
#     bash benchmarks/gpu_session.sh [--dry-run]
#
# build, correctness against fp64, compute-sanitizer, ceilings of the machine, benchmarks. Logs and
# JSON go to $OUT (default benchmarks/results). Each stage has a time limit of its own, and a stage
# that fails does not keep the others from running; the exit status is 1 if any did.
#
#     OUT      folder for logs and results
#     PYTHON   interpreter with torch (default python3)
#     WHEELS   folder of wheels to put on the path first, for a machine without a package index
#
# --dry-run needs no GPU: it takes tiny shapes and the CPU's implementation, and prints the commands
# of the stages that need one.
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
out="${OUT:-benchmarks/results}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
log="$out/session.log"
: >"$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Contestants of very different appetites share one allocator.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

failed=()

# stage NAME SECONDS COMMAND...: run it, log it, remember whether it failed.
stage() {
    local name="$1" limit="$2" started=$SECONDS status
    shift 2
    echo "== $name (at most $limit s): $*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        failed+=("$name: over its limit of $limit s")
    elif [ "$status" -ne 0 ]; then
        failed+=("$name: exit status $status")
    fi
    echo "== $name: status $status after $((SECONDS - started)) s" | tee -a "$log"
}

# gpu_stage: the same, but only shown in a dry run.
gpu_stage() {
    if $dry_run; then
        echo "== $1, not in a dry run: ${*:3}" | tee -a "$log"
    else
        stage "$@"
    fi
}

if $dry_run; then
    size=tiny cases=dry-run seconds=0 contestants=hero,eager more=(--skip-memory)
    ceilings=(--dry-run)
else
    size=full cases=gpu seconds=4 more=() ceilings=()
    contestants=hero,hero-own-head,eager,liger-fused,liger-chunked,trl-chunked
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "No CUDA device: run this on a GPU machine, or with --dry-run." | tee -a "$log" >&2
        exit 1
    fi
    nvidia-smi 2>&1 | tee -a "$log"
fi
if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    export PYTHONPATH="$PYTHONPATH:$site"
    stage wheels 30 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --target "$site" "$WHEELS"/*.whl
fi

# Only our kernel is instrumented; torch's own would take the whole session.
sanitizer=(compute-sanitizer --kernel-name kns=_divergence_rows_kernel --error-exitcode 1)
check=("$python" -m benchmarks.gpu_check)

gpu_stage build 45 env HERO_BUILD_CPP=1 "$python" setup.py build_ext --inplace
stage check 100 "${check[@]}" --size "$size" --out "$out/check.json"
gpu_stage memcheck 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer[@]}" --tool memcheck "${check[@]}" --size tiny
gpu_stage racecheck 50 "${sanitizer[@]}" --tool racecheck "${check[@]}" --size tiny
stage ceilings 20 "$python" -m benchmarks.yardsticks --out "$out/ceilings.json" "${ceilings[@]}"
benchmark=("$python" -m pytest benchmarks -p no:cacheprovider --cases "$cases")
stage benchmarks 180 "${benchmark[@]}" --contestants "$contestants" --seconds "$seconds" \
    --results "$out/benchmark.json" "${more[@]}"
# Compiling takes longer than all the rest: one case.
gpu_stage compiled 60 "${benchmark[@]}" -k qwen3-4b_8192_bfloat16_jsd_100_trained --seconds 4 \
    --contestants hero,compiled,auto-chunked,liger-chunked-compiled --results "$out/compiled.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED %s\n' "${failed[@]}" | tee -a "$log"
    exit 1
fi
echo "All stages passed; results in $out" | tee -a "$log"
