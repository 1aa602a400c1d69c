"""Correctness on a GPU, against fp64, with fresh random inputs and poisoned memory.

    python -m benchmarks.gpu_check [--size smallest|tiny|full] [--subjects triton,cuda,...]
                                   [--seed N] [--out FILE]

Every implementation and design passes all checks of `correctness.py` on its own: row kernels, the
whole operation, `linear_logprobs`, exact behaviour, more than 2^31 logits. Every check prints its
error and its limit; the exit status says whether all were kept. What a subject refuses (a type,
say) is printed with its reason, and one that refuses everything fails.

Without a GPU the same checks run what a CPU can. The seed is drawn anew for each run and printed,
to repeat one that failed.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from pathlib import Path

import torch

from benchmarks.correctness import CHECKED, CHECKS, SIZES, SUBJECTS, Check
from hero_kernels.options import Design


def chosen_subjects(text: str | None, device: str) -> list[str]:
    """The names given, or those of the device.

    Raises:
        SystemExit: a name is unknown.
    """
    if text is None:
        # A design that this build does not have yet is no failure of the others.
        return [name for name in CHECKED[device] if SUBJECTS[name].design in tuple(Design)]
    names = text.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise SystemExit(
            f"--subjects: no {', '.join(unknown)}; expected some of {', '.join(SUBJECTS)}."
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what this package computes with fp64.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--subjects", help=f"default: by device; of {', '.join(SUBJECTS)}")
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quiet", action="store_true", help="print failures only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = chosen_subjects(options.subjects, device)
    subjects = {name: SUBJECTS[name] for name in names}
    seed = secrets.randbits(31) if options.seed is None else options.seed
    torch.manual_seed(seed)
    print(f"{', '.join(names)} on {device}, seed {seed}")

    start = time.perf_counter()
    checks: list[Check] = []
    refused: dict[str, set[str]] = {name: set() for name in names}
    for group in CHECKS:
        for check in group(SIZES[options.size], device, subjects, refused):
            checks.append(check)
            if not check.passed or not options.quiet:
                print(
                    f"{'ok  ' if check.passed else 'FAIL'} {check.error:8.1e} "
                    f"(limit {check.limit:.1e})  {check.subject}: {check.name}",
                    flush=True,
                )
        if options.out:  # after every group: an error in the next must not lose them
            report = {
                "device": device,
                "seed": seed,
                "subjects": names,
                "refused": {name: sorted(reasons) for name, reasons in refused.items()},
                "checks": [{**check._asdict(), "passed": check.passed} for check in checks],
            }
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, reasons in refused.items():
        for reason in sorted(reasons):
            print(f"refused by {name}: {reason}")
    failed = sum(not check.passed for check in checks)
    idle = False
    for name in names:
        own = [check.passed for check in checks if check.subject == name]
        idle = idle or not own
        print(f"{name}: {len(own)} checks, {own.count(False)} failed" + ", none made" * (not own))
    print(f"{len(checks)} checks, {failed} failed, {time.perf_counter() - start:.0f} s")
    raise SystemExit(bool(failed or idle))


if __name__ == "__main__":
    main()
