"""Values that nobody should hand over: numbers, tensors and objects, chosen by a random generator."""

import contextlib
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NAN, INF = float("nan"), float("inf")


class Planted(Exception):
    """Raised by objects of this file, and so no error of the package."""


class Int(int):
    pass


class Float(float):
    pass


class Text(str):
    pass


class Dict(dict):
    pass


class RaisesWhenRead:
    """Raises at every kind of use."""

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise Planted("read")

    __float__ = __int__ = __index__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __call__ = _raise
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __mul__ = __rmul__ = keys = items = _raise


class RaisesWhenShown:
    def __repr__(self) -> str:
        raise Planted("shown")


class RaisesWhenCompared:
    def __eq__(self, other: object) -> bool:
        raise Planted("compared")

    __hash__ = object.__hash__


class ShowsSurrogates:
    def __repr__(self) -> str:
        return "\ud800"


class Lies:
    """Says that it has another length than it has, and other items each time."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def __len__(self) -> int:
        return self.random.choice((0, 1, 2, 3, 2**40))

    def __iter__(self) -> Any:
        return iter([0.1] * self.random.randrange(4))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index > 3:
            raise IndexError(index)
        return self.random.choice((0, 1.0, "params", [], {}))

    def __float__(self) -> float:
        return self.random.choice((NAN, -1.0, 0.1, INF))

    def __bool__(self) -> bool:
        return self.random.random() < 0.5

    def keys(self) -> list[str]:
        return ["state", "param_groups", "params", "step"][: self.random.randrange(5)]


class ReturnsNoNumber:
    def __float__(self) -> Any:
        return "0.1"

    __int__ = __index__ = __bool__ = __len__ = __float__


class LyingDict(dict):
    """A dict whose methods do not agree with its content."""

    def __getitem__(self, key: Any) -> Any:
        raise Planted("item")

    def get(self, key: Any, default: Any = None) -> Any:
        return default

    def keys(self) -> Any:
        return {"params", "lr"}


class Passive(Tensor):
    """A subclass that changes nothing."""


class Refusing(Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise Planted("torch function")


class Wrapping(Tensor):
    """Has no memory of its own, and no operation."""

    @staticmethod
    def __new__(cls, like: Tensor) -> "Wrapping":
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise Planted("torch dispatch")


# What torch and numpy raise where they make none of these of a tensor.
UNMADE = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, MemoryError, Planted)

_UNDERLYING = torch.ones(3, 4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _QUANTISED = torch.quantize_per_tensor(_UNDERLYING, 0.1, 0, torch.qint8)


def freed(tensor: Tensor) -> Tensor:
    """A tensor of the same shape whose memory is gone. torch's own operations die of it."""
    copy = tensor.detach().clone()
    copy.untyped_storage().resize_(0)
    return copy


def cut_short(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    copy.untyped_storage().resize_(copy.untyped_storage().nbytes() // 2)
    return copy


def moved_past_its_end(tensor: Tensor) -> Tensor:
    """Lies within its storage by its first element only."""
    buffer = torch.zeros(2 * tensor.numel() + 8, dtype=tensor.dtype)
    view = buffer[tensor.numel() + 8 :].view(tensor.shape)
    buffer.untyped_storage().resize_((tensor.numel() + 9) * tensor.itemsize)
    return view


def non_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_() * 1 if tensor.is_floating_point() else tensor


def fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor.detach().clone())


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


def batched(tensor: Tensor) -> Tensor:
    """As it leaks out of vmap."""
    return torch._C._functorch._add_batch_dim(tensor.detach().clone().unsqueeze(0), 0, 1)


def overlapping(tensor: Tensor) -> Tensor:
    return torch.as_strided(torch.zeros(tensor.numel() + 8, dtype=tensor.dtype), tensor.shape, (1,) * tensor.dim())


def spaced(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0]


def backwards(tensor: Tensor) -> Tensor:
    order = tuple(reversed(range(tensor.dim())))
    return tensor.detach().clone().permute(order).contiguous().permute(order)


# What a tensor may be changed into, most of it of the same shape.
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "freed": freed,
    "cut short": cut_short,
    "past its end": moved_past_its_end,
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "fake": fake,
    "sparse": lambda t: t.detach().clone().to_sparse(),
    "csr": lambda t: t.detach().reshape(1, -1).to_sparse_csr(),
    "quantised": lambda t: _QUANTISED,
    "mkldnn": lambda t: t.detach().float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.detach()]),
    "jagged": lambda t: torch.nested.nested_tensor([t.detach()], layout=torch.jagged),
    "int64": lambda t: t.detach().to(torch.int64),
    "bool": lambda t: t.detach().to(torch.bool),
    "uint8": lambda t: t.detach().to(torch.uint8),
    "float64": lambda t: t.detach().to(torch.float64),
    "float32": lambda t: t.detach().to(torch.float32, copy=True),
    "float16": lambda t: t.detach().to(torch.float16),
    "bfloat16": lambda t: t.detach().to(torch.bfloat16),
    "float8": lambda t: t.detach().float().to(torch.float8_e4m3fn),
    "complex": lambda t: t.detach().to(torch.complex64),
    "conjugate": lambda t: t.detach().to(torch.complex64).conj(),
    "negative": lambda t: torch._neg_view(t.detach().clone()),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "lazy clone": lambda t: torch._lazy_clone(t.detach()),
    "transposed": backwards,
    "spaced": spaced,
    "expanded": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "overlapping": overlapping,
    "huge": lambda t: torch.ones((), dtype=t.dtype).expand(2**40, 2**20),
    "empty": lambda t: t.detach().flatten()[:0].clone(),
    "shorter": lambda t: t.detach().flatten()[: t.numel() // 2].clone(),
    "flat": lambda t: t.detach().clone().flatten(),
    "deeper": lambda t: t.detach().clone()[None],
    "scalar": lambda t: torch.zeros((), dtype=t.dtype),
    "nan": lambda t: torch.full_like(t, NAN),
    "infinite": lambda t: torch.full_like(t, INF),
    "large": lambda t: torch.full_like(t, 3e38 if t.dtype != torch.float16 else 6e4),
    "other values": lambda t: t.detach() + 1,
    "requires grad": lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    "non-leaf": non_leaf,
    "parameter": lambda t: torch.nn.Parameter(t.detach().clone(), requires_grad=False),
    "inference": inference,
    "batched": batched,
    "passive": lambda t: t.detach().clone().as_subclass(Passive),
    "refusing": lambda t: t.detach().clone().as_subclass(Refusing),
    "wrapping": Wrapping,
    "numpy": lambda t: t.detach().float().numpy().copy(),
    "list": lambda t: t.detach().tolist(),
}


def is_damaged(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return tensor.is_nested and tensor.layout == torch.strided
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() < needed


DAMAGED = ("freed", "cut short", "past its end")
_kinds = list(SPOILED)


@contextlib.contextmanager
def readable_only(condition: bool = True) -> Iterator[None]:
    """No damaged memory within: for calls that torch may refuse by itself, in words that show the tensors' numbers, of
    which the process would die."""
    global _kinds
    before = _kinds
    _kinds = [kind for kind in SPOILED if kind not in DAMAGED] if condition else before
    try:
        yield
    finally:
        _kinds = before


def spoil(tensor: Any, random: Random) -> Any:
    """Something else in the place of a tensor."""
    if not isinstance(tensor, Tensor) or random.random() < 0.15:
        return value(random)
    if is_damaged(tensor):  # of which torch makes nothing else, and dies
        keeps_shape = not tensor.is_nested and tensor.numel() < 1000
        tensor = torch.ones(tensor.shape if keeps_shape else 3, dtype=tensor.dtype)
    for _ in range(10):
        try:
            return SPOILED[random.choice(_kinds)](tensor)
        except UNMADE:
            continue
    return None


def number(random: Random) -> Any:
    """What may stand in the place of a number or a flag."""
    plain = (NAN, INF, -INF, -1.0, -0.0, 0.0, 0.5, 1.0, 1e308, 5e-324, 1e-3, 0, 1, -1, 2, True, False, 2**63, 2**64)
    odd = (10**400, -(10**400), 2**1023, Int(1), Float(0.25), Fraction(1, 3), Decimal("0.1"), 1j)
    numpys = (
        numpy.float32(0.1),
        numpy.float64(0.5),
        numpy.float16(0.5),
        numpy.float64("nan"),
        numpy.int64(3),
        numpy.uint8(1),
        numpy.bool_(True),
        numpy.complex64(1j),
        numpy.array(0.1),
        numpy.array([0.1]),
        numpy.array([0.1, 0.2]),
        numpy.array(["0.1"]),
        numpy.datetime64("2000-01-01"),
    )
    kind = random.randrange(5)
    return random.choice(plain if kind < 2 else odd if kind == 2 else numpys) if kind < 4 else scalar_tensor(random)


def scalar_tensor(random: Random) -> Any:
    made = torch.tensor(random.choice((0.1, 0.5, NAN, INF, -1.0, 0.0, 3.0)))
    return made if random.random() < 0.3 else spoil(made, random)


def thing(random: Random) -> Any:
    """What is no number."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: "",
        lambda: "0.1",
        lambda: "fp32",
        lambda: "split",
        lambda: "\ud800",
        lambda: "\0",
        lambda: Text("lr"),
        lambda: b"0.1",
        lambda: bytearray(b"1"),
        lambda: [],
        lambda: [0.1],
        lambda: [0.9, 0.99],
        lambda: (0.9, 0.99),
        lambda: (0.9,),
        lambda: (),
        lambda: {},
        lambda: {0.1},
        lambda: {"a": 1},
        lambda: range(2),
        lambda: iter((0.5, 0.5)),
        lambda: (0.5 for _ in range(2)),
        lambda: slice(None),
        lambda: ...,
        lambda: NotImplemented,
        lambda: object(),
        lambda: float,
        lambda: len,
        lambda: lambda: 0.1,
        lambda: torch.float32,
        lambda: torch.bfloat16,
        lambda: torch.int8,
        lambda: torch.device("meta"),
        lambda: torch.Size([2]),
        lambda: torch.nn.Linear(1, 1),
        lambda: torch.UntypedStorage(4),
        lambda: OrderedDict(a=1),
        lambda: UserDict(a=1),
        lambda: defaultdict(dict),
        lambda: Dict(a=1),
        lambda: LyingDict(a=1),
        lambda: Lies(random),
        RaisesWhenRead,
        RaisesWhenShown,
        RaisesWhenCompared,
        ShowsSurrogates,
        ReturnsNoNumber,
        cyclic_dict,
        cyclic_list,
        lambda: deep_list(3000),
        lambda: torch.zeros(2, 3),
    )
    return random.choice(makers)()


def value(random: Random) -> Any:
    return number(random) if random.random() < 0.5 else thing(random)


def cyclic_dict() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["self"] = made
    return made


def cyclic_list() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def deep_list(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made
