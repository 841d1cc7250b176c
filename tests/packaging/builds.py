"""Wheels and the source archive, built as users build them, from a copy of what git has."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run(*command: Any, cwd: Path, log: Path, **variables: str) -> None:
    """Run without the checkout on the import path, with the output in a file; its end is shown where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    with log.open("w") as output:
        command = [str(word) for word in command]
        answer = subprocess.run(command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if answer.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-6000:]}")


def facts(python: Path) -> dict[str, str]:
    """Python's and torch's versions in an environment."""
    code = "import json, platform, torch; print(json.dumps([platform.python_version(), torch.__version__]))"
    answer = subprocess.run([str(python), "-c", code], cwd="/", capture_output=True, text=True, check=True)
    return dict(zip(("python", "torch"), json.loads(answer.stdout), strict=True))


def tracked_files(target: Path) -> Path:
    """A copy of the files that git knows, in a folder that is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0")[:-1]:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy)
    return target


def build_wheel(python: Path, source: Path, out: Path, **variables: str) -> dict[str, Any]:
    """Build ``source`` (a folder) with an environment's torch, or take what a run before has built there."""
    record = out / "built.json"
    if not record.exists():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        begin = time.monotonic()
        run(
            *(
                python,
                "-m",
                "pip",
                "wheel",
                "--no-build-isolation",
                "--no-deps",
                "--no-cache-dir",
                "-v",
                "-w",
                out,
                source,
            ),
            cwd=out,
            log=out / "build.log",
            ADAMW_EXT_CUDA="0",
            **variables,
        )
        seconds = time.monotonic() - begin
        (wheel,) = out.glob("*.whl")
        built = {**facts(python), "wheel": wheel.name, "bytes": wheel.stat().st_size, "build_seconds": round(seconds)}
        record.write_text(json.dumps(built, indent=1) + "\n")
    return json.loads(record.read_text())


def environment(base: Path, folder: Path) -> Path:
    """The Python of a fresh environment that sees the packages of ``base``, and has room for ours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(base, "-m", "venv", "--clear", "--without-pip", folder, cwd=folder.parent, log=folder.with_suffix(".log"))
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, others = (
        subprocess.run([str(each), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
        for each in (python, base)
    )
    Path(own, "base.pth").write_text(f"import site; site.addsitedir({others!r})\n")
    return python


def build_sdist(python: Path, source: Path, out: Path) -> Path:
    """Build the source archive, or take the one of a run before."""
    if not list(out.glob("*.tar.gz")):
        out.mkdir(parents=True, exist_ok=True)
        # The environment has what a build needs, if not all that its torch would bring to run on GPUs.
        options = ("--no-isolation", "--skip-dependency-check", "--sdist", "-o", out)
        run(python, "-m", "build", *options, source, cwd=out, log=out / "sdist.log")
    (archive,) = out.glob("*.tar.gz")
    return archive
