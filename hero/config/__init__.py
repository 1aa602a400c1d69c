"""Every setting of a run: its default, where the default comes from, and the values it may take.

YAML recipes and command-line options fill the same fields.
"""

from hero.config.kinds import Count, Dtype, NotNegative, PromptStyle, Settings
from hero.config.parts import (
    EngineConfig,
    EnvConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ReflectionConfig,
    RolloutConfig,
    TeacherConfig,
)
from hero.config.secrets import redacted
from hero.config.sft import ScratchConfig, SftConfig
from hero.config.train import TrainConfig

__all__ = [
    "Count", "Dtype", "EngineConfig", "EnvConfig", "EvalConfig", "LossConfig", "ModelConfig",
    "NotNegative", "OptimConfig", "PromptStyle", "ReflectionConfig", "RolloutConfig",
    "ScratchConfig", "Settings", "SftConfig", "TeacherConfig", "TrainConfig", "redacted",
]  # fmt: skip
