"""Build steps that pyproject.toml cannot express: the compiled CPU kernels, and a copy of demo/ inside the wheel."""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-g0"]


class BuildKernels(build_ext):
    """Build shared libraries for ctypes rather than Python modules, with OpenMP if the compiler has it."""

    def get_export_symbols(self, ext):
        # There is no PyInit function to export, as in a Python module.
        return []

    def build_extension(self, ext):
        if self.compiler.compiler_type != "msvc":
            ext.extra_compile_args = [*FLAGS, "-fopenmp"]
            ext.extra_link_args = ["-fopenmp"]
            try:
                super().build_extension(ext)
                return
            except (CompileError, LinkError) as error:
                print(f"The compiler has no OpenMP ({error}); building single-threaded CPU kernels.")
            ext.extra_compile_args = FLAGS
            ext.extra_link_args = []
        super().build_extension(ext)


class BuildPackage(build_py):
    """Copy demo/ into the wheel, where `gdino demo` finds it; in a checkout it lies beside src."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "gdino_hf" / "_demo"
            shutil.copytree("demo", target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


setup(
    ext_modules=[
        Extension(
            "gdino_hf._msda_cpu",
            sources=["kernels/msda/cpu/ms_deform_attn.c"],
            depends=[
                "kernels/msda/cpu/ms_deform_attn.h",
                "kernels/msda/cpu/ms_deform_attn_kernel.h",
                "kernels/msda/cpu/ms_deform_attn_backward.h",
            ],
            optional=True,  # without a compiler the package still installs, and runs on PyTorch's operations
        ),
        Extension(
            "gdino_hf._int8_cpu",
            sources=["kernels/int8_linear/int8_linear.c"],
            depends=["kernels/int8_linear/int8_linear.h", "kernels/int8_linear/int8_vectors.h"],
            optional=True,
        ),
        Extension(
            "gdino_hf._float_cpu",
            sources=["kernels/float_linear/float_linear.c"],
            depends=[
                "kernels/float_linear/float_linear.h",
                "kernels/float_linear/float_products.h",
                "kernels/float_linear/float_layers.h",
                "kernels/float_linear/float_fusion.h",
                "kernels/float_linear/float_relu.h",
                "kernels/float_linear/float_winograd.h",
            ],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
)
