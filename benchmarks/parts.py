"""Runs commands one after another within a budget of seconds, and goes on past those that fail."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OVERHEAD_SECONDS = 1.0  # of starting and stopping a part
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass
class Outcome:
    """What became of a part. ``notes`` are short lines for the summary; ``is_failure`` counts for the exit status."""

    name: str
    status: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    is_failure: bool = False


@dataclass(frozen=True)
class Part:
    """Commands that run one after another and end with the first that fails.

    ``longest`` is the most that they may take in seconds, ``least`` what they are not started without, and what earlier
    parts leave for them. ``commands`` are made from the seconds that are granted. ``examine`` gets the output and may
    change an outcome that would otherwise be judged by the exit status. ``absent`` says why the part cannot run here.
    """

    name: str
    commands: Callable[[float], Sequence[Sequence[str]]]
    longest: float
    least: float
    environment: dict[str, str] = field(default_factory=dict)
    examine: Callable[[Outcome, str], None] | None = None
    absent: str | None = None


def run_parts(parts: Sequence[Part], budget: float, log: Path) -> Iterator[Outcome]:
    """Outcomes as they come. All output goes into ``log``."""
    end = time.monotonic() + budget
    for index, part in enumerate(parts):
        if part.absent is not None:
            yield Outcome(part.name, NOT_RUN, notes=[part.absent])
            continue
        for_later = sum(later.least + OVERHEAD_SECONDS for later in parts[index + 1 :] if later.absent is None)
        granted = min(part.longest, end - time.monotonic() - for_later)
        if granted < part.least:
            notes = [f"no time left: it needs {part.least:.0f} s"]
            yield Outcome(part.name, NOT_RUN, notes=notes, is_failure=True)
            continue
        yield run_part(part, granted, log)


def run_part(part: Part, granted: float, log: Path) -> Outcome:
    begin = time.monotonic()
    outcome = Outcome(part.name, PASSED)
    with log.open("a", encoding="utf-8", errors="replace") as stream:
        start = stream.tell()
        for command in part.commands(granted):
            stream.write(f"\n===== {part.name}: {' '.join(command)}\n")
            stream.flush()
            left = granted - (time.monotonic() - begin)
            status = run_command(command, left, part.environment, stream.fileno())
            if status is None:
                outcome.notes.append(f"stopped after {granted:.0f} s")
            elif status:
                outcome.notes.append(f"exit status {status}")
            if status != 0:
                outcome.status, outcome.is_failure = FAILED, True
                break
    outcome.seconds = time.monotonic() - begin
    if part.examine is not None:
        with log.open(encoding="utf-8", errors="replace") as stream:
            stream.seek(start)
            part.examine(outcome, stream.read())
    return outcome


def run_command(command: Sequence[str], seconds: float, environment: dict[str, str], output: int) -> int | None:
    """The exit status; None if it was stopped, with all that it had started, because its time was up."""
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        os.write(output, f"{error}\n".encode())
        return 127
    try:
        return process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    except BaseException:  # an interrupt must not leave work behind on the GPU
        os.killpg(process.pid, signal.SIGKILL)
        raise
