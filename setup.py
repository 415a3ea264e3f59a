"""The part of the build that pyproject.toml cannot say: an optional library in C, loaded with ctypes.

The library calls nothing of Python's. So one wheel for each platform serves every Python 3.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("gptoss_opt/kernels/native/c")
NATIVE = Extension(
    "gptoss_opt.kernels.native._native",
    [str(SOURCES / "native.c")],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    # Some Pythons ask for debugging information, which is ten times the size of the code.
    extra_compile_args=["-O3", "-g0"],
    libraries=["m", "pthread"],
    # Without a compiler the package installs all the same, and does without.
    optional=True,
)


class BuildNative(build_ext):
    """Names the library `_native.so` everywhere, without the tag of the Python that builds it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class PlatformWheel(bdist_wheel):
    """Names the wheel `py3-none-PLATFORM`."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # The source is for gcc and clang.
    ext_modules=[] if sys.platform == "win32" else [NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
