"""What pyproject.toml cannot say: optional native kernels, and the status data that an installed wheel reports."""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = Path("src/formwright/ops/native")


class BuildKernels(build_ext):
    """A plain shared library in the place of an extension module: it is loaded by path and has no PyInit function.

    Without a compiler, or without OpenMP, the build goes on: the kernels are faster twins of PyTorch code.
    """

    def build_extension(self, ext):
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/std:c++17", "/openmp"]
            return super().build_extension(ext)
        plain = ["-O3", "-std=c++17"]
        try:
            ext.extra_compile_args, ext.extra_link_args = [*plain, "-fopenmp"], ["-fopenmp"]
            return super().build_extension(ext)
        except Exception as failure:  # Apple's clang has no -fopenmp
            self.announce(f"no OpenMP ({failure}); building kernels of one thread", level=3)
        ext.extra_compile_args, ext.extra_link_args = plain, []
        return super().build_extension(ext)

    def get_export_symbols(self, ext):
        return ext.export_symbols


class BuildWithStatus(build_py):
    """Tests and evidence lie beside the package, not in it: bake what a card's status needs into the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        sys.path.insert(0, str(ROOT / "src"))
        from formwright.catalog.evidence import scan

        catalog = Path(self.build_lib, "formwright", "catalog")
        catalog.mkdir(parents=True, exist_ok=True)
        status = {"reference_tested": sorted(scan(ROOT / "tests"))}
        (catalog / "status.json").write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(catalog / "evidence", ignore_errors=True)
        if (ROOT / "evidence").is_dir():
            shutil.copytree(
                ROOT / "evidence",
                catalog / "evidence",
                ignore=lambda _, names: {name for name in names if not name.endswith(".json")},
            )


sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / NATIVE).glob("*.cpp"))
headers = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / NATIVE).glob("*.h"))
kernels = Extension(
    "formwright.ops.native._kernels", sources, depends=headers, include_dirs=[NATIVE.as_posix()], optional=True
)

os.chdir(ROOT)
setup(
    ext_modules=[kernels] if sources else [],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithStatus},
)
