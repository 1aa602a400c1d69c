"""Kinds of settings: the values that a field may take, in its type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BeforeValidator, ConfigDict

PromptStyle = Literal["standard", "compact"]
Dtype = Literal["auto", "float32", "bfloat16"]
EnvOptions = dict[str, str | int | float | bool | None]

Count = Annotated[int, Gt(0)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Chance = Annotated[float, Ge(0), Le(1)]


class Settings:
    """Unknown fields, NaN and infinities are mistakes."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def _not_greedy(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError("must be above 0: a greedy action has no probability to learn from")
    return temperature


def _inner_share(beta: float) -> float:
    if not 0 < beta < 1:
        raise ValueError(
            "must be in (0, 1): JSD tends to 0 at both ends; for the KL divergences set "
            "--loss.divergence forward_kl or reverse_kl"
        )
    return beta


def _yes_or_no(kind: Any) -> Any:
    return {True: "tasks", False: "off"}.get(kind, kind) if isinstance(kind, bool) else kind


Shuffle = Annotated[Literal["off", "tasks", "causes", "unrelated"], BeforeValidator(_yes_or_no)]
Temperature = Annotated[float, AfterValidator(_not_greedy)]
InnerShare = Annotated[float, AfterValidator(_inner_share)]
