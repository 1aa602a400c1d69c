"""docs/loss.md and docs/architecture.md tell the truth: examples, tables and formulas are run.

Oracles: plain torch for the examples, written out here; the profiler for the GEMMs; the files
themselves for the numerics and the modules. Memory: test_docs_memory.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hero_kernels.options import Design
from torch import Tensor
from torch.distributed.tensor import DTensor

import hero_kernels
from hero_kernels import KernelOptions, fused_linear_divergence, linear_logprobs, supports
from hero_kernels.backends import IMPLEMENTATIONS
from hero_kernels.gemm import takes_16_bit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import numerics  # noqa: E402

PAGE = (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")
SECTIONS = {
    title: text for title, text in re.findall(r"^##+ (.*)\n((?:(?!##).*\n?)*)", PAGE, re.MULTILINE)
}


def code(title: str, language: str = "python") -> str:
    """The one fenced block of a section."""
    [block] = re.findall(rf"```{language}\n(.*?)```", SECTIONS[title], re.DOTALL)
    return block


def table(title: str) -> list[list[str]]:
    """The cells of a section's first table, without its head."""
    lines = [line for line in SECTIONS[title].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


# Examples


def dense(student: Tensor, teacher: Tensor, weight: Tensor, kind: str = "jsd") -> Tensor:
    """[...] divergence of hidden states [..., H] in plain torch."""
    logp_s = (student @ weight.t()).log_softmax(-1)
    logp_t = (teacher @ weight.t()).log_softmax(-1).detach()
    if kind == "reverse_kl":
        return (logp_s.exp() * (logp_s - logp_t)).sum(-1)
    logp_m = ((logp_s.exp() + logp_t.exp()) / 2).log()
    return 0.5 * (logp_s.exp() * (logp_s - logp_m) + logp_t.exp() * (logp_t - logp_m)).sum(-1)


def masked_jsd(names: dict[str, Any], student: Tensor, teacher: Tensor) -> Tensor:
    return dense(student, teacher, names["head"].weight)[names["mask"]].mean()


def dense_loop(names: dict[str, Any]) -> None:
    """What the plain loop is to do."""
    trunk, head = names["trunk"], names["head"]
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=1.0)
    for _ in range(3):
        teacher = trunk(names["x"] + names["hindsight"])[0].detach()
        names["loss"] = masked_jsd(names, trunk(names["x"])[0], teacher)
        optimizer.zero_grad()
        names["loss"].backward()
        optimizer.step()


def dense_once(names: dict[str, Any]) -> None:
    trunk, x = names["trunk"], names["x"]
    teacher = trunk(x + names["hindsight"])[0].detach()
    names["loss"] = masked_jsd(names, trunk(x)[0], teacher)
    names["loss"].backward()


def dense_ppo(names: dict[str, Any]) -> None:
    trunk, head, x, mask = (names[name] for name in ("trunk", "head", "x", "mask"))
    teacher, student = trunk(x + names["hindsight"])[0].detach(), trunk(x)[0]
    logits = head(student).log_softmax(-1)
    logprobs = logits.gather(-1, names["ids"][..., None])[..., 0]
    ratio = (logprobs - (logprobs.detach() - 0.1)).exp()
    advantages = torch.randn(4, 12)  # the example's first draw after the set-up too
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    clipped = ratio.detach().clamp(max=2.0)
    per_token = policy + 0.1 * clipped * dense(student, teacher, head.weight, "reverse_kl")
    names["loss"] = per_token[mask].sum() / mask.sum()
    names["loss"].backward()


def dense_grpo(names: dict[str, Any]) -> None:
    mask = names["mask"]
    logits = names["head"](names["trunk"](names["x"])[0]).log_softmax(-1)
    logprobs = logits.gather(-1, names["ids"][..., None])[..., 0]
    entropy = -(logits.exp() * logits).sum(-1)
    ratio = (logprobs - (logprobs.detach() - 0.1)).exp()
    rewards = torch.randn(4)  # the example's first draw after the set-up too
    advantages = ((rewards - rewards.mean()) / rewards.std())[:, None]
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    names["loss"] = (policy - 0.01 * entropy)[mask].sum() / mask.sum()
    names["loss"].backward()


EXAMPLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "A plain loop": dense_loop,
    "TRL": dense_once,
    "Liger": dense_once,
    "A PPO-style loss with a value per token": dense_ppo,
    "GRPO with an entropy bonus": dense_grpo,
    "Low memory": dense_once,
    "Tensor parallelism": dense_once,
    "FSDP2": dense_once,
    "torch.compile": dense_once,
}


def test_every_example_is_tested() -> None:
    headings = re.findall(r"^### (.*)$", PAGE.split("## Drop-in examples")[1], re.MULTILINE)
    assert headings == list(EXAMPLES)
    assert PAGE.count("```python") == len(EXAMPLES) + 2  # the set-up, and what explain prints


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """Ends the process group that an example starts."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title: str) -> None:
    ours: dict[str, Any] = {}
    exec(code("Drop-in examples") + code(title), ours)
    plain: dict[str, Any] = {}
    exec(code("Drop-in examples"), plain)
    EXAMPLES[title](plain)
    torch.testing.assert_close(ours["loss"], plain["loss"], rtol=1e-4, atol=1e-7)
    for model in ("trunk", "head"):
        for got, expected in zip(ours[model].parameters(), plain[model].parameters(), strict=True):
            assert expected.grad.norm() > 0
            torch.testing.assert_close(whole(got), expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(whole(got.grad), expected.grad, rtol=1e-3, atol=1e-6)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@pytest.mark.skipif(supports("cpu") is not None, reason=f"C++ row kernel: {supports('cpu')}")
def test_what_explain_prints(capsys: pytest.CaptureFixture[str]) -> None:
    exec(code("What a call would do"), {})
    printed, shown = capsys.readouterr().out, code("What a call would do", "text")
    assert shown.count(" ms, ") == 6
    assert without_costs(printed) == without_costs(shown)


def without_costs(text: str) -> str:
    """What does not depend on the machine's rates."""
    text = re.sub(r"predicted with the costs of .*", "predicted", text)
    return re.sub(r"at once: \S+ ms,", "at once:", text)


# Tables


@pytest.mark.parametrize("row", table("Mistakes"), ids=lambda row: row[0].strip("`"))
def test_mistake(row: list[str]) -> None:
    change, error, message = row
    names: dict[str, Any] = {
        "torch": torch,
        "KernelOptions": KernelOptions,
        "h_s": torch.randn(4, 6),
        "h_t": torch.randn(4, 6),
        "head": torch.randn(20, 6),
        "ids": torch.zeros(4, dtype=torch.long),
    }
    right: dict[str, Any] = {
        "student_hidden": names["h_s"],
        "student_weight": names["head"],
        "teacher_hidden": names["h_t"],
    }
    expected = {"`ValueError`": ValueError, "`TypeError`": TypeError}[error]
    pattern = ".*".join(re.escape(part) for part in message.split(" … "))
    with pytest.raises(expected, match=pattern):
        fused_linear_divergence(**{**right, **eval(f"dict({change.strip('`')})", names)})


GEMM_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "trainable trunk and head": ("both", {}),
    "frozen head": ("trunk", {}),
    "evaluation: nothing requires grad, or `torch.no_grad()`": ("", {}),
    '`reduction="none"`, trainable head': ("both", {"reduction": "none"}),
    '`reduction="none"`, frozen head': ("trunk", {"reduction": "none"}),
    "`teacher_topk`, trainable head": ("both", {"support": "topk"}),
    '`design="sliced"`, trainable head': ("both", {"options": KernelOptions(design="sliced")}),
    '`design="sliced"`, frozen head': ("trunk", {"options": KernelOptions(design="sliced")}),
    '`design="sliced"`, evaluation': ("", {"options": KernelOptions(design="sliced")}),
    "`linear_logprobs`, trainable head": ("both", {}),
    "`linear_logprobs`, frozen head": ("trunk", {}),
}


@pytest.mark.parametrize("row", table("GEMMs"), ids=lambda row: row[0])
def test_gemms(row: list[str]) -> None:
    name, forward, backward, total = row
    trained, settings = GEMM_CALLS[name]
    hidden = torch.randn(12, 8, requires_grad=trained != "")
    weight = torch.randn(50, 8, requires_grad=trained == "both")
    ids = torch.arange(12)

    def call() -> Tensor:
        if "linear_logprobs" in name:
            return linear_logprobs(hidden, weight, ids)  # type: ignore[return-value]
        teacher: dict[str, Any] = {"teacher_hidden": torch.randn(12, 8)}
        if "teacher_topk" in name:
            teacher = {"teacher_topk": (ids[:, None], torch.full((12, 1), -1.0))}
        return fused_linear_divergence(hidden, weight, **teacher, **settings)  # type: ignore[return-value]

    loss, in_forward = products(call)
    in_backward = products(loss.sum().backward)[1] if trained else 0
    assert (in_forward, in_backward) == (int(forward), int(backward))
    assert in_forward + in_backward == int(total)


def products(function: Callable[[], Any]) -> tuple[Any, int]:
    """Its result, and how many matrix products it took; one chunk takes one for each GEMM."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile:
        result = function()
    events = profile.key_averages()
    return result, sum(e.count for e in events if e.key in ("aten::mm", "aten::addmm_"))


def test_tables_name_every_choice() -> None:
    assert [row[0].strip("`") for row in table("Options")] == [
        field.name for field in fields(KernelOptions)
    ]
    defaults = {field.name: field.default for field in fields(KernelOptions)}
    for name, default, _ in table("Options"):
        assert eval(default.strip("`")) == defaults[name.strip("`")]
    assert {design.value for design in Design} <= {row[0].strip('`"') for row in table("Designs")}
    named = {re.findall(r"`\"(\w+)\"`", row[0])[0]: row for row in table_of_implementations()}
    assert list(named) == list(IMPLEMENTATIONS)
    for name, entry in IMPLEMENTATIONS.items():
        assert ("fp64" in named[name][2]) == (torch.float64 in entry.dtypes)
        assert ("no `pointwise_clip`" in named[name][3]) == entry.dense_only
        assert (named[name][5] == "yes") == (entry.logprobs_module is not None)


def table_of_implementations() -> list[list[str]]:
    return [row for row in table("Implementations") if len(row) == 6]


# Numerics

RESULT = json.loads(numerics.RESULTS.read_text(encoding="utf-8"))


def test_numerics_table_is_that_of_its_file() -> None:
    [shown] = re.findall(
        r"<!-- numerics: benchmarks/results/numerics-cpu.json -->\n(.*?)\n<!-- end -->",
        PAGE,
        re.DOTALL,
    )
    assert shown == numerics.section(RESULT)


def test_what_the_page_says_of_16_bit_operands() -> None:
    path = numerics.RESULTS.with_name("numerics-cpu-amx.json")
    assert f"`benchmarks/results/{path.name}`" in SECTIONS["Numerics"]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["shape"] == RESULT["shape"]
    assert len(result["rows"]) == len(RESULT["rows"])
    for row in result["rows"]:
        assert 2.15e-3 < row["gradient_error"]["delta"] < 2.5e-3
        assert row["value_error"]["delta"] < 3e-6


def test_what_the_page_says_of_the_numerics() -> None:
    assert RESULT["shape"] == list(numerics.SHAPE)
    rows = RESULT["rows"]
    assert len(rows) == len(numerics.DISTANCES) * len(numerics.DIVERGENCES)
    for row in rows:
        assert row["gradient_error"]["delta"] < 2e-3 and row["value_error"]["delta"] < 1e-7
        assert row["gradient_error"]["fp32 logits"] < 2e-3
        assert row["gradient_error"]["bf16 logits"] > 1.5e-2
        assert row["gradient_error"]["bf16 logits"] > 1 or row["value"] > 2e-4
    textbook = [row["value_error"]["fp32 logits"] for row in rows if row["divergence"] == "jsd"]
    assert 0.002 < max(textbook) < 0.0035


def test_numerics_small_and_new() -> None:
    """The program itself, at a size that takes no time: the order of the three columns stands.

    Where h_s - h_t is rounded to the type that products take, a little is lost: about 1e-6 here.
    """
    rounds = takes_16_bit(torch.device("cpu"), torch.bfloat16)
    value_bound = 5e-6 if rounds else 1e-6
    rows = numerics.measure((32, 32, 512), (0.15, 5e-4))
    for row in rows:
        error = row["gradient_error"]
        assert error["delta"] < 3e-3 and error["fp32 logits"] < 3e-3 < error["bf16 logits"] / 5
        assert row["value_error"]["delta"] < value_bound < row["value_error"]["bf16 logits"]
    assert {round(torch.tensor(row["value"]).log10().item()) for row in rows} >= {-1, -2, -6}


# Architecture


@pytest.mark.parametrize("package", ["hero_kernels", "csrc", "hero"])
def test_architecture_names_every_module(package: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {package}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    named = []
    for line in re.findall(r"^    (.*)$", section, re.MULTILINE):
        names = re.split(r"   +", line)[0] + " "
        named += re.findall(r"[\w./]+(?:/|\.py|\.cpp|\.h|\.cuh?)(?= )", names)
    folder = ROOT / package
    assert [name for name in named if not (folder / name).exists()] == []
    assert len(named) == len(set(named))
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    modules = {name for name in files if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))}
    modules = {name for name in modules if not name.endswith("__init__.py")}
    folders = tuple(name for name in named if name.endswith("/"))
    assert {name for name in modules if not name.startswith(folders)} == {
        name for name in named if not name.endswith("/")
    }


def test_the_page_names_what_is_exported() -> None:
    assert [name for name in hero_kernels.__all__ if name not in PAGE] == []
