"""csrc/constants.h says the same as constants.py; the compiler takes the one, Python the other."""

from __future__ import annotations

import re
from pathlib import Path

from hero_kernels import constants
from hero_kernels.cpu import ABI_VERSION, DTYPES

CSRC = Path(__file__).parents[2] / "csrc"


def header_constants() -> dict[str, float]:
    """Name and value of every constexpr of the header."""
    text = re.sub(r"//.*", "", (CSRC / "constants.h").read_text())
    found = {}
    for kind, names in re.findall(r"constexpr (int|float)\s+([^;]+);", text):
        for name, value in re.findall(r"(\w+) = ([^,]+)", names):
            found[name] = float(eval(value.replace("f", ""))) if kind == "float" else int(value)
    return found


def test_the_header_equals_the_module() -> None:
    header = header_constants()
    dtypes = {str(dtype).removeprefix("torch.").upper(): code for dtype, code in DTYPES.items()}
    shared = {name for name in header if hasattr(constants, name)}
    assert {name: header[name] for name in shared} == {n: getattr(constants, n) for n in shared}
    assert {name: header[name] for name in dtypes} == dtypes
    own = {name for name in header if re.fullmatch(r"(REMAINDER|LOGARITHM)_\d|LOG2_E|LN_2.*", name)}
    assert set(header) == shared | set(dtypes) | own
    assert {"JSD", "DIVERGENCE", "TOP1", "NUM_STATS", "MASKED", "WIDE_LOG_RATIO"} <= shared


def test_the_version_of_the_interface() -> None:
    assert f"#define HERO_ABI_VERSION {ABI_VERSION}\n" in (CSRC / "rows.h").read_text()
