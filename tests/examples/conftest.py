"""The examples are imported as users do it: `PYTHONPATH=examples`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
