"""Every Python's wheel: what it holds, what it says of itself, and that it works where nothing of the checkout is."""

import email
import json
import platform
import re
import shutil
import statistics
import subprocess
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from tests.packaging import builds
from tests.packaging.conftest import Wheel

pytestmark = pytest.mark.packaging

INFO = "adamw_ext-0.1.0.dist-info"
# Those that need only the package: the arithmetic, the drop-in, its state, TorchScript, and a C++ program that is
# compiled with the installed headers and linked with the installed library.
TESTS = (
    "update",
    "bits",
    "dtypes",
    "optimizer",
    "state_dict",
    "split_masters",
    "functional",
    "script_class",
    "libtorch",
)


def text(wheel: Wheel, name: str) -> str:
    with zipfile.ZipFile(wheel.path) as archive:
        return archive.read(name).decode()


def headers(wheel: Wheel, name: str) -> Message:
    return email.message_from_string(text(wheel, f"{INFO}/{name}"))


def tag(wheel: Wheel) -> str:
    major, minor, _ = wheel.facts["python"].split(".")
    return f"cp{major}{minor}"


def test_it_holds_the_package_and_nothing_else(wheel: Wheel):
    suffix = f"cpython-{tag(wheel)[2:]}-{platform.machine()}-linux-gnu.so"
    package = [str(path.relative_to(wheel.source)) for path in (wheel.source / "adamw_ext").rglob("*.*")]
    package = [name for name in package if Path(name).suffix in (".py", ".pyi", ".typed", ".h")]
    assert {"adamw_ext/py.typed", "adamw_ext/_C.pyi", "adamw_ext/include/adamw_ext/adamw.h"} < set(package)
    compiled = ["adamw_ext/libadamw_ext.so", f"adamw_ext/_C.{suffix}"]
    about = [f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")]
    with zipfile.ZipFile(wheel.path) as archive:
        assert sorted(archive.namelist()) == sorted(package + compiled + about)


def test_what_it_holds_is_what_git_has(wheel: Wheel):
    """A wheel that is kept from an earlier run may be out of date: remove it then."""
    with zipfile.ZipFile(wheel.path) as archive:
        for name in archive.namelist():
            if (wheel.source / name).is_file():
                assert archive.read(name) == (wheel.source / name).read_bytes(), f"{name} has changed since the build"


def test_its_name_and_tag_bind_it_to_python_and_platform(wheel: Wheel):
    expected = f"{tag(wheel)}-{tag(wheel)}-linux_{platform.machine()}"
    assert wheel.path.name == f"adamw_ext-0.1.0-{expected}.whl"
    assert headers(wheel, "WHEEL")["Tag"] == expected
    assert headers(wheel, "WHEEL")["Root-Is-Purelib"] == "false"


def test_it_requires_the_torch_it_was_built_with_and_nothing_else(wheel: Wheel):
    needed = [line for line in headers(wheel, "METADATA").get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == [f"torch=={wheel.facts['torch'].partition('+')[0]}"]


def test_its_metadata_is_complete(wheel: Wheel):
    metadata = headers(wheel, "METADATA")
    assert (metadata["Name"], metadata["Version"]) == ("adamw_ext", "0.1.0")
    assert metadata["Requires-Python"] == ">=3.10"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("BSD-3-Clause", "LICENSE")
    assert metadata["Summary"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# adamw_ext\n")
    assert text(wheel, f"{INFO}/licenses/LICENSE") == (wheel.source / "LICENSE").read_text()


def test_no_file_names_a_folder_of_the_build(wheel: Wheel):
    code = "import sys; print(sys.prefix); print(sys.base_prefix)"
    prefixes = subprocess.run([wheel.base, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    folders = [*prefixes, str(wheel.source), str(builds.ROOT), str(Path.home()), "/tmp/", "/home/"]
    with zipfile.ZipFile(wheel.path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            for folder in folders:
                place = content.find(folder.encode())
                assert place < 0, f"{name} names {content[place : place + 100]!r}"


def test_its_libraries_are_looked_for_beside_it_and_nowhere_else(wheel: Wheel, tmp_path: Path):
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(tmp_path)
    for library in (tmp_path / "adamw_ext").glob("*.so"):
        answer = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", answer)) <= {"$ORIGIN"}


@pytest.fixture(scope="session")
def installed(wheel: Wheel) -> Path:
    """The Python of a fresh environment in which the wheel is installed, over the packages of its base."""
    python = builds.environment(wheel.base, wheel.folder / "environment")
    install = ("install", "--no-index", "--no-cache-dir", "--no-deps", wheel.path)  # over the torch that is there
    builds.run(
        wheel.base, "-m", "pip", "--python", python, *install, cwd=wheel.folder, log=wheel.folder / "install.log"
    )
    return python


@pytest.fixture(scope="session")
def suite(wheel: Wheel) -> Path:
    """The tests, and nothing else of the checkout."""
    folder = wheel.folder / "suite"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(wheel.source / "tests", folder / "tests")
    shutil.copy2(wheel.source / "pyproject.toml", folder)
    return folder


def ask(python: Path, code: str, cwd: Path) -> str:
    return subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_installed_is_what_is_imported(wheel: Wheel, installed: Path, suite: Path):
    assert ask(installed, "import adamw_ext; print(adamw_ext.__file__)", suite).startswith(str(installed.parent.parent))
    built = json.loads(ask(installed, "import adamw_ext, json; print(json.dumps(adamw_ext.build_info()))", suite))
    assert (built["adamw_ext"], built["python"]) == ("0.1.0", wheel.facts["python"])
    assert built["torch"] == built["built with torch"] == wheel.facts["torch"]
    wheel.facts["compiler"] = built["compiler"]


def test_the_tests_pass_on_what_is_installed(wheel: Wheel, installed: Path, suite: Path):
    files = [f"tests/test_{name}.py" for name in TESTS]
    log = wheel.folder / "suite.log"
    builds.run(installed, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *files, cwd=suite, log=log)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", log.read_text())}
    assert counts["passed"] > 200
    wheel.facts |= {"skipped": 0, **counts, "tests": [f"test_{name}" for name in TESTS]}


def test_importing_it_takes_little_more_than_importing_torch(wheel: Wheel, installed: Path, suite: Path):
    """Other work on the machine can only add to the time of a process, so the least of several is the import's own."""
    code = "import time, torch; begin = time.perf_counter(); import adamw_ext; print(time.perf_counter() - begin)"
    seconds = [float(ask(installed, code, suite)) for _ in range(7)]
    wheel.facts |= {"import_seconds": round(min(seconds), 3), "import_median": round(statistics.median(seconds), 3)}
    assert min(seconds) < 0.2
