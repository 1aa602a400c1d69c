"""HERO inside verl. Oracles: hero_kernels.reference, whole logits of the shipped agent that stands
behind verl's servers here, and the signatures in the sources of the installed verl."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hero.config import LossConfig, ModelConfig, ReflectionConfig
from hero.envs.base import make_env
from hero.integrations import verl_parts
from hero.integrations.common import MethodConfig
from hero.integrations.verl_parts import HindsightTeacher, sampled_reverse_kl
from hero.policy import Policy
from hero.sampler import HFSampler, Sampling
from hero_kernels import Objective, reference

VERL = importlib.util.find_spec("verl")


@pytest.mark.parametrize("behind", [False, True], ids=["on_policy", "importance_ratio"])
def test_the_loss_is_the_sampled_reverse_kl(behind: bool) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(6, 9).double().requires_grad_(), torch.randn(6, 9).double())
    ids = torch.randint(9, (6,))
    student, teacher = (z.log_softmax(-1).gather(1, ids[:, None])[:, 0] for z in logits)
    old = student.detach() - torch.linspace(-1.0, 2.0, 6) if behind else None
    hidden = teacher.clone()
    hidden[2] = float("nan")
    losses, metrics = sampled_reverse_kl(
        student[None], hidden[None], None if old is None else old[None]
    )
    (got,) = torch.autograd.grad(losses.sum(), logits[0], retain_graph=True)
    sampled = Objective(divergence="reverse_kl", support="sampled")
    expected = reference.token_divergence(*logits, sampled, ids)
    if old is not None:
        expected = expected * (student - old).exp().clamp(max=2.0).detach()
    expected = expected * (torch.arange(6) != 2)
    (wanted,) = torch.autograd.grad(expected.sum(), logits[0])
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(got, wanted)
    assert metrics["hero/trained_rate"] == pytest.approx(5 / 6)


def test_as_an_advantage_it_is_the_gap() -> None:
    student, teacher = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, float("nan")]])
    losses, metrics = sampled_reverse_kl(student, teacher, policy_gradient=True)
    assert losses.tolist() == [[2.0, 0.0]] and metrics["hero/reverse_kl"] == 2.0


class Server:
    """What answers in the place of verl's rollout and teacher servers: the shipped agent."""

    def __init__(self) -> None:
        self.policy = Policy.load(ModelConfig(path="tiny-shop", device="cpu"))

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> Any:
        sampling = Sampling(
            max_tokens=sampling_params["max_tokens"], seed=0,
            temperature=sampling_params["temperature"],
        )  # fmt: skip
        [answer] = HFSampler(self.policy).generate([prompt_ids], sampling)
        return SimpleNamespace(token_ids=answer.ids)

    async def compute_teacher_logprobs_single(
        self, sequence_ids: list[int], routing_key: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As verl's teacher: row i is about token i + 1, the last row about nothing."""
        found = self.logprobs(sequence_ids)
        shifted = torch.cat([found[1:], torch.zeros(1)])
        return torch.tensor([*sequence_ids[1:], 0])[:, None], shifted[:, None]

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T] of each token behind those before it; 0 for the first."""
        logits = self.policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return torch.cat([torch.zeros(1), found])


def rolled_out(server: Server, task: int) -> tuple[Any, dict[str, Any]]:
    """An episode of the shop in verl's form."""
    env, renderer = make_env("shop", profile="tiny", mode="feedback"), server.policy.renderer
    name = env.tasks("train")[task]
    said, _ = env.reset(name)
    prompt = renderer.start([{"role": "user", "content": said}])
    ids: list[int] = []
    mask: list[int] = []
    reward, over, turn = 0.0, False, 0
    while not over and turn < 8:
        sampling = Sampling(max_tokens=16, seed=turn)
        [answer] = HFSampler(server.policy).generate([prompt + ids], sampling)
        seen, gain, terminated, truncated, info = env.step(renderer.decode(answer.ids))
        follows = renderer.observe(answer.ids, info["role"], seen)
        ids, mask = ids + answer.ids + follows, mask + [1] * len(answer.ids) + [0] * len(follows)
        reward, over, turn = reward + gain, terminated or truncated, turn + 1
    output = SimpleNamespace(
        prompt_ids=prompt, response_ids=ids, response_mask=mask, reward_score=reward,
        extra_fields={},
    )  # fmt: skip
    return output, {"raw_prompt": [{"role": "user", "content": said}], "index": name, "uid": "u"}


def worker_of(server: Server, **loss: Any) -> HindsightTeacher:
    worker = HindsightTeacher()
    worker.tokenizer, worker.llm_client = server.policy.tokenizer, server
    worker.teacher_server_manager, worker.teacher_key = server, "data_source"
    worker.distillation_enabled = True
    reflection = ReflectionConfig(temperature=0.0, max_tokens=256, retries=0)
    worker.hero = MethodConfig(prompts="compact", reflection=reflection, loss=LossConfig(**loss))
    return worker


def masks(server: Server, **loss: Any) -> list[list[int]]:
    """The response masks of two episodes, as the teacher leaves them."""
    worker, found = worker_of(server, **loss), []
    for task in range(2):
        output, row = rolled_out(server, task)
        given = (output, output.prompt_ids, output.response_ids, False, row)
        asyncio.run(worker._compute_teacher_logprobs(*given))
        found.append(output.response_mask)
    return found


def test_clean_turns_without_weight_are_not_trained() -> None:
    server = Server()
    hinted = masks(server, turns="hinted")
    assert masks(server, clean_turn_weight=0.0) == hinted
    assert 0 < sum(map(sum, hinted)) < sum(map(sum, masks(server)))


@pytest.mark.parametrize(
    "loss", [{"observation_weight": 0.1}, {"clean_turn_weight": 0.5}, {"divergence": "forward_kl"}]
)
def test_a_loss_that_verl_does_not_compute_is_refused(loss: dict[str, Any]) -> None:
    [(name, value)] = loss.items()
    with pytest.raises(ValueError, match=f"loss.{name}={value!r} .expected"):
        masks(Server(), **loss)


def test_the_teacher_scores_each_turn_behind_its_hindsight() -> None:
    server = Server()
    worker, trained = worker_of(server), 0
    for task in range(4):
        output, row = rolled_out(server, task)
        whole = output.prompt_ids + output.response_ids
        before = list(output.response_mask)
        asyncio.run(
            worker._compute_teacher_logprobs(
                output, output.prompt_ids, output.response_ids, False, row
            )
        )
        found = output.extra_fields["teacher_logprobs"][:, 0]
        assert found.shape == (len(whole),) and len(output.response_mask) == len(before)
        assert all(old >= new for old, new in zip(before, output.response_mask, strict=True))
        rows = [i + len(output.prompt_ids) - 1 for i, m in enumerate(output.response_mask) if m]
        assert (~found.isnan()).nonzero().flatten().tolist() == rows
        trained += bool(rows)
        trajectory = verl_parts.trajectory_of(
            SimpleNamespace(**{**vars(output), "response_mask": before}),
            output.prompt_ids, output.response_ids, row, worker._renderer,
        )  # fmt: skip
        loop = asyncio.new_event_loop()
        for sample in annotated_again(worker, trajectory, loop):
            start, number = len(sample.prompt_ids), len(sample.action_ids)
            expected = server.logprobs(sample.teacher_prompt_ids + sample.action_ids)[-number:]
            torch.testing.assert_close(found[start - 1 : start - 1 + number], expected)
            assert sample.teacher_prompt_ids != sample.prompt_ids
        loop.close()
    assert trained >= 2


def annotated_again(worker: Any, trajectory: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """The samples of an episode, reflected upon once more: greedy, so the same."""

    async def ask() -> Any:
        own = asyncio.get_running_loop()
        return await asyncio.to_thread(worker._annotated, trajectory, "", own)

    return loop.run_until_complete(ask())


def test_validation_asks_no_teacher() -> None:
    worker = HindsightTeacher()
    worker.distillation_enabled = True
    output = SimpleNamespace(extra_fields={}, response_mask=[1])
    asyncio.run(worker._compute_teacher_logprobs(output, [1], [2], True))
    assert output.extra_fields == {}


# ---- against verl's sources --------------------------------------------------------------------

needs_verl = pytest.mark.skipif(VERL is None, reason="verl is missing: .ci/extras trl")


def definitions(module: str) -> dict[str, Any]:
    """Functions, methods and classes of a module of verl by qualified name, without importing."""
    assert VERL is not None and VERL.submodule_search_locations
    path = Path(VERL.submodule_search_locations[0], *module.split(".")).with_suffix(".py")
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        for inner in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{node.name}.{inner.name}"] = inner
    return found


def parameters(function: Any) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def fields_of(node: ast.ClassDef) -> set[str]:
    return {
        item.target.id for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }  # fmt: skip


@needs_verl
def test_the_worker_method_has_verls_signature() -> None:
    theirs = definitions("experimental.agent_loop.agent_loop")
    method = theirs["AgentLoopWorker._compute_teacher_logprobs"]
    ours = list(inspect.signature(HindsightTeacher._compute_teacher_logprobs).parameters)
    assert parameters(method) == ours and isinstance(method, ast.AsyncFunctionDef)
    read = {"response_mask", "reward_score", "extra_fields", "prompt_ids", "response_ids"}
    assert read <= fields_of(theirs["AgentLoopOutput"])
    source = ast.unparse(theirs["AgentLoopWorker.__init__"])
    for name in ("tokenizer", "llm_client", "teacher_server_manager", "teacher_key",
                 "distillation_enabled"):  # fmt: skip
        assert f"self.{name}" in source, name


@needs_verl
def test_verls_servers_are_asked_as_they_want_it() -> None:
    manager = definitions("experimental.teacher_loop.teacher_manager")
    single = manager["AsyncTeacherLLMServerManager.compute_teacher_logprobs_single"]
    assert {"sequence_ids", "routing_key"} <= set(parameters(single))
    client = definitions("workers.rollout.llm_server")["LLMServerClient.generate"]
    assert {"request_id", "prompt_ids", "sampling_params"} <= set(parameters(client))
    assert "token_ids" in fields_of(definitions("workers.rollout.replica")["TokenOutput"])


@needs_verl
def test_the_loss_is_registered_as_verl_calls_it() -> None:
    """The plug-in's file, read as text: what it imports exists, and what verl passes it takes."""
    plugin = ast.parse(Path(verl_parts.__file__).with_name("verl.py").read_text(encoding="utf-8"))
    for node in plugin.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("verl."):
            there = definitions(node.module.removeprefix("verl."))
            assert {alias.name for alias in node.names} <= set(there)
    losses = definitions("trainer.distillation.losses")
    [call] = [
        node for node in ast.walk(losses["distillation_loss"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "distillation_loss_fn"
    ]  # fmt: skip
    [own] = [n for n in plugin.body if isinstance(n, ast.FunctionDef) and n.name == "hero_loss"]
    assert parameters(own) == [keyword.arg for keyword in call.keywords]
    assert {"names", "use_estimator"} <= fields_of(losses["DistillationLossSettings"])
    assert parameters(losses["register_distillation_loss"]) == ["loss_settings"]
    padding = definitions("workers.utils.padding")["no_padding_2_padding"]
    assert parameters(padding) == ["tensor", "data"]
    settings = definitions("workers.config.distillation")["DistillationLossConfig"]
    assert {"loss_max_clamp", "use_policy_gradient", "loss_mode"} <= fields_of(settings)
    manager = definitions("trainer.ppo.v1.agent_loop_tq")["AgentLoopManagerTQ.__init__"]
    assert "self.agent_loop_workers_class = AgentLoopWorkerTQ" in ast.unparse(manager)
