"""The source archive holds all that a build needs, and builds the same wheel without the checkout."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging import builds
from tests.packaging.conftest import Wheel

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="session")
def archive(wheel: Wheel) -> Path:
    return builds.build_sdist(wheel.base, wheel.source, wheel.folder / "sdist")


def test_it_holds_the_sources_and_no_tests(wheel: Wheel, archive: Path):
    with tarfile.open(archive) as files:
        names = {Path(member.name).relative_to("adamw_ext-0.1.0") for member in files if member.isfile()}
    needed = [path for folder in ("csrc", "adamw_ext") for path in (wheel.source / folder).rglob("*.*")]
    needed = [path for path in needed if path.suffix not in (".so", ".pyc")]
    top = ("setup.py", "build_backend.py", "build_checks.py", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO")
    assert {path.relative_to(wheel.source) for path in needed if path.is_file()} | {Path(name) for name in top} <= names
    top += ("CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in", "setup.cfg")
    assert {name.parts[0] for name in names} == {"csrc", "adamw_ext", "adamw_ext.egg-info", *top}


def test_it_builds_a_wheel_with_the_same_files(wheel: Wheel, archive: Path):
    built = builds.build_wheel(wheel.base, archive, wheel.folder / "from-sdist")
    with zipfile.ZipFile(wheel.folder / "from-sdist" / built["wheel"]) as second, zipfile.ZipFile(wheel.path) as first:
        assert sorted(second.namelist()) == sorted(first.namelist())
        for name in first.namelist():
            if not name.endswith((".so", "RECORD")):
                assert second.read(name) == first.read(name), name
    wheel.facts["archive"] = archive.name
