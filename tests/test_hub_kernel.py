"""The layout for the Hugging Face Kernel Hub, loaded by the package `kernels` without a network.

Oracle: hero_kernels.reference in fp64, in another process than the loaded kernel.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hero_kernels import Objective, reference

pytest.importorskip("kernels", reason="kernels is missing: .ci/extras hub")
ROOT = Path(__file__).parents[1]

LOSSES = """
import json, sys, torch
from pathlib import Path
from kernels import get_kernel, get_local_kernel
hero = get_kernel("me/hero-kernels", version=1) if sys.argv[1] == "hub" \
    else get_local_kernel(Path(sys.argv[1]))
assert "hero_kernels" not in sys.modules
student, head, teacher = torch.load(sys.argv[2])
found = {"impl": hero.supports("cpu")}
for name in ("jsd", "forward_kl", "reverse_kl"):
    student.requires_grad_().grad = None
    loss = hero.fused_linear_divergence(student, head, teacher, divergence=name)
    loss.backward()
    found[name] = [loss.item(), student.grad.norm().item()]
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", folder], check=True)
    return folder


def run(code: str, hub: Path, owner: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, cwd=hub,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{owner}/hero-kernels={hub}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("source", ["hub", ".", "build/torch-cpu"])
def test_divergences_of_the_loaded_kernel(source: str, hub: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, head = torch.randn(33, 16), torch.randn(101, 16)
    teacher = student + 0.3 * torch.randn(33, 16)
    torch.save((student, head, teacher), tmp_path / "tensors.pt")
    printed = run(LOSSES, hub, "me", source, str(tmp_path / "tensors.pt"))
    [line] = [line for line in printed.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))
    built = (ROOT / "hero_kernels" / "_C.abi3.so").is_file() and source != "build/torch-cpu"
    assert (found.pop("impl") is None) == built
    wide = student.double().requires_grad_()
    for name, (loss, norm) in found.items():
        logits = (wide @ head.double().t(), (teacher.double() @ head.double().t()))
        both = [z.log_softmax(-1) for z in logits]
        expected = reference.divergence(both[0], both[1], Objective(divergence=name)).mean()
        (gradient,) = torch.autograd.grad(expected, wide)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_the_card_says_how_it_is_loaded(hub: Path) -> None:
    card = (hub / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    run(code, hub, "OWNER")
    built = f"torch-stable-abi210-cpu-{platform.machine()}-linux"
    listed = set(re.findall(r"`(torch-[\w-]+)`", card))
    assert listed == {path.name for path in (hub / "build").iterdir()} >= {"torch-cpu"}
    assert not (ROOT / "hero_kernels" / "_C.abi3.so").is_file() or built in listed


def test_a_folder_with_something_in_it_is_refused(hub: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "hub_kernel.py", hub], capture_output=True, text=True
    )
    assert done.returncode == 1 and "is not empty" in done.stderr
