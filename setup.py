"""Builds the C++ row kernel, `hero_kernels/_C.abi3.so`; everything else is in pyproject.toml.

The kernel is a plain C library without torch or Python headers: it builds in seconds, under build
isolation too, and one file serves every version of both. Where it cannot be built, hero_kernels
runs on its torch implementation. HERO_BUILD_CPP=1 turns that into an error, 0 does not try; the
default is auto.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError, LinkError

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
# The row kernels are compiled once for each of these; the library chooses at run time.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if sys.platform == "linux" and platform.machine() == "x86_64":
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]
# The bf16 products: AMX and AVX-512 within functions marked for them, chosen at run time.
GEMM_MACROS = [("HERO_BF16_GEMM", None)] if len(INSTRUCTION_SETS) > 1 else []
# At run time the library finds torch's OpenMP already loaded and shares its threads: two pools
# would compete for the cores. Without OpenMP (Apple's clang) the kernel runs on one thread.
OPENMP_FLAGS = (["-fopenmp"], ["-fopenmp-simd"])


class BuildRowKernel(build_ext):
    """Compiles the kernels for every instruction set; warns where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_and_link(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if BUILD == "1":
                raise SystemExit(
                    f"HERO_BUILD_CPP=1, but the C++ row kernel cannot be built: {error}"
                ) from error
            # A library of older sources must not stay in place of the one that failed.
            for built in (
                self.get_ext_fullpath(ext.name),
                Path(ext.name.replace(".", "/") + ".abi3.so"),
            ):
                Path(built).unlink(missing_ok=True)
            print(
                f"WARNING: the C++ row kernel was not built ({error}). hero_kernels uses its torch "
                "implementation, which is slower on CPU. Install a C++ compiler and install again; "
                "HERO_BUILD_CPP=1 turns this warning into an error.",
                file=sys.stderr,
            )

    def _compile_and_link(self, ext: Extension) -> None:
        for openmp in OPENMP_FLAGS:
            try:
                objects = self._compile([*COMPILE_FLAGS, *openmp])
                target = self.get_ext_fullpath(ext.name)
                self.compiler.link_shared_object(
                    objects, target, extra_postargs=openmp, target_lang="c++"
                )
                return
            except (CompileError, LinkError):
                if openmp is OPENMP_FLAGS[-1]:
                    raise

    def _compile(self, flags: list[str]) -> list[str]:
        x86 = [("HERO_X86", None)] if "avx2" in INSTRUCTION_SETS else []
        objects = self.compiler.compile(
            ["csrc/divergence_rows.cpp", "csrc/logprob_rows.cpp"],
            output_dir=self.build_temp,
            macros=x86,
            extra_postargs=flags,
        )
        objects += self._compile_gemm(flags)
        for name, isa_flags in INSTRUCTION_SETS.items():
            objects += self.compiler.compile(
                ["csrc/row_kernel.cpp", "csrc/logprob_kernel.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                macros=[
                    ("HERO_ROW_FUNCTION", f"hero_row_{name}"),
                    ("HERO_LOGPROB_FUNCTION", f"hero_logprob_{name}"),
                ],
                extra_postargs=[*flags, *isa_flags],
            )
        return objects

    def _compile_gemm(self, flags: list[str]) -> list[str]:
        """The bf16 products, or their stubs where the compiler does not know the instructions."""
        for macros in (GEMM_MACROS, []):
            try:
                return self.compiler.compile(
                    ["csrc/bf16_gemm.cpp"],
                    output_dir=self.build_temp,
                    macros=macros,
                    extra_postargs=flags,
                )
            except CompileError:
                if not macros:
                    raise
                print(
                    "WARNING: this compiler has no AMX and AVX-512 bf16 instructions: the library "
                    "is built without bf16 products.",
                    file=sys.stderr,
                )
        raise AssertionError("unreachable")


BUILD = os.environ.get("HERO_BUILD_CPP", "auto")
if BUILD not in ("auto", "0", "1"):
    raise SystemExit(f"HERO_BUILD_CPP must be auto, 1 or 0, got {BUILD!r}.")

row_kernel = Extension(
    "hero_kernels._C",
    sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
    depends=sorted(map(str, Path("csrc").glob("*.h"))),
    py_limited_api=True,  # names the file _C.abi3.so: it holds no Python
    optional=BUILD != "1",
)
setup(
    ext_modules=[] if BUILD == "0" else [row_kernel],
    cmdclass={"build_ext": BuildRowKernel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
