"""What may be done with a tensor's memory: torch's operations die of some tensors, and write some in part only."""

import torch
from torch import Tensor


def is_nested(tensor: Tensor) -> bool:
    """Whether this is a nested tensor of torch's core, or the data of one of its subclass, put into a plain tensor by
    hand: of that, torch's operations die."""
    return tensor.is_nested and tensor.layout == torch.strided


def has_leaked(tensor: Tensor) -> bool:
    """Whether it belongs to a functorch transform that has ended: nothing can be done with it."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) and functorch.peek_interpreter_stack() is None


def may_read(tensor: Tensor) -> bool:
    """Whether torch's own operations may read a tensor: they die of one whose storage was freed or cut short."""
    if is_nested(tensor) or has_leaked(tensor):
        return False
    try:
        return tensor.is_meta or tensor.layout != torch.strided or within_storage(tensor)
    except (RuntimeError, NotImplementedError):  # a subclass that wraps others has none of its own
        return True


def check_may_read(tensor: Tensor, name: str) -> None:
    if not may_read(tensor):
        raise ValueError(f"{name} has no memory: its storage was freed or resized")


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers, and reading it runs no code of a tensor subclass."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor._is_zerotensor():
        return False
    is_lazy = tensor.is_neg() or tensor.is_conj()
    return not is_lazy and not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)


WHY_NOT_WRITTEN = (
    "it has no memory, is an inference tensor outside of InferenceMode, or more than one of its elements refers to a "
    "single memory location"
)


def may_write(tensor: Tensor) -> bool:
    """Whether values can be copied into a tensor that was made for state, whatever was done to it since."""
    if not may_read(tensor) or tensor._is_zerotensor():
        return False
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return tensor.is_meta or tensor.layout != torch.strided or tensor.is_contiguous() or is_dense(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether no two elements lie in one place, as far as the order of strides tells."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def may_go_into(value: Tensor, tensor: Tensor) -> bool:
    """Whether functorch can write what is made of a value into a tensor: not where the value alone belongs to one of
    its transforms. torch's update would fail halfway."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return wrapped(tensor) or not wrapped(value)


def within_storage(tensor: Tensor) -> bool:
    """False where the memory of a strided tensor has been freed or cut short."""
    last = tensor.storage_offset() + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size()


def laid_out_as(moment: Tensor, param: Tensor) -> bool:
    """Whether both put their elements in the same order; strides of dimensions of size 1 do not matter."""
    expected = torch.empty_like(param, device="meta", memory_format=torch.preserve_format).stride()
    return all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(moment.shape, moment.stride(), expected, strict=True)
    )


def laid_out_copy(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return copy.copy_(value)
