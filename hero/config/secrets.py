"""What of the settings may be shown or stored."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, is_dataclass
from typing import Any

SECRETS = re.compile(
    r"(?<=://)[^/\s]+(?=@)"  # user:password
    r"|(?<=://)[^/\s:@]{0,99}:(?!\d+/)[^\s@]{1,299}(?=@)"  # a password with a slash in it
    r"|(?<=[?&#;])([\w.-]*(?:key|token|secret|passw(?:or)?d|pwd|pass|sig|signature|auth|code"
    r"|credentials?|jwt|session)=)[^&#\s]+"
    r"|(\b(?:api[_-]?key|authorization)[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"',&}]+"
    r"|(\bbearer\s+)[\w.~+/=-]{8,}"
    r"|\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[a-z]_\w{20,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16})",
    re.IGNORECASE,
)
"""Of addresses, of headers that a server repeats, and keys that show by how they begin."""
SECRET_NAME = re.compile(
    r"(^|[_-])(api_?keys?|key|token|passw(or)?d|passphrase|pwd|pass|pin|secret|auth|authorization"
    r"|bearer|credentials?|cookie|jwt)$",
    re.IGNORECASE,
)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def redacted(value: Any) -> Any:
    """What may be shown or stored of a text or of (nested) settings: passwords and keys are ***."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, str):
        return SECRETS.sub(lambda match: f"{match[1] or match[2] or match[3] or ''}***", value)
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {
            name: "***" if item and is_secret(name, item) else redacted(item)
            for name, item in value.items()
        }
    return value


def check_variable(option: str, name: str) -> None:
    """Raise a ValueError, which does not repeat it, if `name` may be a key and no variable's."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) and name not in os.environ:
        raise ValueError(
            f"{option} must be the name of an environment variable, such as OPENAI_API_KEY; got "
            f"{len(name)} characters that are none, and may be the key itself: they are not shown. "
            "Export the key, and name its variable."
        )


def is_secret(name: Any, value: Any = "") -> bool:
    """Whether a value of this name is; numbers too, as which a password of digits is read."""
    named = SECRET_NAME.search(CAMEL.sub("_", str(name)))
    return bool(named) and not isinstance(value, dict | bool)
