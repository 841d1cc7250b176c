"""Whose turn it is: one thread at a time in an optimizer, and none in the middle of a step when the process forks."""

import os
from threading import RLock
from weakref import WeakSet

# Of all optimizers. The lock is for the set, and held during a fork.
_turns: "WeakSet[RLock]" = WeakSet()
_registering = RLock()
_held: list[RLock] = []


def take_turns() -> RLock:
    """A lock for one optimizer's steps and changes. A fork waits until nobody but the thread that forks has it: the
    child gets no half-updated params, and no lock of a thread that it does not have."""
    turn = RLock()
    with _registering:
        _turns.add(turn)
    return turn


def _hold_all() -> None:
    """Waits for one turn only while it holds nothing else: threads may hold several, taken in any order."""
    with _registering:
        turns = list(_turns)
    while turns:
        turns[0].acquire()
        busy = next((i for i in range(1, len(turns)) if not turns[i].acquire(blocking=False)), None)
        if busy is None:
            break
        for turn in turns[:busy]:
            turn.release()
        turns[0], turns[busy] = turns[busy], turns[0]
    _registering.acquire()
    _held.extend(turns)


def _release_all() -> None:
    while _held:
        _held.pop().release()
    _registering.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)
