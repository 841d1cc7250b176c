"""Nested containers changed at random: dropped, added, exchanged, replaced, at any depth."""

import copy
from collections import OrderedDict
from random import Random
from typing import Any

from torch import Tensor

from tests.fuzzing import junk


def places(value: Any, random: Random, chance: float = 0.35) -> tuple[Any, Any]:
    """A container at random, outer ones more often, and one of its keys or indices."""
    while True:
        keys = keys_of(value)
        key = random.choice(keys)
        inner = item(value, key)
        if not isinstance(inner, (dict, list)) or not keys_of(inner) or random.random() < chance:
            return value, key
        value = inner


def item(container: Any, key: Any) -> Any:
    return dict.__getitem__(container, key) if isinstance(container, dict) else container[key]


def keys_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def mutate(root: Any, random: Random) -> None:
    """Change one thing within nested dicts and lists, in place."""
    if not keys_of(root):
        return
    container, key = places(root, random)
    kind = random.randrange(9)
    old = item(container, key)
    if kind == 0:
        del container[key]
    elif kind == 1:
        put(container, random.choice((junk.value(random), -1, 10**30, "0", 0.0, True, (0,), old_key(key))), old, random)
    elif kind == 2:
        other, other_key = places(root, random)
        container[key], other[other_key] = item(other, other_key), old
    elif kind == 3:
        container[key] = places(root, random)[0]  # may be cyclic
    elif kind == 4:
        other, other_key = places(root, random)
        container[key] = item(other, other_key)
    elif kind == 5 and isinstance(old, dict):
        wrap = random.choice((OrderedDict, junk.Dict, junk.LyingDict, lambda items: list(items.items())))
        container[key] = wrap(dict(dict.items(old)))
    elif kind == 5 and isinstance(old, list):
        container[key] = random.choice((tuple, enumerate, iter, lambda items: items + items))(old)
    elif isinstance(old, Tensor):
        container[key] = junk.spoil(old, random)
    elif isinstance(old, (int, float)) or old is None:
        container[key] = junk.number(random) if random.random() < 0.7 else junk.value(random)
    else:
        container[key] = junk.value(random)


def old_key(key: Any) -> Any:
    return str(key) if isinstance(key, int) else key


def put(container: Any, key: Any, value: Any, random: Random) -> None:
    """Add an entry: under a strange key of a dict, anywhere in a list."""
    if isinstance(container, list):
        container.insert(random.randrange(len(container) + 1), key)
        return
    try:
        container[key] = value
    except TypeError:  # not hashable
        container["unhashable"] = key


def copied(value: Any) -> Any:
    """Containers copied, tensors cloned, all else shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    if type(value) is tuple:
        return tuple(map(copied, value))
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
