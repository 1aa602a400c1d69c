"""What of the settings may be shown or stored."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from typing import Any

URL_SECRETS = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|(?<=[?&])((?:api_?|access_)?(?:key|token)=)[^&\s]+"
)
SECRET_NAME = re.compile(r"(^|_)(api_?key|key|token|password|secret)$", re.IGNORECASE)


def redacted(value: Any) -> Any:
    """What may be shown or stored of a text or of (nested) settings: passwords and keys are ***."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, str):
        return URL_SECRETS.sub(lambda match: f"{match[1] or ''}***", value)
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {
            name: "***" if isinstance(item, str) and item and SECRET_NAME.search(name)
            else redacted(item)
            for name, item in value.items()
        }  # fmt: skip
    return value
