"""The bf16 products touch no memory beside their operands. Sanitizers see no load of AMX tiles, so
here each operand lies against pages that may not be touched, and the processor is the oracle.

That it would notice is shown by planted faults: one number more than the operand holds.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from hero_kernels import cpu_gemm

PROGRAM = """
import ctypes, itertools, json, mmap, os, sys
import torch
from hero_kernels import cpu_gemm

assert cpu_gemm.kind() != "none"  # asking it is also asking Linux for the tiles
cpu_gemm.kind = lambda: sys.argv[1]
torch.set_num_threads(1)
libc, PAGE, NOTHING = ctypes.CDLL(None), mmap.PAGESIZE, 0
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
kept = []

def against(place, rows, columns, stride, dtype):
    '''[rows, columns] that begins behind, or ends before, a page that may not be touched.'''
    count = (rows - 1) * stride + columns
    pages = -(-count * dtype.itemsize // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(start + page * PAGE, PAGE, NOTHING) == 0
    at = PAGE if place == "behind" else (pages + 1) * PAGE - count * dtype.itemsize
    kept.append(memory)
    flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=at)
    return flat.zero_().as_strided((rows, columns), (stride, 1))

def call(name, rows, hidden, vocab, store, guarded, place, **more):
    sides = {
        "hero_gemm_logits": ((rows, hidden), (vocab, hidden), (rows, vocab), hidden),
        "hero_gemm_hidden": ((rows, vocab), (vocab, hidden), (rows, hidden), vocab),
        "hero_gemm_weight": ((rows, vocab), (rows, hidden), (vocab, hidden), rows),
    }[name]
    tensors = []
    for operand, (height, width) in zip(("left", "right", "out"), sides):
        dtype = store if operand == "out" else torch.bfloat16
        if operand in guarded:
            tensors.append(against(place, height, width, width + 3, dtype))
        else:
            tensors.append(torch.zeros(height + 9, width + 99, dtype=dtype)[:height, :width])
    problem = cpu_gemm._problem(*tensors, sides[2], (sides[3], sides[3]))
    for field, number in more.items():
        setattr(problem, field, getattr(problem, field) + number)
    again = (tensors[0].data_ptr(), tensors[2].data_ptr()) if name == "hero_gemm_logits" else ()
    cpu_gemm._call(name, problem, *again)

def planted(**settings):
    if (child := os.fork()) == 0:
        call(**settings)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

NAMES = "hero_gemm_logits", "hero_gemm_hidden", "hero_gemm_weight"
SHAPES = [(1, 8, 1), (37, 45, 123), (64, 64, 128), (33, 70, 1057), (1057, 33, 31)]
plants = {"left": {"depth": 1}, "right": {"depth": 1}, "out": {"columns": 1}}
died = {
    f"{name} {operand}": planted(
        name=name, rows=37, hidden=45, vocab=123, store=torch.float32, guarded=[operand],
        place="before", **more,
    )
    for name in NAMES for operand, more in plants.items()
}
for name, shape, place in itertools.product(NAMES, SHAPES, ("before", "behind")):
    for store in [torch.float32] + [torch.bfloat16] * (name != "hero_gemm_logits"):
        call(name, *shape, store, ("left", "right", "out"), place)
print(json.dumps(died))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected as Linux does it")
@pytest.mark.parametrize("kind", ["amx", "avx512"])
def test_products_stay_within_their_operands(kind: str) -> None:
    if cpu_gemm.KINDS.index(kind) > cpu_gemm.KINDS.index(cpu_gemm.kind()):
        pytest.skip(f"this processor has no {kind}")
    done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    died: dict[str, Any] = json.loads(done.stdout)
    assert len(died) == 9 and set(died.values()) == {-signal.SIGSEGV}, died
