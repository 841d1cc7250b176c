"""Which peers are measured together where the device's memory does not hold all of them at once."""

import gc

import torch

from benchmarks.peers import OURS, Peer
from benchmarks.workloads import Workload

KEPT_FREE = 0.06  # of the device's memory: for the allocator's rounding and for what libraries load


def free_bytes(device: str) -> int | None:
    """What tensors may take; None: not counted."""
    if device == "cpu":
        return None
    release()
    free, total = torch.cuda.mem_get_info()
    return free - round(KEPT_FREE * total)


def release() -> None:
    """Give the device the memory of tensors that are gone."""
    gc.collect()
    torch.cuda.empty_cache()


def subsets(peers: dict[str, Peer], workload: Workload, free: int | None) -> list[list[str]]:
    """Lists of names that fit into ``free`` bytes each, with ours and the floors in every list.

    Two peers whose ratio is wanted are never parted. A slow peer has a list to itself, after the others. A peer that
    fits nowhere raises MemoryError.
    """
    always = [name for name, peer in peers.items() if name == OURS or peer.is_floor]
    sets: list[list[str]] = []
    for name in peers:
        if name in always or peers[name].is_slow:
            continue
        wanted = [peers[name].against, name]
        fitting = next((chosen for chosen in sets if fits(chosen + wanted, peers, workload, free)), None)
        if fitting is None:
            fitting = list(always)
            if not fits(fitting + wanted, peers, workload, free):
                raise MemoryError(f"{workload.name}: {name} with its rivals does not fit into {free:,} bytes")
            sets.append(fitting)
        fitting += [one for one in wanted if one not in fitting]
    alone = [[*always, name] for name, peer in peers.items() if peer.is_slow]
    return [[name for name in peers if name in chosen] for chosen in [*(sets or [always]), *alone]]


def fits(names: list[str], peers: dict[str, Peer], workload: Workload, free: int | None) -> bool:
    shared = 2 * workload.numel * workload.dtype.itemsize  # params and gradients
    return free is None or shared + sum(peers[name].memory(workload) for name in set(names)) <= free
