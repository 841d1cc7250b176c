"""Programs that end while they use an optimizer, each in a process of its own (`python -m tests.exits`).

Writes {name: [exit status, seconds, stderr]} as JSON. The processes are forked from this one, which has loaded torch
but has started no thread; each runs its program and then ends as Python does at the end of a main module.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings

import torch

import adamw_ext

SECONDS = 30.0  # that a program may take

# What every program begins with. The param is large enough for its steps to let other threads run.
BEGIN = """
import atexit, os, sys, threading, time, torch
from adamw_ext import AdamW
param = torch.zeros(1 << 18, requires_grad=True)
param.grad = torch.ones(1 << 18)
optimizer = AdamW([param], lr=0.1)
optimizer.step()
def step():
    before = param[0].item()
    optimizer.step()
    assert param[0].item() < before
"""

FOREVER = """
def work():
    while True:
        {}
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
"""

# By name: the program, its exit status, and what the last line of its stderr says.
PROGRAMS: dict[str, tuple[str, int, str]] = {
    "a live optimizer": ("", 0, ""),
    "in a reference cycle": ("optimizer.itself = optimizer; param.optimizer = optimizer; del optimizer, param", 0, ""),
    "used in an atexit handler": ("atexit.register(step)", 0, ""),
    # torch's own optimizers end in these words there, too: torch imports something in every step.
    "used in __del__ when modules are gone": (
        "class Owner:\n  def __del__(self): step()\nowner = Owner()",
        0,
        "ImportError: sys.meta_path is None, Python is likely shutting down",
    ),
    "used in a hook of its param": ("param.register_post_accumulate_grad_hook(lambda p: step())", 0, ""),
    "a thread that is no daemon": ("threading.Thread(target=lambda: [step() for _ in range(20)]).start()", 0, ""),
    "a daemon thread that steps": (FOREVER.format("optimizer.step()"), 0, ""),
    "a thread that an atexit handler joins": (
        "done = threading.Event()\n"
        "def work():\n  while not done.is_set(): optimizer.step()\n"
        "thread = threading.Thread(target=work, daemon=True)\nthread.start()\n"
        "atexit.register(lambda: (done.set(), thread.join()))",
        0,
        "",
    ),
    "sys.exit in a step hook": ("optimizer.register_step_pre_hook(lambda *_: sys.exit(3)); step()", 3, ""),
    "sys.exit in a gradient hook": (
        "param.register_post_accumulate_grad_hook(lambda p: sys.exit(4)); param.sum().backward()",
        4,
        "",
    ),
    "sys.exit in a closure": ("optimizer.step(lambda: sys.exit(5))", 5, ""),
    "an error in a step hook": (
        "def fail(*_): raise ValueError('from the hook')\noptimizer.register_step_post_hook(fail); step()",
        1,
        "ValueError: from the hook",
    ),
    "a script optimizer": (
        "script = torch.classes.adamw_ext.AdamW([param.detach()]); script.step([param.grad])",
        0,
        "",
    ),
}


def start(source: str) -> tuple[int, int]:
    """In the parent: the child's process id, and the end of a pipe with its stderr. In the child: id 0."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child != 0:
        os.close(write)
        return child, read
    os.dup2(write, 2)
    os.close(read)
    exec(compile(BEGIN + source, "program", "exec"), vars(sys.modules["__main__"]))
    return 0, read


def finish(child: int, read: int) -> tuple[int, float, str]:
    """Waits for the child to end, and kills it when its time is up."""
    begin = time.monotonic()
    stderr = b""
    while True:
        left = begin + SECONDS - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            break
        if not (some := os.read(read, 65536)):
            break
        stderr += some
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(read)
    return status, time.monotonic() - begin, stderr.decode(errors="replace")


def main() -> None:
    adamw_ext.AdamW([torch.zeros(1, requires_grad=True)])  # loads what torch loads late
    started = {}
    for name, (source, _, _) in PROGRAMS.items():
        started[name] = start(source)
        if started[name][0] == 0:
            return
    print(json.dumps({name: finish(*process) for name, process in started.items()}))


if __name__ == "__main__":
    main()
