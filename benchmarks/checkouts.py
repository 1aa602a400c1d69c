"""Two checkouts of this repository side by side, in one run on one machine.

    python -m benchmarks.checkouts OTHER [--rounds 5] [--overhead] [--output FILE]

OTHER is a checkout with its C++ library built. Each round runs both in processes of their own, in
turn; medians over rounds, and this checkout's share of the other's time within each round. What
runs on one thread is counted in processor time, which other work on the machine hardly changes;
`--overhead` measures nothing else, and takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

ROOT = Path(__file__).resolve().parents[1]

WORKER = '''
import json, os, resource, statistics, sys, time
import torch
import hero_kernels as hk
from hero_kernels import cpu
torch.manual_seed(0)

def timed(call, repeats, clock=time.perf_counter):
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def problem(rows, hidden, vocab, dtype):
    student = torch.randn(rows, hidden)
    teacher = (student + 0.1 * torch.randn(rows, hidden)).to(dtype)
    weight = (0.05 * torch.randn(vocab, hidden)).to(dtype).requires_grad_()
    return student.to(dtype).requires_grad_(), weight, teacher

def outside_of_products(arguments, repeats):
    """Seconds of a forward call less those in products and in the row kernel."""
    work = []
    def counted(function):
        def call(*arguments, **keywords):
            start = time.process_time()
            result = function(*arguments, **keywords)
            work.append(time.process_time() - start)
            return result
        return call
    library, product = cpu.library(), torch.mm
    kernel = library.hero_divergence_rows
    library.hero_divergence_rows, torch.mm = counted(kernel), counted(product)
    seconds = []
    for _ in range(repeats):
        work.clear()
        start = time.process_time()
        loss = hk.fused_linear_divergence(*arguments)
        seconds.append(time.process_time() - start - sum(work))
        del loss
    library.hero_divergence_rows, torch.mm = kernel, product
    return statistics.median(seconds)

def without_work(arguments, repeats):
    """Seconds of a forward call whose products and row kernel do nothing: caches stay warm."""
    def no_product(a, b, out=None):
        return torch.empty(len(a), b.shape[1], dtype=a.dtype) if out is None else out
    library, product = cpu.library(), torch.mm
    kernel = library.hero_divergence_rows
    library.hero_divergence_rows, torch.mm = lambda *_: 0, no_product
    seconds = timed(lambda: hk.fused_linear_divergence(*arguments), repeats, time.process_time)
    library.hero_divergence_rows, torch.mm = kernel, product
    return seconds

out = {}
tiny = problem(2, 4, 8, torch.float32)
torch.set_num_threads(1)
out["overhead of a forward call, us"] = 1e6 * timed(
    lambda: hk.fused_linear_divergence(*tiny), 800, time.process_time
)
larger = problem(64, 256, 32000, torch.float32)
out["the same at (64, 256, 32000), us"] = 1e6 * outside_of_products(larger, 30)
out["the same, products and row kernel left out, us"] = 1e6 * without_work(larger, 200)
calls = []
def record(frame, event, _):
    if event == "call" and "hero_kernels" in frame.f_code.co_filename:
        calls.append(frame.f_code.co_filename)
traced = problem(300, 32, 500, torch.float32)
hk.fused_linear_divergence(*traced)
sys.setprofile(record); hk.fused_linear_divergence(*traced); sys.setprofile(None)
out["Python calls forward"], out["files visited"] = len(calls), len(set(calls))
torch.set_num_threads(os.cpu_count())
for name in ("float32", "bfloat16") if sys.argv[1] == "all" else ():
    for kind in ("jsd", "forward_kl"):
        student, weight, teacher = problem(2048, 576, 49152, getattr(torch, name))
        def step():
            student.grad = weight.grad = None
            hk.fused_linear_divergence(student, weight, teacher, divergence=kind).backward()
        before = peak()
        out[f"{kind} {name}, ms"] = 1e3 * timed(step, 9)
        out[f"{kind} {name}, MiB more at the peak so far"] = peak() - before
print(json.dumps(out))
'''


def run(checkout: Path, part: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, part], env=environment, cwd=checkout, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{checkout} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    machine, part = describe("cpu"), "overhead" if chosen.overhead else "all"
    rounds = [(run(ROOT, part), run(chosen.other, part)) for _ in range(chosen.rounds)]
    rows: dict[str, Any] = {}
    for name in rounds[0][0]:
        ours, theirs = ([pair[i][name] for pair in rounds] for i in (0, 1))
        ratio = statistics.median(a / b if b else 0.0 for a, b in zip(ours, theirs, strict=True))
        rows[name] = {
            "this": statistics.median(ours), "other": statistics.median(theirs), "ratio": ratio,
        }  # fmt: skip
        print(f"{name:45} {rows[name]['this']:10.1f} {rows[name]['other']:10.1f} {ratio:8.2f}")
    if chosen.output:
        facts = {"machine": machine, "rounds": chosen.rounds, "rows": rows}
        chosen.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
