"""What the method needs of any library that rolls out by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hero.checks import from_dict
from hero.config import LossConfig, PromptStyle, ReflectionConfig, Settings, TeacherConfig
from hero.config.kinds import CountOrZero
from hero.renderer import Renderer


@dataclass(kw_only=True)
class MethodConfig(Settings):
    """The settings of the method itself; all others are the library's own."""

    mode: Literal["hero", "env_only", "reflection_only", "terminal"] = "hero"
    """What the teacher sees and which turns are trained (docs/method.md)."""
    prompts: PromptStyle = "standard"
    """Wording of what teachers and reflectors read."""
    reflection: ReflectionConfig = field(default_factory=lambda: ReflectionConfig(retries=0))
    """Without further calls for a reflection that cannot be read: with vLLM on several processes
    all of them have to call as often."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    max_idle_updates: CountOrZero = 5
    """As in `hero train`: stop after so many updates in a row with nothing to learn; 0 goes on."""


def checked(method: MethodConfig) -> MethodConfig:
    """The same settings, each within its bounds; nested ones may be dictionaries.

    Raises:
        TypeError: something else.
        ValueError: a setting that is unknown, out of its bounds, or of `hero train` alone.
    """
    if not isinstance(method, MethodConfig):
        raise TypeError(f"method must be a MethodConfig, got {method!r}.")
    found = from_dict(asdict(method), MethodConfig)
    if found.teacher.refresh != "never":
        raise ValueError(
            f"teacher.refresh={found.teacher.refresh} is of hero train alone, which evaluates by "
            "itself: expected 'never', or set teacher.weights='ema'."
        )
    return found


class WholeRenderer(Renderer):
    """With the template and the options of a library that tokenises prompts as a whole."""

    def __init__(self, tokenizer: Any, template: str | None, options: Mapping[str, Any]) -> None:
        self.template_options = {**options, "chat_template": template}
        super().__init__(tokenizer)

    def branch_at(self, prompt_ids: Sequence[int]) -> int:
        """Where the content of a prompt's last message ends.

        Tokenised as a whole, the first characters of the template behind it (a newline) may be one
        token with the content's last ones: then it ends where the template's first special token
        stands.
        """
        prompt = tuple(prompt_ids)
        for _, close, _ in reversed(self._last.values()):
            special = [i for i, token in enumerate(close) if token in self._marks]
            for start in (0, *special[:1]):
                if prompt[-len(close) + start :] == close[start:]:
                    return len(prompt) - len(close) + start
        return super().branch_at(prompt_ids)  # which says what is wrong

    @property
    def _marks(self) -> set[int]:
        return set(self.tokenizer.added_tokens_decoder)


def spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones."""
    edges = [0, *(int(value != 0) for value in mask), 0]
    starts = [i for i in range(len(mask)) if edges[i + 1] > edges[i]]
    ends = [i for i in range(1, len(mask) + 1) if edges[i + 1] < edges[i]]
    return list(zip(starts, ends, strict=True))
