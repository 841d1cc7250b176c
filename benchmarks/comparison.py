"""One workload, stepped by all peers: times, ratios, and what else a step takes."""

from subprocess import CalledProcessError
from typing import Any

import torch
from torch.nn import Parameter

from benchmarks.allocations import allocated_bytes
from benchmarks.clocks import Step, clocks_on
from benchmarks.measure import Samples, interleaved, quartiles, ratios, seconds_in
from benchmarks.peers import OURS, Peer, peers_on
from benchmarks.subsets import free_bytes, release, subsets
from benchmarks.workloads import Workload, randomize

Result = dict[str, Any]

SLOW_PART = 0.1  # of the time that other groups get


def measure(workload: Workload, device: str, budget: float) -> Result:
    """The result of ``budget`` seconds of timing (and some of preparing), in the form that goes into the JSON."""
    peers = peers_on(device)
    groups = subsets(peers, workload, free_bytes(device))
    params = workload.make_params(device)
    shares = [SLOW_PART if any(peers[name].is_slow for name in names) else 1.0 for names in groups]
    group_results = [
        measure_group(names, peers, params, device, budget * share / sum(shares))
        for names, share in zip(groups, shares, strict=True)
    ]
    if not all(param.isfinite().all() for param in params):
        raise RuntimeError(f"params of {workload.name} are no longer finite: the times mean nothing")
    return summarise(workload, device, peers, group_results)


def measure_group(
    names: list[str], peers: dict[str, Peer], params: list[Parameter], device: str, budget: float
) -> Result:
    """Samples by clock, allocations and failures of these peers; their optimizers are gone when it returns."""
    if device == "cuda":
        release()
    failures: dict[str, str] = {}
    steps = make_steps({name: peers[name] for name in names}, params, failures)
    clocks = clocks_on(device)
    samples: dict[str, Samples] = {}
    for clock in clocks:
        timed = {name: step for name, step in steps.items() if clock.times(peers[name].is_floor)}
        rounds = {"least_rounds": 5, "warm_up_steps": 1} if any(peers[name].is_slow for name in names) else {}
        samples[clock.prefix] = interleaved(timed, clock.seconds_of, budget / len(clocks), **rounds)
    allocated = {name: allocated_bytes(step, device) for name, step in steps.items()}
    return {"samples": samples, "allocated_bytes": allocated, "failures": failures}


def make_steps(peers: dict[str, Peer], params: list[Parameter], failures: dict[str, str]) -> dict[str, Step]:
    """The steps that work. A rival that cannot be made or does not update every element is a failure, not an end."""
    steps = {}
    for name, peer in peers.items():
        try:
            step = peer.make_step(params)
            if not peer.is_floor:
                check_updates(name, step, params)
            steps[name] = step
        except Exception as error:
            if name == OURS or peer.is_floor:
                raise
            failures[name] = reason(error)
    randomize(params)
    return steps


def reason(error: Exception) -> str:
    """One line, without the traces and command lines that some errors carry."""
    text = "" if isinstance(error, CalledProcessError) else f": {str(error).strip()}"
    return f"{type(error).__name__}{text}".partition("\n")[0].rstrip(".")


@torch.no_grad()
def check_updates(name: str, step: Step, params: list[Parameter]) -> None:
    """Raise unless a step moves every element that has a gradient: time of work not done means nothing."""
    for param in params:
        param.zero_()
    step()
    missed = sum(int(((param == 0) & (param.grad != 0)).sum()) for param in params)
    if missed:
        raise RuntimeError(f"a step of {name} left {missed:,} elements as they were")


def summarise(workload: Workload, device: str, peers: dict[str, Peer], groups: list[Result]) -> Result:
    # What libraries that compile or fill the caches leave behind in a group says nothing about the others' times.
    undisturbed = [group for group in groups if not any(peers[name].is_slow for name in group["allocated_bytes"])]
    result: Result = {
        "title": workload.title,
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "step_bytes": workload.step_bytes,
        "rounds": sum(len(group["samples"][""][OURS]) for group in undisturbed),
        "peers": {},
    }
    for name, peer in peers.items():
        allocated = [group["allocated_bytes"][name] for group in groups if name in group["allocated_bytes"]]
        if not allocated:
            continue
        entry: Result = {"allocated_bytes": max(allocated)}
        for clock in clocks_on(device):
            parts = [group["samples"][clock.prefix] for group in (groups if peer.is_slow else undisturbed)]
            if seconds := seconds_in(parts, name):
                entry[clock.seconds] = quartiles(seconds)
                entry[clock.ratio] = quartiles(ratios(parts, name, OURS))
        parts = [group["samples"][""] for group in undisturbed]
        if peer.against != OURS and (against := ratios(parts, name, peer.against)):
            entry["against"] = {"peer": peer.against, "ratio": quartiles(against)}
        if peer.is_floor:
            result["ours_over_floor"] = quartiles(ratios(parts, OURS, name))
        entry["gigabytes_per_second"] = workload.step_bytes / entry["seconds"]["median"] / 1e9
        result["peers"][name] = entry
    if failures := {name: text for group in groups for name, text in group["failures"].items()}:
        result["failures"] = failures
    return result
