"""Builds adamw_ext against the installed torch: a library for any libtorch program, and the Python module over it.

ADAMW_EXT_CUDA=auto|0|1 decides whether CUDA kernels are compiled; auto compiles them where torch was built with CUDA
and nvcc is found. MAX_JOBS limits the number of compilers that run at once.

ADAMW_EXT_SANITIZE=address|thread makes a build for tests/sanitizers.py: slow, and loadable only where that sanitizer's
runtime was loaded first.
"""

import glob
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import build_checks
from build_checks import compiler_version


def name_toolkit() -> None:
    """Set CUDA_HOME, where the user has not, to the root that nvcc says it has.

    torch takes the folder above the nvcc on PATH for the toolkit's root, which is wrong where that is a wrapper.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    if root := re.search(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, flags=re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(root[1].strip())


build_checks.check_machine()
name_toolkit()  # before torch looks for it, at the import

try:
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"adamw_ext compiles against the torch it will run with, and torch cannot be imported here ({error}). "
        "Install torch first, then: pip install --no-build-isolation ."
    )

OLDEST_TORCH = (2, 8)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"adamw_ext needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, but found {torch.__version__}.")


def builds_cuda() -> bool:
    """What ADAMW_EXT_CUDA decides, or, by default, what torch and the machine allow."""
    choice = os.environ.get("ADAMW_EXT_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ADAMW_EXT_CUDA must be auto, 0 or 1, but is {choice!r}.")
    toolkit = cpp_extension.CUDA_HOME or ""
    nvcc = shutil.which("nvcc", path=os.path.join(toolkit, "bin"))
    has_headers = os.path.exists(os.path.join(toolkit, "include", "cuda_runtime_api.h"))
    missing = [
        reason
        for reason, absent in (
            (f"torch {torch.__version__} was built without CUDA", torch.version.cuda is None),
            (
                f"bin/nvcc and include/cuda_runtime_api.h were not found in {toolkit or 'any place'}: "
                "set CUDA_HOME to the toolkit's root",
                nvcc is None or not has_headers,
            ),
        )
        if absent
    ]
    if choice == "1" and missing:
        sys.exit(f"ADAMW_EXT_CUDA=1, but {'; '.join(missing)}.")
    if choice == "0" or missing:
        return False
    build_checks.check_toolkit(toolkit, torch.version.cuda)
    return True


# Of the undefined behaviours, four are left out, because they take half the time to compile: null pointers, pointers
# that overflow, and objects that are too small (once accessed, all of them stop in AddressSanitizer), and objects of
# another class than declared. Checks as calls, and no optimisation, halve the time again. Python's own flags let
# integers wrap around, which would be no overflow then.
SANITIZERS = {
    "address": [
        "-O0",
        "-fno-wrapv",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize=null,pointer-overflow,object-size,vptr",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
        "-D_GLIBCXX_ASSERTIONS",
    ],
    "thread": ["-O1", "-fsanitize=thread"],
}


def sanitizer_flags() -> list[str]:
    """What ADAMW_EXT_SANITIZE adds to the flags; nothing without it."""
    choice = os.environ.get("ADAMW_EXT_SANITIZE", "")
    if not choice:
        return []
    if choice not in SANITIZERS:
        sys.exit(f"ADAMW_EXT_SANITIZE must be {' or '.join(SANITIZERS)}, but is {choice!r}.")
    return [*SANITIZERS[choice], "-g1", "-fno-omit-frame-pointer"]


def joined(sources: list[str], folder: str) -> list[str]:
    """With a sanitizer, the sources of a folder as one that includes them: reading torch's headers once, and not for
    each, halves the time of the build."""
    if not sanitizer_flags():
        return sources
    chosen = [source for source in sources if os.path.dirname(source) == folder]
    text = "".join(f'#include "{os.path.abspath(source)}"\n' for source in chosen)
    path = os.path.join("build", f"joined_{os.path.basename(folder)}.cpp")
    os.makedirs("build", exist_ok=True)
    if not os.path.exists(path) or pathlib.Path(path).read_text() != text:  # else ninja would compile it again
        pathlib.Path(path).write_text(text)
    return [path, *(source for source in sources if source not in chosen)]


def host_flags() -> list[str]:
    flags = [
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        # The arithmetic must give the same bits on every instruction set: no contraction, no fast-math. The two
        # relaxations concern errno and traps only, and let loops with square roots and selects become vector code.
        "-fno-fast-math",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        f'-DADAMW_EXT_BUILT_WITH_TORCH="{torch.__version__}"',
        f'-DADAMW_EXT_COMPILER="{compiler_version()}"',
        f'-DADAMW_EXT_CUDA_ARCHITECTURES="{cuda_architectures()}"',
    ]
    if CUDA:
        flags.append("-DADAMW_EXT_WITH_CUDA")
    if platform.machine() in ("x86_64", "AMD64"):
        flags += ["-march=x86-64", "-mtune=generic"]  # wider loops are chosen at run time, never by -march=native
    if torch.backends.openmp.is_available() and sys.platform == "linux":
        # Compiled, but not linked: the symbols bind to the OpenMP runtime that torch has loaded, so that the process
        # has one thread pool and not two.
        flags.append("-fopenmp")
    return flags + sanitizer_flags()


def path_flags() -> list[str]:
    """Error messages name source files: as they lie in the repository and in torch, not on the machine of the build."""
    folders = {os.getcwd(): "adamw_ext", os.path.dirname(torch.__file__): "torch"}  # the last that fits is taken
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def cuda_flags() -> list[str]:
    """As on the host: no contraction, and square roots, divisions and subnormal numbers as IEEE 754 has them."""
    return ["-O3", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false", "--threads=0"] + [
        f"-Xcompiler={flag}" for flag in path_flags()
    ]


def cuda_architectures() -> str:
    """What TORCH_CUDA_ARCH_LIST says; else the GPUs that are present, or, without one, those torch was built for."""
    if not CUDA:
        return ""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        versions = re.findall(r"sm_(\d+)(\d)\b", torch._C._cuda_getArchFlags())
        takes_large_arguments = [f"{major}.{minor}" for major, minor in versions if int(major) >= 7]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(takes_large_arguments) + "+PTX"
    flags = cpp_extension._get_cuda_arch_flags()
    return " ".join(flag.rpartition("code=")[2] for flag in flags)


class BuildExtension(cpp_extension.BuildExtension):
    """Gives the library a name that linkers find, and links the module to it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # objects would go to a temporary folder; so later builds compile only what changed
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def get_ext_filename(self, name: str) -> str:
        *folders, last = name.split(".")
        return os.path.join(*folders, f"{last}.so") if last == LIBRARY else super().get_ext_filename(name)

    def build_extensions(self) -> None:
        library, module = self.extensions
        library.libraries.remove("torch_python")
        module.libraries.insert(0, "adamw_ext")
        module.library_dirs.insert(0, os.path.dirname(self.get_ext_fullpath(library.name)))
        build_checks.leave_out_pythons_folder(self.compiler)
        build_checks.limit_jobs()
        with build_checks.failure_explained():
            super().build_extensions()


LIBRARY = "libadamw_ext"
build_checks.find_ninja()
CUDA = builds_cuda()
extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
sources = set(glob.glob("csrc/*/*.cpp") + (glob.glob("csrc/cuda/*.cu") if CUDA else []))
module_sources = set(glob.glob("csrc/python/*.cpp"))
common = {
    "include_dirs": [os.path.abspath("adamw_ext/include")],
    "extra_compile_args": {"cxx": host_flags() + path_flags(), "nvcc": cuda_flags()},
}
sanitizing = [flag for flag in sanitizer_flags() if flag.startswith("-fsanitize=")]
own_folder = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"

setup(
    ext_modules=[
        extension(
            f"adamw_ext.{LIBRARY}",
            sources=joined(sorted(sources - module_sources), "csrc/torch"),
            extra_link_args=sanitizing,
            **common,
        ),
        cpp_extension.CppExtension(
            "adamw_ext._C",
            sources=joined(sorted(module_sources), "csrc/python"),
            extra_link_args=[f"-Wl,-rpath,{own_folder}", *sanitizing],
            **common,
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
    # A build is bound to its torch's C++ interface, so this is the only torch it may be installed with.
    install_requires=[f"torch=={torch.__version__.split('+')[0]}"],
)
