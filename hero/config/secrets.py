"""What of the settings may be shown or stored."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from typing import Any

SECRETS = re.compile(
    r"(?<=://)[^/\s]+(?=@)"  # user:password
    r"|(?<=[?&#;])([\w.-]*(?:key|token|secret|passw(?:or)?d|pwd|sig|signature|auth|code)=)[^&#\s]+"
    r"|(\b(?:api[_-]?key|authorization)[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s\"',&}]+"
    r"|(\bbearer\s+)[\w.~+/=-]{8,}"
    r"|\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[a-z]_\w{20,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16})",
    re.IGNORECASE,
)
"""Of addresses, of headers that a server repeats, and keys that show by how they begin."""
SECRET_NAME = re.compile(
    r"(^|[_-])(api_?key|key|token|passw(or)?d|pwd|pass|secret|auth|authorization|bearer"
    r"|credentials?|cookie)$",
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
            name: "***" if isinstance(item, str) and item and _is_secret(name) else redacted(item)
            for name, item in value.items()
        }
    return value


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(CAMEL.sub("_", name)))
