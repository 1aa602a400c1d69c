"""Sampling by vLLM in this process, on the same device: it sleeps while the student learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hero.config import TrainConfig
from hero.engines.base import HandedWeights
from hero.models import existing_model
from hero.policy import Policy
from hero.sampling import Completion, Sampling, Stream

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM makes room for."""


class ColocatedEngine(HandedWeights):
    """vLLM's `LLM`, with a copy of the weights: the model's, and LoRA as an adapter.

    Raises:
        ValueError: vllm is not installed, or the LoRA rank is too large for it.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ValueError(
                f"engine.kind=vllm needs vllm, which cannot be imported ({error}): pip install "
                "'hero-kernels[vllm]', or set --engine.kind transformers."
            ) from error
        self.vllm, self.lora_request = vllm, LoRARequest
        super().__init__(policy, config)
        room = 2 * config.rollout.max_episode_tokens + config.reflection.max_tokens
        self.context = min(policy.context, room)
        self.adapter: Any = None
        self.sleeps, self.asleep = policy.device.type == "cuda", False
        raw = config.rollout.temperature == 1
        self.llm = vllm.LLM(
            str(existing_model(config.model.path)), seed=config.seed, max_model_len=self.context,
            dtype=str(policy.dtype).removeprefix("torch."), generation_config="vllm",
            max_num_seqs=config.rollout.batch_size, enable_sleep_mode=self.sleeps,
            gpu_memory_utilization=config.engine.memory_share,
            logprobs_mode="raw_logprobs" if raw else "processed_logprobs", **self._lora(),
        )  # fmt: skip

    def _lora(self) -> dict[str, Any]:
        if self.policy.adapter is None:
            return {}
        rank = self.config.model.lora_rank
        if rank > LORA_RANKS[-1]:
            raise ValueError(
                f"model.lora_rank={rank} is more than vLLM serves: expected at most "
                f"{LORA_RANKS[-1]}, or --engine.kind transformers."
            )
        room = next(size for size in LORA_RANKS if size >= rank)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def stream(self, rows: int, sampling: Sampling, longest: int) -> Stream:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        self.hand_over()
        return _Steps(self, sampling)

    def rest(self) -> None:
        """Weights go to the CPU's memory, keys and values are dropped."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = True

    def _read(self, folder: Path) -> None:
        if self.policy.adapter is not None:
            number = self.policy.version + 1  # vLLM counts from 1
            self.adapter = self.lora_request(f"hero-{number}", number, str(folder))
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.llm.reset_prefix_cache()


class _Steps:
    """A stream of vLLM's engine, which goes on by a token with each step."""

    def __init__(self, engine: ColocatedEngine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.rows: dict[str, int] = {}
        self.submitted = 0

    def submit(self, row: int, prompt: list[int], seed: int) -> None:
        engine, sampling = self.engine, self.sampling
        name, self.submitted = f"{id(self)}-{self.submitted}", self.submitted + 1
        self.rows[name] = row
        how = engine.vllm.SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=seed, logprobs=0,
            max_tokens=sampling.max_tokens, ignore_eos=True, detokenize=False,
            stop_token_ids=list(engine.policy.renderer.stop_ids),
        )  # fmt: skip
        engine.llm.llm_engine.add_request(
            name, {"prompt_token_ids": prompt}, how, lora_request=engine.adapter
        )

    def step(self) -> list[tuple[int, Completion]]:
        if not self.rows:
            return []
        ended = [output for output in self.engine.llm.llm_engine.step() if output.finished]
        return [
            (self.rows.pop(output.request_id), _completion(output.outputs[0]))
            for output in ended
            if output.request_id in self.rows  # else of a stream that an error has ended
        ]


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    steps = zip(output.logprobs, ids, strict=True)
    return Completion(ids=ids, logprobs=[float(step[i].logprob) for step, i in steps])
