#!/usr/bin/env python3
"""Lay hero_kernels out for the Hugging Face Kernel Hub: .ci/hub_kernel.py FOLDER

    FOLDER/README.md                    the card
    FOLDER/build/VARIANT/metadata.json  and the package, for `kernels.get_kernel`

Variants: `torch-stable-abi210-cpu-MACHINE-linux` with the C++ library that is built here (it knows
no torch, so one file serves every version from 2.10 on), `torch-cpu` without it, and `torch-cuda`
with Triton. Each copy has a package name of its own in every line of code, so that it stands beside
an installed hero_kernels, operators included. Upload the folder as a repository of type kernel.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "hero_kernels"
VERSION = 1
"""Of the interface, as `get_kernel(..., version=1)` asks for it."""

CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernel
- distillation
- knowledge-distillation
---

# hero-kernels

Exact, fused divergences between a student and a teacher language model, from hidden states and
heads: the logits [N, V] are never whole. Jensen–Shannon, forward and reverse KL, with gradient.

```python
import torch
from kernels import get_kernel

hero = get_kernel("OWNER/hero-kernels", version={version})
head = (0.05 * torch.randn(32000, 256)).requires_grad_()   # [V, H] the lm_head, shared
student = torch.randn(64, 256, requires_grad=True)         # [N, H] last hidden states
teacher = student.detach() + 0.1 * torch.randn(64, 256)    # the same tokens, with more context
hero.fused_linear_divergence(student, head, teacher, divergence="jsd", beta=0.5).backward()
```

Functions: {functions}. `hero.integrations.trl` and `hero.integrations.liger`, imported by
`importlib.import_module(hero.__name__ + ".integrations.trl")`, take the arguments of TRL's and
Liger's functions in their order.

Builds: {variants}. On CUDA the kernels are Triton's; none of them has been timed on a GPU yet.

hero_kernels {release}, sources {digest}.
"""


def sources() -> dict[str, str]:
    """Python files of the package by their path in it."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in paths}


def write_variant(folder: Path, backend: str, files: dict[str, str], digest: str) -> None:
    identity = f"_hero_kernels_{folder.name.replace('-', '_')}_{digest}"
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"\bhero_kernels\b", identity, text), encoding="utf-8")
    metadata = {
        "id": identity, "name": "hero-kernels", "version": VERSION, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": backend},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    if folder.name.startswith("torch-stable-abi"):
        shutil.copy2(SOURCE / "_C.abi3.so", folder)


def main(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name a new folder.")
    variants = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
    if (SOURCE / "_C.abi3.so").is_file():
        variants[f"torch-stable-abi210-cpu-{platform.machine()}-linux"] = "cpu"
    else:
        print("WARNING: no _C.abi3.so is built here: no variant has it", file=sys.stderr)
    files = sources()
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:10]
    for name, backend in variants.items():
        write_variant(folder / "build" / name, backend, files, digest)
    init = files["__init__.py"]
    functions = re.findall(r'^    "([a-z_]+)",$', init, re.MULTILINE)
    [release] = re.findall(r'__version__ = "(.+)"', init)
    card = CARD.format(
        functions=", ".join(f"`{name}`" for name in functions), version=VERSION, release=release,
        variants=", ".join(f"`{name}`" for name in sorted(variants)), digest=digest,
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copy2(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
