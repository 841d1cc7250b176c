"""What must hold before the extension is compiled, and why compiling failed: in one sentence that says what to do.

Nothing here needs torch, so that most refusals come at once.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

OLDEST_SETUPTOOLS = 77  # the first that takes the licence as an expression, as pyproject.toml has it
OLDEST_GCC = 9  # torch's headers refuse older ones; newer torch takes more, and then the compiler's first error says so
OLDEST_TOOLKIT = (12, 1)  # the first whose kernels take the arguments that a table of tensors fills
MEMORY_OF_A_COMPILER = 2**30  # the largest source takes 0.7 GiB with GCC 12
OUT_OF_MEMORY = re.compile(
    r"Killed|signal 9|out of memory|virtual memory exhausted|Cannot allocate memory|bad_alloc", flags=re.IGNORECASE
)
FIRST_ERROR = re.compile(r"^.*(?:error:|error :|undefined reference|cannot find -l).*$", flags=re.MULTILINE)


def stop(sentence: str) -> NoReturn:
    sys.stdout.flush()
    sys.exit(sentence)


def check_machine() -> None:
    """All that is needed before torch is looked for."""
    if sys.platform == "win32":
        stop("adamw_ext is built on Linux and macOS only: on Windows, install it in WSL.")
    check_setuptools()
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        stop(
            f"adamw_ext needs Python's headers, but {sysconfig.get_path('include')} has no Python.h: install them "
            f"(Debian and Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev)."
        )
    compiler_version()


def check_setuptools() -> None:
    try:
        import setuptools
    except ImportError:
        stop(f"adamw_ext is built by setuptools, which is not installed here: pip install {tools()}")
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        stop(f"adamw_ext needs newer tools than setuptools {setuptools.__version__}: pip install -U {tools()}")


def tools() -> str:
    return f'"setuptools>={OLDEST_SETUPTOOLS}" ninja'


@functools.cache
def compiler_version() -> str:
    """The first line of the C++ compiler's --version. It is CXX, or c++, and from here on for compiling and linking."""
    command = os.environ.setdefault("CXX", "c++")
    advice = (
        "install one (GCC 12 is tested; Debian and Ubuntu: apt install g++), or set CXX to a program, without options"
    )
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True)
    except OSError as error:
        stop(f"adamw_ext needs a C++ compiler, but {command!r} cannot be run ({error.strerror}): {advice}.")
    if answer.returncode != 0 or not answer.stdout.strip():
        stop(f"adamw_ext needs a C++ compiler, but '{command} --version' fails: {advice}.")
    version = answer.stdout.splitlines()[0]
    gcc = re.match(r"\S+ \(.*?\) (\d+)\.", version)
    if gcc and int(gcc[1]) < OLDEST_GCC:
        stop(f"adamw_ext needs GCC {OLDEST_GCC} or newer, as torch does, but {command!r} is {version!r}: {advice}.")
    return version


def check_toolkit(root: str, torch_cuda: str) -> None:
    """The CUDA toolkit in ``root`` must have the major version that torch was built with."""
    nvcc = os.path.join(root, "bin", "nvcc")
    wanted = torch_cuda.split(".")[0]
    advice = f"set CUDA_HOME to a toolkit {wanted}.x, or ADAMW_EXT_CUDA=0 to build without CUDA kernels"
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        stop(f"{nvcc} cannot be run ({error.strerror}): {advice}.")
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None:
        stop(f"'{nvcc} --version' names no release: {advice}.")
    found = f"{release[1]}.{release[2]}"
    if release[1] != wanted:
        stop(f"The CUDA toolkit in {root} is {found}, but torch was built with CUDA {torch_cuda}: {advice}.")
    if (int(release[1]), int(release[2])) < OLDEST_TOOLKIT:
        stop(f"adamw_ext needs a CUDA toolkit 12.1 or newer, but the one in {root} is {found}: {advice}.")


def leave_out_pythons_folder(compiler: Any) -> None:
    """Some Pythons (pyenv's) link extensions with their own folder as a place of libraries; ours may run in another."""
    option = f"-Wl,-rpath,{sysconfig.get_config_var('LIBDIR')}"
    for name in ("linker_so", "linker_so_cxx"):
        if hasattr(compiler, name):
            setattr(compiler, name, [word for word in getattr(compiler, name) if word != option])


def find_ninja() -> None:
    """Put the ninja of this Python's environment on PATH, where it is not if the environment was not activated."""
    if shutil.which("ninja") is None:
        try:
            import ninja
        except ImportError:
            print("ninja was not found, so the sources are compiled one after the other: pip install ninja")
        else:
            os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])


def limit_jobs() -> None:
    """Set MAX_JOBS, where the user has not, to as many compilers as the memory holds, if that is the narrower limit."""
    left = memory_left()
    if "MAX_JOBS" in os.environ or left is None:
        return
    jobs = max(1, left // MEMORY_OF_A_COMPILER)
    if jobs < (os.cpu_count() or 1):
        os.environ["MAX_JOBS"] = str(jobs)
        print(f"{left / 2**30:.1f} GiB of memory are left, so at most {jobs} compilers run at once (MAX_JOBS={jobs}).")


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes this process may still take: what the machine has, or less where a control group (v1 or v2) allows less."""
    left = []
    with contextlib.suppress(OSError):
        meminfo = (root / "proc/meminfo").read_text()
        left += [1024 * int(kib) for kib in re.findall(r"^MemAvailable: +(\d+) kB", meminfo, flags=re.MULTILINE)]
    groups = []
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controllers == "":
            mount, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max" is no number
                taken = int((folder / usage).read_text()) - dropped_first(folder / "memory.stat", cache)
                left.append(max(0, int((folder / limit).read_text()) - taken))
            if folder == mount:
                break
    return min(left, default=None)


def dropped_first(stat: Path, name: str) -> int:
    """Bytes of files in memory, which count as used and make room for a process that needs it."""
    found = re.search(rf"^{name} (\d+)$", stat.read_text(), flags=re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def failure_explained() -> Iterator[None]:
    """For the compilation: where it fails, the last line says in one sentence what to do."""
    from setuptools.errors import BaseError, CCompilerError

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "output")
        try:
            with output_copied(copy):
                yield
        except (RuntimeError, BaseError, CCompilerError) as error:
            stop(explanation(copy.read_text(errors="replace"), error))


def explanation(output: str, error: Exception) -> str:
    if OUT_OF_MEMORY.search(output):
        jobs = os.environ.get("MAX_JOBS", "one for each core")
        return (
            f"A compiler was killed or found no memory: let fewer run at once by a lower MAX_JOBS (now {jobs}), "
            "such as MAX_JOBS=1, or give the machine more memory."
        )
    first = FIRST_ERROR.search(output)
    if first is None:
        return f"adamw_ext could not be compiled by {compiler_version()!r}: {' '.join(str(error).split())}"
    return (
        f"adamw_ext could not be compiled by {compiler_version()!r} (GCC 12 is tested; CXX names another "
        f"compiler). The first error is: {first[0].strip()}"
    )


@contextlib.contextmanager
def output_copied(path: Path) -> Iterator[None]:
    """Whatever this process and the compilers print is shown as ever, and copied to ``path``."""
    path.touch()
    shown = []
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        kept = os.dup(descriptor)
        tee = subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE, stdout=kept)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), descriptor)
        tee.stdin.close()
        shown.append((descriptor, stream, kept, tee))
    try:
        yield
    finally:
        for descriptor, stream, kept, tee in shown:
            stream.flush()
            os.dup2(kept, descriptor)
            os.close(kept)
            tee.wait()
