"""Runs cases in a child process, which may die or hang of one."""

import importlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.fuzzing.cases import Outcome, run_case

MODULES = ("stepping", "loading", "constructing", "calling", "scripted", "converting", "extension")
HANGS_AFTER = 120.0  # seconds without a new case; the first case imports torch's compiler
ADDRESS_SPACE = 16 << 30  # bytes: absurd sizes fail instead of taking the machine's memory


@dataclass
class Tally:
    """Counts of outcomes by entrance; ``broken``: (entrance, seed, what happened)."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, name: str, seed: int, outcome: str, what: str = "") -> None:
        self.counts.setdefault(name, Counter())[outcome] += 1
        if outcome == "broken":
            self.broken.append((name, seed, what))

    def as_dict(self) -> dict[str, Any]:
        return {"counts": {name: dict(counts) for name, counts in self.counts.items()}, "broken": self.broken}


def load_entrances() -> None:
    for module in MODULES:
        importlib.import_module(f"tests.fuzzing.{module}")


def prepare() -> None:
    """In a process that is to run cases."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    load_entrances()


def run_here(name: str, seed: int) -> Outcome:
    prepare()
    return run_case(name, seed)


def fuzz(names: list[str], *, first: int, seconds: float | None = None, count: int | None = None) -> Tally:
    """Seeds from ``first``, of all entrances in turn: for some seconds, or ``count`` seeds of each."""
    tally = Tally()
    deadline = None if seconds is None else time.monotonic() + seconds
    plan = {"names": names, "first": first, "end": None if count is None else first + count, "skip": 0}
    while not run_child(plan, deadline, tally):
        pass
    return tally


def run_child(plan: dict[str, Any], deadline: float | None, tally: Tally) -> bool:
    """One child, until all is done or it dies; then ``plan`` says where the next one goes on. True: all is done."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzzing.run", json.dumps(plan)]
        root = Path(__file__).parents[2]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root)
        assert child.stdout is not None
        try:
            last, ended = listen(child, child.stdout, deadline, tally)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if ended:
            return True
        errors.seek(0)
        tail = without_folders(errors.read()[-3000:])
    if last is None:
        raise RuntimeError(f"the process that runs cases did not begin: exit code {child.returncode}\n{tail}")
    turn, index = last
    name, seed = plan["names"][index], plan["first"] + turn
    how = "hung" if child.returncode == -signal.SIGKILL else f"died: exit code {child.returncode}"
    tally.add(name, seed, "broken", f"the process {how}\n{tail}")
    done = turn * len(plan["names"]) + index + 1
    plan["skip"] = done
    return False


def without_folders(text: str) -> str:
    """Files as they lie in the repository and in the environment, not on the machine."""
    for folder in (str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix):
        text = text.replace(folder + "/", "")
    return text


def listen(
    child: "subprocess.Popen[str]", pipe: IO[str], deadline: float | None, tally: Tally
) -> tuple[tuple[int, int] | None, bool]:
    """Take in a child's lines: ("case", turn, index) before each case, ("done", ...) after. Returns the last case that
    began, and whether the child ended as it should."""
    last = None
    selector = selectors.DefaultSelector()
    os.set_blocking(pipe.fileno(), False)
    selector.register(pipe, selectors.EVENT_READ)
    rest, heard = "", time.monotonic()
    while True:
        if selector.select(timeout=1.0):
            chunk = pipe.read()
            if chunk == "":
                child.wait()
                return last, False
            heard = time.monotonic()
            *lines, rest = (rest + (chunk or "")).split("\n")
            for line in lines:
                kind, *fields = json.loads(line)
                if kind == "case":
                    last = (fields[0], fields[1])
                elif kind == "done":
                    tally.add(*fields)
                else:
                    return last, True
        if time.monotonic() - heard > HANGS_AFTER:
            child.kill()
            child.wait()
            return last, False
        if deadline is not None and time.monotonic() > deadline:
            return last, True


def work(plan: dict[str, Any]) -> None:
    """In the child. TESTS_FUZZING_DIES_AT: a seed at which it dies, to see that this is noticed."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints goes elsewhere
    if "ASAN_OPTIONS" not in os.environ:  # AddressSanitizer takes terabytes, and limits allocations by itself
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare()
    names = plan["names"]
    position = plan["skip"]
    while plan["end"] is None or position < (plan["end"] - plan["first"]) * len(names):
        turn, index = divmod(position, len(names))
        report.write(json.dumps(["case", turn, index]) + "\n")
        if os.environ.get("TESTS_FUZZING_DIES_AT") == str(plan["first"] + turn):
            os.abort()
        report.write(json.dumps(["done", *result_of(names[index], plan["first"] + turn)]) + "\n")
        position += 1
    report.write(json.dumps(["end"]) + "\n")
    report.flush()
    os._exit(0)


def result_of(name: str, seed: int) -> tuple[str, int, str, str]:
    try:
        return name, seed, run_case(name, seed).value, ""
    except Exception as error:
        # The place as well: an error that is not Broken is one of the case's own.
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            name,
            seed,
            "broken",
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"[:1500],
        )


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
