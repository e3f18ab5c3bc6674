"""Build the package with its compiled kernels; without a C++ compiler, build it without them."""

from __future__ import annotations

import logging
import os
import platform
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("legocompress/kernels/src")
# fp-contract: a product and a sum become one instruction. psabi: no function passes a vector.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-pthread",
]
AVX512 = [
    "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512",
]  # fmt: skip
# tree-pre: with it GCC 12 writes the sums of the int8 kernels to memory in every step of their
# inner loop. uninitialized: GCC warns of its own AVX-512 intrinsics.
INT8 = ["-fno-tree-pre", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Each instruction set is a file of its own, so that no other code is compiled for it.
X86_FLAGS = {
    "kernel_avx2.cpp": ["-mavx2", "-mfma"],
    "kernel_avx512.cpp": [*AVX512, "-mfma"],
    "int8_avx2.cpp": [*INT8, "-mavx2"],
    "int8_avx_vnni.cpp": [*INT8, "-mavx2", "-mavxvnni"],
    "int8_avx512.cpp": [*INT8, *AVX512],
    "int8_avx512_vnni.cpp": [*INT8, *AVX512, "-mavx512vnni"],
    "int8_amx.cpp": [
        *INT8, *AVX512, "-mavx512vnni", "-mavx512vbmi", "-mamx-tile", "-mamx-int8",
    ],
}  # fmt: skip


class BuildKernels(build_ext):
    """Compile a plain shared library instead of a Python module: any Python loads it by ctypes."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without Python's version and ABI."""
        suffix = {"darwin": ".dylib", "win32": ".pyd"}.get(sys.platform, ".so")
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """There is no module initialiser to export."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or warn that the package works without it."""
        try:
            self.build_library(ext)
        except Exception as error:
            if os.environ.get("LEGOCOMPRESS_REQUIRE_KERNELS"):
                ext.optional = False
                raise
            logging.getLogger("legocompress").warning(
                "legocompress: no compiled kernels (%s). Everything works without them, slower; "
                "to have them, install again where g++ or clang++ is available.",
                str(error).partition("\n")[0],
            )

    def build_library(self, ext: Extension) -> None:
        """Compile each source with its own flags and link them."""
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
        objects = []
        for source in ext.sources:
            instruction_set = X86_FLAGS.get(Path(source).name, []) if x86 else []
            if not self.accepts(instruction_set):
                instruction_set = []  # then the file is compiled to nothing
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*FLAGS, *instruction_set],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread"], target_lang="c++"
        )

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler is new enough for the flags of an instruction set."""
        if not flags:
            return True
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


class TagWheel(bdist_wheel):
    """Tag the wheel for its platform and any Python 3: nothing in it is built for one version."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "legocompress.kernels._lego",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"bdist_wheel": TagWheel, "build_ext": BuildKernels},
)
