"""Builds the row kernels in C++, `hero_kernels/_C.abi3.so`, and CUDA, `hero_kernels/_cuda.abi3.so`;
everything else is in pyproject.toml.

Both are plain C libraries without torch or Python headers: they build in seconds, under build
isolation too, and one file serves every version of both. Where they cannot be built, hero_kernels
runs on its torch and Triton implementations. HERO_BUILD_CPP=1 and HERO_BUILD_CUDA=1 turn that into
an error, 0 does not try; the default is auto, which for CUDA depends on nvcc (on PATH, or under
CUDA_HOME).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
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


# Machine code for A100, H100 and B200 and their families, and PTX for what comes between and after.
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a", "compute_90")
CUDA_SOURCE = "csrc/cuda/divergence_rows.cu"


class BuildRowKernel(build_ext):
    """Compiles the C++ kernels for every instruction set and the CUDA kernel for every target;
    warns where it cannot."""

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name == "hero_kernels._cuda"
        variable = "HERO_BUILD_CUDA" if is_cuda else "HERO_BUILD_CPP"
        kernel = "CUDA row kernel" if is_cuda else "C++ row kernel"
        try:
            if is_cuda:
                self._compile_cuda_if_changed(ext)
            else:
                self._compile_and_link(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if not ext.optional:
                raise SystemExit(
                    f"{variable}=1, but the {kernel} cannot be built: {error}"
                ) from error
            # A library of older sources must not stay in place of the one that failed.
            for built in self._places(ext):
                built.unlink(missing_ok=True)
            consequence = (
                "GPUs are served by Triton. Install nvcc"
                if is_cuda
                else "hero_kernels uses its torch implementation, which is slower on CPU. Install "
                "a C++ compiler"
            )
            print(
                f"WARNING: the {kernel} was not built ({error}). {consequence} and install again; "
                f"{variable}=1 turns this warning into an error.",
                file=sys.stderr,
            )

    def _places(self, ext: Extension) -> list[Path]:
        """Where this build puts the library, and where an editable install keeps it."""
        paths = self.get_ext_fullpath(ext.name), ext.name.replace(".", "/") + ".abi3.so"
        return [Path(path).absolute() for path in paths]

    def _compile_cuda_if_changed(self, ext: Extension) -> None:
        """Minutes of nvcc only where no library built before carries these sources' checksum, which
        is appended to it: times of files say nothing after a checkout or a copy."""
        nvcc = find_nvcc()
        target, kept = self._places(ext)
        cache = Path(self.build_temp, target.name).absolute()
        sources = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True).stdout)
        for path in sorted((*ext.sources, *ext.depends, __file__)):
            sources.update(Path(path).read_bytes())
        for folder in (target.parent, cache.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for built in (cache, kept):
            if built.exists() and built.read_bytes().endswith(sources.digest()):
                if built != target:
                    shutil.copy2(built, target)
                return
        self._compile_cuda(nvcc, cache)
        with open(cache, "ab") as library:
            library.write(sources.digest())
        shutil.copy2(cache, target)

    def _compile_cuda(self, nvcc: str, target: Path) -> None:
        command = [nvcc, "-shared", "-O3", "-std=c++17", "--cudart=static", "-Xcompiler=-fPIC"]
        command.append(f"--threads={min(len(CUDA_TARGETS), os.cpu_count() or 1)}")
        for name in cuda_targets(nvcc):
            virtual = name.replace("sm_", "compute_")
            command.append(f"--generate-code=arch={virtual},code={name}")
        done = subprocess.run(
            [*command, CUDA_SOURCE, "-o", target], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise CompileError(f"{nvcc} failed: " + "; ".join(lines[:5]))

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
            ["csrc/cpu/divergence_rows.cpp"],
            output_dir=self.build_temp,
            macros=x86,
            extra_postargs=flags,
        )
        objects += self._compile_gemm(flags)
        for name, isa_flags in INSTRUCTION_SETS.items():
            objects += self.compiler.compile(
                ["csrc/cpu/row_kernel.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("HERO_ROW_FUNCTION", f"hero_row_{name}")],
                extra_postargs=[*flags, *isa_flags],
            )
        return objects

    def _compile_gemm(self, flags: list[str]) -> list[str]:
        """The bf16 products, or their stubs where the compiler does not know the instructions."""
        for macros in (GEMM_MACROS, []):
            try:
                return self.compiler.compile(
                    ["csrc/cpu/bf16_gemm.cpp"],
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


class BuildFromNothing(build):
    """What an earlier build left, a library that is not asked for or a deleted module, stays out of
    the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def find_nvcc() -> str:
    """Path of nvcc: under CUDA_HOME if that is set, else on PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise CompileError(f"there is no nvcc {f'in {home}/bin' if home else 'on PATH'}")
    return nvcc


def cuda_targets(nvcc: str) -> list[str]:
    """Those of CUDA_TARGETS that this nvcc knows."""
    done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    known = done.stdout.split()
    if "compute_90" not in known:
        raise CompileError(f"{nvcc} does not know compute_90: CUDA 11.8 or newer is needed")
    return [name for name in CUDA_TARGETS if name.replace("sm_", "compute_").rstrip("a") in known]


def setting(variable: str) -> str:
    """The value of HERO_BUILD_CPP or HERO_BUILD_CUDA."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 1 or 0, got {value!r}.")
    return value


BUILD_CPP, BUILD_CUDA = setting("HERO_BUILD_CPP"), setting("HERO_BUILD_CUDA")
SHARED = sorted(map(str, Path("csrc").glob("*.h")))
row_kernel = Extension(
    "hero_kernels._C",
    sources=sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
    depends=[*SHARED, *sorted(map(str, Path("csrc/cpu").glob("*.h")))],
    py_limited_api=True,  # names the file _C.abi3.so: it holds no Python
    optional=BUILD_CPP != "1",
)
cuda_row_kernel = Extension(
    "hero_kernels._cuda",
    sources=[CUDA_SOURCE],
    depends=[*SHARED, *sorted(map(str, Path("csrc/cuda").glob("*.h")))],
    py_limited_api=True,
    optional=BUILD_CUDA != "1",
)
setup(
    ext_modules=[row_kernel] * (BUILD_CPP != "0") + [cuda_row_kernel] * (BUILD_CUDA != "0"),
    cmdclass={"build": BuildFromNothing, "build_ext": BuildRowKernel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
