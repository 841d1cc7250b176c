"""Do the tests notice faults? Builds the extension with one seeded fault after the other, and requires them to fail.

    python -m tests.mutation [--only WORDS]... [--layer compiled|python] [--out FOLDER]

Works on a copy of the sources in a temporary directory. The copy is built once as it is; after each fault its objects
are put back, so that the next build compiles only what the next fault touches. At the end the tests that noticed faults
are run without any, and must pass. Faults that show in machine code have a copy of their own: the others are compiled
with less optimisation, which changes no bit and takes a fifth of the time.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.device import conditions, write_dated
from tests.faults import FAULTS, ROOT, Fault, check_texts, rows_of_today

FOLDERS = ("csrc", "adamw_ext", "tests", "benchmarks")
FILES = ("build_checks.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TEST_TIMEOUT = 600  # seconds; a fault may also hang


class Failure(Exception):
    """The experiment itself went wrong: it says nothing about the tests."""


class Copy:
    """A copy of the sources, built in place."""

    def __init__(self, directory: Path, *, is_optimized: bool) -> None:
        self.tree = directory / "tree"
        self.built = directory / "built"
        self.tree.mkdir()
        for name in FOLDERS:
            shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in FILES:
            shutil.copy2(ROOT / name, self.tree / name)
        if not is_optimized:
            self.optimize_less()
        self.environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}

    def optimize_less(self) -> None:
        setup = self.tree / "setup.py"
        text = setup.read_text()
        if (count := text.count('        "-O3",\n')) != 1:
            raise Failure(f"setup.py has {count} lines that say -O3 to the host compiler")
        setup.write_text(text.replace('        "-O3",\n', '        "-O1",\n'))

    def run(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.tree, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def build(self) -> None:
        for module in self.tree.glob("adamw_ext/*.so"):  # linked anew, also where objects were put back
            module.unlink()
        result = self.run("setup.py", "build_ext", "--inplace")
        if result.returncode:
            raise Failure(f"the build failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")

    def check_import(self) -> None:
        """The copy is what the tests import, not the installed package."""
        result = self.run("-c", "import adamw_ext; print(adamw_ext.__file__, adamw_ext._C.__file__)")
        paths = result.stdout.split()
        if len(paths) != 2 or not all(Path(path).is_relative_to(self.tree) for path in paths):
            raise Failure(f"the tests would import {paths} and not the copy in {self.tree}\n{result.stderr}")
        print(f"testing {paths[1]}", flush=True)

    def module(self) -> bytes:
        (module,) = self.tree.glob("adamw_ext/_C*.so")
        return module.read_bytes() + (self.tree / "adamw_ext" / "libadamw_ext.so").read_bytes()

    def keep(self) -> None:
        """Remember what was built, for put_back."""
        shutil.copytree(self.tree / "build", self.built)

    def put_back(self) -> None:
        shutil.rmtree(self.tree / "build")
        shutil.copytree(self.built, self.tree / "build")

    def first_failure(self, tests: Iterable[str]) -> str | None:
        """The first test that fails, or how the tests ended otherwise; None if all pass."""
        command = ("-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", "-m", "not slow", *tests)
        try:
            result = self.run(*command, timeout=TEST_TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"(no end within {TEST_TIMEOUT} s)"
        if result.returncode == 0:
            return None
        if result.returncode < 0:
            return f"(crash with signal {-result.returncode})"
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
        if result.returncode != 1 or not failed:
            raise Failure(f"pytest could not run the tests:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
        return failed[1]

    def seed(self, fault: Fault, original: bytes) -> str | None:
        """Build with the fault; the first test that fails, or None."""
        source = self.tree / fault.file
        text, status = source.read_text(), source.stat()
        source.write_text(text.replace(fault.old, fault.new))
        try:
            if fault.is_compiled:
                self.build()
                if self.module() == original:
                    raise Failure(f"{fault.name!r} changed nothing in the module")
            return self.first_failure(fault.tests)
        finally:
            source.write_text(text)
            os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
            if fault.is_compiled:
                self.put_back()


def try_all(faults: list[Fault]) -> list[dict[str, object]]:
    """For each fault its name, file, seconds and what noticed it (None: nothing did)."""
    kinds = ([fault for fault in faults if fault.is_optimized == is_optimized] for is_optimized in (False, True))
    return [row for some in kinds if some for row in try_in_copy(some)]


def try_in_copy(faults: list[Fault]) -> list[dict[str, object]]:
    """Of one kind, in one copy."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="adamw_ext-mutation-") as directory:
        copy = Copy(Path(directory), is_optimized=faults[0].is_optimized)
        copy.build()
        copy.check_import()
        copy.keep()
        original = copy.module()
        to_pass: set[str] = set()
        for fault in faults:
            begin = time.monotonic()
            noticed_by = copy.seed(fault, original)
            seconds = round(time.monotonic() - begin)
            rows.append({"fault": fault.name, "file": fault.file, "noticed by": noticed_by, "seconds": seconds})
            is_test = noticed_by is not None and noticed_by.startswith("tests/")
            to_pass.update([noticed_by] if is_test and noticed_by else fault.tests)
            print(f"{seconds:4} s  {fault.name}: {noticed_by or 'NOTHING'}", flush=True)
        copy.build()
        if copy.module() != original:
            raise Failure("what was built at the end is not what was built at the beginning")
        if (failure := copy.first_failure(sorted(to_pass))) is not None:
            raise Failure(f"without any fault the tests fail: {failure}")
        print("without a fault, the tests that noticed them pass", flush=True)
    return rows


def report(rows: list[dict[str, object]]) -> str:
    noticed = [row for row in rows if row["noticed by"]]
    lines = [
        f"# Seeded faults: {len(noticed)} of {len(rows)} are noticed",
        "",
        "Each fault was put into a copy of the sources, which was built; the first test that failed is named. Without",
        "faults these tests pass. The faults are texts in `tests/faults.py`. Reproduce with `make mutation`.",
        "",
        "| fault | file | noticed by |",
        "| --- | --- | --- |",
        *(f"| {row['fault']} | `{row['file']}` | {named(row['noticed by'])} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def named(test: object) -> str:
    text = str(test or "NOTHING: IT SURVIVES").removeprefix("tests/").replace("|", "\\|")
    return f"`{text}`" if test else text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Seed faults; the tests must fail.")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="WORDS", help="only faults whose name has one of these in it"
    )
    parser.add_argument("--layer", choices=("compiled", "python"), help="only faults of this layer")
    parser.add_argument("--out", type=Path, help="also write the results there, as a dated file with those of the day")
    arguments = parser.parse_args()
    faults = [
        fault
        for fault in FAULTS
        if (arguments.only is None or any(words in fault.name for words in arguments.only))
        and arguments.layer in (None, "compiled" if fault.is_compiled else "python")
    ]
    if not faults:
        parser.error("no fault has such a name; there are:\n" + "\n".join(fault.name for fault in FAULTS))
    check_texts(faults)
    rows = try_all(faults)
    if arguments.out:
        result = conditions()
        all_rows = rows_of_today(arguments.out / f"mutation-{result['date']}.json", rows, FAULTS, "fault")
        write_dated(arguments.out, "mutation", {**result, "faults": all_rows}, report(all_rows))
    else:
        print(report(rows))
    return 0 if all(row["noticed by"] for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(f"mutation: {failure}")
