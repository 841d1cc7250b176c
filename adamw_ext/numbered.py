"""Optimizers by number: what a compiled graph, which can hold no Python object, knows an optimizer by."""

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from adamw_ext.optimizer import AdamW

numbered: "WeakValueDictionary[str, AdamW]" = WeakValueDictionary()
_count = itertools.count()


def take_number(optimizer: "AdamW") -> str:
    """A number that no other optimizer of this process has had. A string: dynamo makes ints that differ symbolic."""
    number = str(next(_count))
    numbered[number] = optimizer
    return number
