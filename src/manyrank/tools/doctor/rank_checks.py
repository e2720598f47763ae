"""What the facts of the ranks mean (see `ranks`): a `Check` for each stage, reached or not. No torch."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .checks import Check, State, counted, failed, gib, ok, speed, warning
from .launch import Ended, How

Facts = Mapping[str, Any]

STAGES = (
    "start",
    "model",
    "process group",
    "same software",
    "all-reduce",
    "clocks",
    "output folder",
    "step",
    "save and load",
)
TOGETHER = ("process group", "same software", "all-reduce", "clocks")  # stages that one process does not have
PART_OF_LINK = 0.4  # of a link's figure that an all-reduce of large messages reaches at least
CLOCK_OK, CLOCK_LATE = 1.0, 60.0  # seconds
LOSS_DIFFERENCE = {"no": 1e-5, "bf16": 2e-2}  # of a step that is taken again, as `manyrank verify` allows it
DRIFT = 0.1  # of what a step changes; an adapter that was not loaded is off by all of it
# What two machines must not have otherwise: their ranks run one program together.
MUST_AGREE = ("torch", "nccl", "cuda", "manyrank", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
HELP = {
    "start": "see that Python, torch and the driver fit each other",
    "model": "see that the model can be read here",
    "process group": "name the network device: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; open the ports between the machines",
    "same software": "name the network device: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
    "all-reduce": "set NCCL_DEBUG=INFO and start it again; name the network device: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME",
    "clocks": "name the network device: GLOO_SOCKET_IFNAME",
    "output folder": "see that the file system answers",
    "step": "try it alone: manyrank train fast_test; DeepSpeed compiles when it is first used: once --limit 300",
    "save and load": "see that the file system of the output folder can lock, sync and rename",
}


def judged(found: Facts, *, ranks: int) -> list[Check]:
    """A check for each stage that rank 0 has come through, in order."""
    judges: dict[str, Callable[[Facts], list[Check]]] = {
        "process group": lambda facts: [group(facts)],
        "same software": lambda facts: same(facts["machines"]),
        "all-reduce": lambda facts: all_reduce(facts, machines=found["same software"]["machines"]),
        "clocks": lambda facts: [clocks(facts["offsets"])],
        "output folder": lambda facts: [folder(facts)],
        "step": lambda facts: [step(facts)],
        "save and load": lambda facts: [save_and_load(facts, found["step"])],
    }
    checks = [] if ranks > 1 else [ok(name, "one rank: not needed") for name in TOGETHER]
    return checks + [check for name, judge in judges.items() if name in found for check in judge(found[name])]


def not_reached(
    found: Facts, ended: Ended, places: Sequence[tuple[int, str]], *, ranks: int, problem: Facts | None = None
) -> list[Check]:
    """The stage in which the ranks ended too early, which has failed, and those after it, which nobody knows.

    Args:
        found: of rank 0, by stage.
        places: each unfinished rank and its stage; the one to blame first. None: no rank has begun.
        problem: what the rank to blame said.
    """
    missing = [name for name in STAGES if name not in found and (ranks > 1 or name not in TOGETHER)]
    if ended.how == How.DONE:  # without a folder to train in, there is no step
        return [_unknown(name, "not tried, without an output folder") for name in missing]
    stage = places[0][1] if places else STAGES[0]
    what, fix = _why(ended, places, problem)
    rest = [name for name in missing if name != stage]
    return [
        failed(stage, what, fix or HELP[stage]),
        *(_unknown(name, f"not reached: {stage} failed") for name in rest),
    ]


def _unknown(name: str, seen: str) -> Check:
    return Check(name, State.WARNING, seen)


def _why(ended: Ended, places: Sequence[tuple[int, str]], problem: Facts | None) -> tuple[str, str]:
    """What is said of the end; and what to do, if that does not follow from the stage."""
    if problem:
        return f"rank {places[0][0]}: {problem['what']}", problem["fix"]
    if ended.how == How.APART:
        fix = "start the same command on every machine, with the same --nnodes and --rdzv_endpoint; open its port"
        return f"the machines did not meet. {ended.words}", fix
    if ended.how == How.LATE:
        fix = f"{HELP[places[0][1]]}; or give the ranks longer: --limit"
        return f"the time was over: {_whereabouts(places)}", fix
    who = "the launcher" if ended.rank is None else f"rank {ended.rank}"
    if ended.code == -signal.SIGKILL:
        fix = "see in dmesg whether memory was short: then start fewer processes"
        return f"{who} was killed", fix
    if ended.code < 0:
        return f"{who} was ended by {signal.Signals(-ended.code).name}", ""
    return f"{who} ended with code {ended.code}. {ended.words}", ""


def _whereabouts(places: Sequence[tuple[int, str]]) -> str:
    stages = {stage: [rank for rank, at in places if at == stage] for _, stage in places}
    return "; ".join(f"rank {', '.join(map(str, ranks))} in {stage}" for stage, ranks in stages.items())


# Each machine


def model(facts: Facts) -> Check:
    """The recipe's model as a machine can read it."""
    name = facts["name"]
    if "what" in facts:
        return failed("model", f"{name}: {facts['what']}", facts["fix"] or "give a model that every machine can read")
    if "kind" not in facts:
        return ok("model", f"{name}: made when it is first used")
    where = f"{gib(facts['bytes'])} of weights" if facts["bytes"] else "weights on the hub or in its cache"
    return ok("model", f"{name}: {facts['kind']}, {facts['tokens']:,} tokens, {where}", bytes=facts["bytes"])


# All ranks


def group(facts: Facts) -> Check:
    return ok("process group", f"{facts['ranks']} ranks over {facts['backend']}", **facts)


def same(machines: Sequence[Facts]) -> list[Check]:
    """Whether all machines have the same software, recipe, model and data."""
    if len(machines) == 1:
        return [ok("same software", "one machine: nothing to compare")]
    hosts = [machine["host"] for machine in machines]
    software = [
        {**machine["machine"]["software"], "nccl": machine.get("nccl"), "GPU": machine["device"]}
        for machine in machines
    ]
    recipes = [{**machine["machine"]["recipe"], "model": machine["model"].get("digest")} for machine in machines]
    return [_same_software(hosts, software), _same_recipe(hosts, recipes)]


def _same_software(hosts: Sequence[str], told: Sequence[Facts]) -> Check:
    name, differ = "same software", _differences(hosts, told)
    if not differ:
        return ok(name, f"on {len(hosts)} machines", machines=list(hosts))
    make = failed if set(differ) & set(MUST_AGREE) else warning
    return make(name, "; ".join(differ.values()), "install the same versions on every machine", machines=list(hosts))


def _same_recipe(hosts: Sequence[str], told: Sequence[Facts]) -> Check:
    name, differ = "same recipe", _differences(hosts, told)
    if not differ:
        return ok(name, f"and the same data and model on {len(hosts)} machines", machines=list(hosts))
    return failed(name, "; ".join(differ.values()), "give every machine the same files", machines=list(hosts))


def _differences(hosts: Sequence[str], told: Sequence[Facts]) -> dict[str, str]:
    """For each entry that a machine has otherwise than the first one: what the two have."""
    return {
        entry: f"{entry} is {told[0].get(entry)} on {hosts[0]} and {values.get(entry)} on {host}"
        for host, values in zip(hosts[1:], told[1:])
        for entry in sorted({*told[0], *values})
        if told[0].get(entry) != values.get(entry)
    }


def all_reduce(facts: Facts, *, machines: Sequence[Facts]) -> list[Check]:
    """Sums and bandwidth of all ranks, and of those of one machine where there are several machines."""
    links = [machine["machine"]["links"] for machine in machines]
    several = len(machines) > 1
    checks = [_exchange("all-reduce", facts["all"], _slowest(links, "network" if several else "local"))]
    if facts.get("machine"):
        checks.append(_exchange("local all-reduce", facts["machine"], _slowest(links, "local")))
    return checks


def _slowest(links: Sequence[Facts], kind: str) -> Facts:
    """The slowest link of a kind; without a figure where one machine has none."""
    return min((entry[kind] for entry in links), key=lambda link: link["speed"] or 0.0)


def _exchange(name: str, sizes: Sequence[Facts], link: Facts) -> Check:
    small, large = sizes
    figures = {"sizes": list(sizes), "link": dict(link)}
    wrong = max(small["wrong"], large["wrong"])
    if wrong:
        fix = "try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the link that is broken; test that hardware"
        return failed(name, f"the sum is wrong on {wrong} ranks", fix, **figures)
    bus = large["bus_bandwidth"]
    seen = (
        f"{large['ranks']} ranks, {large['bytes'] >> 20} MiB: {speed(large['algorithm_bandwidth'])}, {speed(bus)} on the bus; "
        f"{small['bytes'] >> 10} KiB: {small['seconds'] * 1e6:,.0f} us"
    )
    if not link["speed"]:
        return ok(name, f"{seen}; {link['name']} has no figure to compare with", **figures)
    part = bus / link["speed"]
    seen += f"; {part:.0%} of {link['name']}, {speed(link['speed'])}"
    figures["part_of_link"] = part
    if part < PART_OF_LINK:
        fix = "see with NCCL_DEBUG=INFO which way it takes (or GLOO_SOCKET_IFNAME), and that nobody else uses it"
        return warning(name, seen, fix, **figures)
    return ok(name, seen, **figures)


def clocks(offsets: Sequence[Facts]) -> Check:
    """The watch on hanging ranks compares the times of several machines, as do logs and the users of files."""
    name = "clocks"
    if not offsets:
        return ok(name, "one machine: nothing to compare", offsets=[])
    worst = max(offsets, key=lambda told: abs(told["offset"]))
    size, error = abs(worst["offset"]), worst["error"]
    seen = f"{worst['host']} is {size * 1e3:,.1f} ms {'ahead' if worst['offset'] > 0 else 'behind'} (within {error * 1e3:,.1f} ms)"
    figures, fix = {"offsets": list(offsets)}, "set the clocks by NTP: timedatectl set-ntp true, or chronyc makestep"
    if size > CLOCK_LATE:
        return failed(name, seen, fix, **figures)
    return warning(name, seen, fix, **figures) if size > CLOCK_OK else ok(name, seen, **figures)


def folder(facts: Facts) -> Check:
    name = "output folder"
    if facts["problem"]:
        return failed(name, f"{facts['folder']}: {facts['problem']}", "give an --output_dir that can be written to")
    if facts["blind"]:
        fix = "give an --output_dir that all machines share"
        return failed(name, f"{', '.join(facts['blind'])} cannot see {facts['folder']}", fix, blind=facts["blind"])
    return ok(name, f"{facts['folder']} can be written to, and every rank sees it", folder=facts["folder"])


def step(facts: Facts) -> Check:
    """Two steps were taken, and what came up is what was asked for."""
    name, losses = "step", facts["losses"]
    what = f"{facts['method']}, {facts['strategy']} as {facts['wrapper']} on {counted(facts['world_size'], 'rank')}, "
    what += "bf16" if facts["precision"] == "bf16" else "float32"
    seen = f"{what}: loss {', then '.join(f'{loss:.4f}' for loss in losses)}"
    figures = {
        key: facts[key] for key in ("losses", "strategy", "wrapper", "distributed_type", "world_size", "precision")
    }
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return failed(name, seen, "compare with one process: manyrank verify", **figures)
    return ok(name, seen, **figures)


def save_and_load(facts: Facts, before: Facts) -> Check:
    """The checkpoint has every tensor, and the step from it gives what it gave before."""
    name, fix = "save and load", "compare with one process: manyrank verify"
    expected, tensors = before["trainable_tensors"], facts["tensors"]
    figures = {"tensors": tensors, "bytes": facts["bytes"], "loss": facts["loss"], "drift": facts["drift"]}
    if tensors != expected:
        return failed(name, f"the checkpoint has {tensors} of {expected} tensors", fix, **figures)
    if facts["drift"] is None:
        return failed(name, "the step has not changed the weights", fix, **figures)
    off = abs(facts["loss"] - before["losses"][-1]) / max(1.0, before["losses"][-1])
    if not (off <= LOSS_DIFFERENCE[before["precision"]] and facts["drift"] <= DRIFT):
        what = (
            f"the step from the checkpoint has loss {facts['loss']:.4f}, and had {before['losses'][-1]:.4f} before it; "
        )
        return failed(name, f"{what}the weights are off by {facts['drift']:.0%} of a step", fix, **figures)
    return ok(name, f"{tensors} tensors, {facts['bytes']:,} bytes; the step from them gives the same loss", **figures)
