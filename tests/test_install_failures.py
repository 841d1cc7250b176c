"""What goes wrong while installing ends in one sentence that says what to do. Each fault is a real one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_checks

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("csrc", "adamw_ext", "build_checks.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def ask_setup(*options: str, python: tuple[str, ...] = (), folder: Path = ROOT, **variables: str):
    """``setup.py build_ext`` and whatever else is asked for, in a process of its own; python: how it is started."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH", "MAX_JOBS")}
    environment |= {"ADAMW_EXT_CUDA": "0", **variables}
    command = [*(python or (sys.executable,)), "setup.py", *(options or ("--version",))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def assert_ends_with(answer: subprocess.CompletedProcess[str], *words: str) -> None:
    """The last line is a sentence with these words, and no traceback comes before it."""
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr
    last = answer.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


def program(path: Path, *lines: str) -> str:
    """A shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def linked(folder: Path, *programs: str) -> str:
    """A folder for PATH that has these programs and no other."""
    for name in programs:
        (folder / name).symlink_to(os.path.realpath(shutil.which(name)))
    return str(folder)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the package is built from, whose first source (with one compiler at once) does not compile."""
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, tmp_path / name)
    first = tmp_path / "csrc/cpu/isa.cpp"
    first.write_text("#error this source does not compile\n" + first.read_text())
    return tmp_path


def test_without_a_compiler_one_is_asked_for(tmp_path):
    assert_ends_with(
        ask_setup(PATH=str(tmp_path)), "needs a C++ compiler", "'c++' cannot be run", "apt install g++", "CXX"
    )


def test_a_compiler_that_does_not_exist_is_named():
    assert_ends_with(ask_setup(CXX="/nonexistent/g++"), "'/nonexistent/g++' cannot be run", "set CXX")


def test_a_compiler_with_options_is_refused_since_torch_takes_them_for_its_name():
    assert_ends_with(ask_setup(CXX="c++ -pipe"), "'c++ -pipe' cannot be run", "set CXX to a program, without options")


def test_a_compiler_that_fails_is_named():
    assert_ends_with(ask_setup(CXX="false"), "'false --version' fails", "set CXX")


def test_a_compiler_that_torch_refuses_is_refused_first(tmp_path):
    old = program(tmp_path / "g++", 'echo "g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-4)"')
    assert_ends_with(ask_setup(CXX=old), "GCC 9 or newer", "g++ (GCC) 8.5.0", "GCC 12 is tested", "set CXX")


def test_without_setuptools_it_is_asked_for():
    assert_ends_with(ask_setup(python=(sys.executable, "-S")), "setuptools, which is not installed", "pip install")


def test_old_setuptools_are_refused(tmp_path):
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\n')
    answer = ask_setup(python=(sys.executable, "-S"), PYTHONPATH=str(tmp_path))
    assert_ends_with(answer, "setuptools 65.5.0", 'pip install -U "setuptools>=77"')


@pytest.fixture
def only_setuptools(tmp_path: Path) -> str:
    """A folder for PYTHONPATH."""
    import setuptools

    site_packages = Path(setuptools.__file__).parent.parent
    for found in (site_packages / "_distutils_hack", *site_packages.glob("setuptools*")):
        (tmp_path / found.name).symlink_to(found)
    return str(tmp_path)


def test_without_torch_it_is_asked_for(only_setuptools):
    answer = ask_setup(python=(sys.executable, "-S"), PYTHONPATH=only_setuptools)
    assert_ends_with(answer, "torch cannot be imported", "Install torch first", "pip install --no-build-isolation .")


def test_without_pythons_headers_they_are_asked_for(only_setuptools, tmp_path):
    """A Python that lies elsewhere, with its library, but without its headers."""
    own = tmp_path / "bin/python3"
    own.parent.mkdir()
    shutil.copy2(os.path.realpath(sys.executable), own)
    (tmp_path / "lib").symlink_to(Path(sys.base_prefix, "lib"))
    answer = ask_setup(python=(str(own), "-S"), PYTHONPATH=only_setuptools)
    assert_ends_with(answer, "Python's headers", "no Python.h", "-dev")


def test_windows_is_refused():
    pretend = "import runpy, sys; sys.platform = 'win32'; runpy.run_path(sys.argv[1], run_name='__main__')"
    assert_ends_with(ask_setup(python=(sys.executable, "-c", pretend)), "Linux and macOS only", "WSL")


def toolkit(folder: Path, release: str) -> Path:
    """A CUDA toolkit as far as a build looks at it before it compiles."""
    program(folder / "bin/nvcc", f'echo "Cuda compilation tools, release {release}, V{release}.99"')
    header = folder / "include/cuda_runtime_api.h"
    header.parent.mkdir()
    header.touch()
    return folder


@pytest.mark.parametrize(
    ("found", "torch_cuda", "words"),
    [
        ("11.8", "12.8", ["is 11.8", "built with CUDA 12.8", "CUDA_HOME to a toolkit 12.x", "ADAMW_EXT_CUDA=0"]),
        ("13.0", "12.8", ["is 13.0", "built with CUDA 12.8", "CUDA_HOME to a toolkit 12.x", "ADAMW_EXT_CUDA=0"]),
        ("12.0", "12.8", ["12.1 or newer", "is 12.0", "ADAMW_EXT_CUDA=0"]),
    ],
)
def test_a_toolkit_that_does_not_fit_torch_is_refused(tmp_path, found, torch_cuda, words):
    ask = f"import build_checks; build_checks.check_toolkit({str(toolkit(tmp_path, found))!r}, {torch_cuda!r})"
    answer = subprocess.run([sys.executable, "-S", "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert_ends_with(answer, *words)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.parametrize("choice", ["auto", "1"])
def test_setup_looks_at_the_toolkit(tmp_path, choice):
    answer = ask_setup(ADAMW_EXT_CUDA=choice, CUDA_HOME=str(toolkit(tmp_path, "12.4")))
    assert_ends_with(answer, "is 12.4", f"built with CUDA {torch.version.cuda}", "CUDA_HOME", "ADAMW_EXT_CUDA=0")


def test_the_first_error_of_a_compiler_is_the_last_line(sources):
    answer = ask_setup("build_ext", folder=sources, MAX_JOBS="1")
    assert_ends_with(answer, "could not be compiled by", "CXX", "isa.cpp:1:2: error: #error this source")


def test_a_killed_compiler_asks_for_fewer_at_once(sources, tmp_path):
    """The compiler's own process for the source gets the signal that the kernel sends when memory runs out."""
    killed = program(tmp_path / "killed", "kill -9 $$")
    compiler = program(tmp_path / "g++", f'exec {shutil.which("c++")} -wrapper {killed} "$@"')
    answer = ask_setup("build_ext", folder=sources, MAX_JOBS="2", CXX=compiler)
    assert "signal terminated program" in answer.stdout
    assert_ends_with(answer, "A compiler was killed", "MAX_JOBS (now 2)", "MAX_JOBS=1")


PROGRAMS = ("c++", "g++", "sh", "tee")


def test_ninja_is_found_beside_a_python_whose_environment_is_not_activated(sources, tmp_path):
    (tmp_path / "bin").mkdir()
    answer = ask_setup("build_ext", folder=sources, MAX_JOBS="1", PATH=linked(tmp_path / "bin", *PROGRAMS))
    assert "ninja: build stopped" in answer.stdout
    assert_ends_with(answer, "could not be compiled by")


def test_without_ninja_it_builds_and_says_that_it_is_slow(sources, tmp_path):
    (tmp_path / "bin").mkdir()
    hidden = "import runpy, sys; sys.modules['ninja'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    python = (sys.executable, "-c", hidden)
    answer = ask_setup("build_ext", python=python, folder=sources, PATH=linked(tmp_path / "bin", *PROGRAMS))
    assert "ninja was not found, so the sources are compiled one after the other" in answer.stdout
    assert "ninja: " not in answer.stdout
    assert_ends_with(answer, "could not be compiled by", "#error this source does not compile")


def assert_pip_ends_with(python: Path | str, folder: Path, *words: str, **variables: str) -> None:
    command = [str(python), "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    answer = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    lines = [line.strip(" │╰─>") for line in answer.stderr.splitlines()]
    end = lines.index("[end of output]")
    assert "1 lines of output" in lines[end - 2]
    assert all(word in lines[end - 1] for word in words), lines[end - 1]


def test_pip_shows_the_sentence_alone(tmp_path):
    assert_pip_ends_with(sys.executable, tmp_path, "'/nonexistent/g++' cannot be run", CXX="/nonexistent/g++")


def test_pip_shows_the_sentence_where_setuptools_are_missing(tmp_path):
    """In a fresh environment, as Python 3.12 and newer make it; older ones put old setuptools in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], check=True)
    python = tmp_path / "fresh/bin/python"
    pip = Path(subprocess.check_output([sys.executable, "-c", "import pip; print(pip.__file__)"], text=True)).parent
    (tmp_path / "pip").symlink_to(pip)
    assert_pip_ends_with(python, tmp_path, "setuptools, which is not installed", PYTHONPATH=str(tmp_path))


def ask_python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_another_torch_is_refused_at_the_import():
    answer = ask_python("import torch; torch.__version__ = '2.12.1'; import adamw_ext")
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("ImportError: adamw_ext cannot be loaded with torch 2.12.1: it was compiled against torch ")
    assert last.endswith("pip install --no-build-isolation --force-reinstall --no-deps .")


def test_sources_that_were_not_compiled_say_so_at_the_import(sources):
    no_editable = "import sys; sys.meta_path = [each for each in sys.meta_path if 'editable' not in each.__module__]"
    answer = ask_python(f"{no_editable}; import adamw_ext", sources)
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert f"{sources / 'adamw_ext'} has not been compiled for Python" in last
    assert "start Python in another one" in last
    assert last.endswith("pip install --no-build-isolation -e .")


GIB = 2**30


def machine(root: Path, groups: str, available: int = 16, **files: str) -> Path:
    """The files in which Linux says how much memory is left."""
    texts = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {available * 2**20} kB\n", "proc/self/cgroup": groups}
    texts |= {f"sys/fs/cgroup/{path.replace('__', '/')}": text for path, text in files.items()}
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def files_of_v2(folder: str, limit: str, used: int, cache: int) -> dict[str, str]:
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 3\n",
    }


def test_memory_is_what_the_machine_has_left(tmp_path):
    assert build_checks.memory_left(machine(tmp_path, "0::/\n")) == 16 * GIB


def test_memory_is_unknown_without_the_files_that_tell(tmp_path):
    assert build_checks.memory_left(tmp_path) is None


def test_a_control_group_of_version_2_limits_memory_and_its_file_cache_is_free(tmp_path):
    files = files_of_v2("box__", str(4 * GIB), 3 * GIB, GIB) | files_of_v2("box__inner__", "max", GIB, 0)
    assert build_checks.memory_left(machine(tmp_path, "0::/box/inner\n", **files)) == 2 * GIB


def test_a_control_group_of_version_1_limits_memory(tmp_path):
    files = {
        "memory__job__memory.limit_in_bytes": f"{3 * GIB}\n",
        "memory__job__memory.usage_in_bytes": f"{2 * GIB}\n",
        "memory__job__memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
    }
    assert build_checks.memory_left(machine(tmp_path, "3:cpuset:/\n4:memory:/job\n", **files)) == 3 * GIB // 2


def test_a_container_sees_its_own_limits_at_the_root(tmp_path):
    """The group has its name outside, where its files are not to be seen."""
    files = files_of_v2("", str(2 * GIB), GIB, 0)
    assert build_checks.memory_left(machine(tmp_path, "0::/kubepods/pod/abc\n", **files)) == GIB


def jobs_for(left: int | None, monkeypatch: pytest.MonkeyPatch, cores: int = 8, **variables: str) -> str | None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build_checks, "memory_left", lambda: left)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    build_checks.limit_jobs()
    return os.environ.get("MAX_JOBS")


@pytest.mark.parametrize(
    ("left", "jobs"), [(16 * GIB, None), (8 * GIB, None), (3 * GIB + 1, "3"), (GIB // 4, "1"), (0, "1"), (None, None)]
)
def test_as_many_compilers_run_at_once_as_fit_into_memory(monkeypatch, left, jobs):
    assert jobs_for(left, monkeypatch) == jobs


def test_the_users_number_of_compilers_stays(monkeypatch):
    assert jobs_for(GIB, monkeypatch, MAX_JOBS="7") == "7"
