"""Build the compiled kernels with the package; without a C++ compiler the package works without."""

from __future__ import annotations

import logging
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("legocompress/kernels/src")
# fp-contract: products and sums become one instruction. psabi: no vector crosses a function.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-pthread",
]
# Each instruction set is a file of its own, so that no other code is compiled for it.
X86_FLAGS = {
    "kernel_avx2.cpp": ["-mavx2", "-mfma"],
    "kernel_avx512.cpp": [
        "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512",
    ],
}  # fmt: skip


class BuildKernels(build_ext):
    """Compile a plain shared library, no Python module: ctypes loads it, for any Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name it without Python's version and ABI."""
        suffix = {"darwin": ".dylib", "win32": ".pyd"}.get(sys.platform, ".so")
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """There is no module initialiser to export."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Build, or say once and clearly that the package goes on without."""
        try:
            self.build_library(ext)
        except Exception as error:
            if os.environ.get("LEGOCOMPRESS_REQUIRE_KERNELS"):
                ext.optional = False
                raise
            logging.getLogger("legocompress").warning(
                "legocompress: no compiled kernels (%s). Everything works on the other routes, "
                "slower; install again where g++ or clang++ is at hand to have them.",
                str(error).partition("\n")[0],
            )

    def build_library(self, ext: Extension) -> None:
        """Compile each source with its own flags and link them."""
        x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
        objects = []
        for source in ext.sources:
            own = X86_FLAGS.get(Path(source).name, []) if x86 else []
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*FLAGS, *own],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread"], target_lang="c++"
        )


class TagWheel(bdist_wheel):
    """Tag the wheel for the platform alone: no part of it asks for one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
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
