"""A plan as text for a terminal and as values for JSON."""

from __future__ import annotations

from typing import Any

from .memory import GiB
from .planned_run import PlannedRun
from .planner import Option, Plan, Scale, Verdict, shortage
from .speed import Speed

WIDTH = 32  # characters of a bar
FILLS = (  # what a bar is made of, in this order
    ("weights", "█"),
    ("adapters", "▓"),
    ("gradients", "▓"),
    ("optimizer", "▓"),
    ("activations", "▒"),
    ("cache", "▒"),
    ("head and loss", "▒"),
    ("working", "▒"),
    ("gathered", "░"),
    ("context", "·"),
    ("slack", "·"),
)
LEGEND = "recompute: layers whose activations are recomputed; micro, length: the largest that fit, under auto with all of them\n█ weights  ▓ adapters, gradients, optimizer  ▒ activations, head, working  ░ gathered  · CUDA, slack  │ the GPU's memory"


def as_text(
    plan: Plan,
    *,
    tokens: int | None,
    price: float | None,
    scales: list[Scale],
    against: list[str],
    assumed: dict[str, str],
) -> str:
    """The tables of a plan.

    Args:
        tokens: of the whole training, if known. price: dollars an hour of one GPU.
        against: what `manyrank train` would refuse.
        assumed: keys that nobody gave, with the values that are planned with.
    """
    parts = [headline(plan)]
    parts += [f"assumed, as not given: {', '.join(map(' '.join, assumed.items()))}"] if assumed else []
    parts += ["", _table(plan), LEGEND, f"\n{plan.chosen.strategy}: {plan.why}", _parts(plan.chosen)]
    parts += [_time(plan.chosen.speed, tokens, price)] if plan.chosen.speed else []
    parts += [scaling_table(scales)] if scales else []
    remarks = [f"train refuses: {what}" for what in against] or ["no rule refuses it"]
    remarks += [f"note: {note}" for note in notes(plan)]
    return "\n".join([*parts, *remarks])


def summary(plan: Plan) -> str:
    """Summarise the plan of a launch, with the memory that is short where it is another than a GPU's at the peak."""
    chosen = plan.chosen
    short = shortage(chosen, plan.context)
    also = f", {short}" if short else ""
    of = f" of {plan.context.memory / GiB:.1f}" if plan.context.memory else ""
    rate = (
        f", {count(chosen.speed.tokens_per_second)} tokens/s, {chosen.speed.step:.3g} s a step" if chosen.speed else ""
    )
    return f"planned: {chosen.memory.peak / GiB:.1f}{of} GiB a GPU{also} ({chosen.verdict}){rate}; {chosen.strategy}: {plan.why}"


def headline(plan: Plan) -> str:
    run, context = plan.chosen.run, plan.context
    config, shape = run.config, run.shape
    lora = "" if run.full else f" r {config.lora_r}"
    trained = "" if run.trainable == shape.parameters else f", {count(run.trainable)} trained"
    pure = "pure " * config.pure_bf16
    gpu = "GPU of unknown memory" if context.memory is None else f"GPU of {context.memory / GiB:.0f} GiB"
    gpu = context.kind.name if context.kind else gpu
    nodes = f"{context.nnodes} machines x " if context.nnodes > 1 else ""
    return (
        f"{shape.name}: {count(shape.parameters)} parameters; {config.method}{lora}{trained}; {pure}{context.precision.label}; "
        f"{nodes}{context.nproc} x {gpu}\n"
        f"micro-batch {config.per_device_train_batch_size} x {config.max_length:,} tokens; {config.optim}"
        + f"; attention {config.attn_implementation}"
        * bool(config.attn_implementation)
    )


def count(number: float) -> str:
    """Format a number in three digits with a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _table(plan: Plan) -> str:
    most = max([option.memory.peak for option in plan.options] + [plan.context.memory or 0])
    head = f"{'strategy':<15}{'':<14}{'GiB':>6}  {'':<{WIDTH}}  {'tokens/s':>10} {'MFU':>5} {'recompute':>9} {'micro':>6} {'length':>9}"
    return "\n".join([head, *(_line(option, plan, most) for option in plan.options)])


def _line(option: Option, plan: Plan, most: int) -> str:
    mark = "*" if option is plan.chosen and not option.refused else " "
    short = shortage(option, plan.context)
    state = "refused" if option.refused else f"no: {short.memory}" if short else str(option.verdict)
    rate = f"{option.speed.tokens_per_second:>10,.0f} {option.speed.mfu:>5.0%}" if option.speed else f"{'':>10} {'':>5}"
    recomputed = f"{option.run.checkpointed}/{option.run.shape.depth}"
    largest = [
        "" if n is None else f"{n:,}" if n else "-" for n in (option.largest_micro_batch, option.largest_max_length)
    ]
    return (
        f"{mark}{option.strategy.name:<14}{state:<14}{option.memory.peak / GiB:>6.1f}  "
        f"{_bar(option, plan.context.memory, most):<{WIDTH}}  {rate} {recomputed:>9} {largest[0]:>6} {largest[1]:>9}"
    ).rstrip()


def _bar(option: Option, available: int | None, most: int) -> str:
    """The parts side by side, to the scale of `most` bytes, with the GPU's end marked."""
    bar, done = "", 0
    for name, fill in FILLS:
        done += option.memory.parts.get(name, 0)
        bar += fill * (round(WIDTH * done / most) - len(bar))
    if available is None:
        return bar
    end = max(0, min(WIDTH, round(WIDTH * available / most)) - 1)
    bar = bar.ljust(WIDTH)
    return f"{bar[:end]}│{bar[end + 1 :]}".rstrip()


def _parts(option: Option) -> str:
    shown = "  ".join(f"{name} {size / GiB:.1f}" for name, size in option.memory.parts.items() if size >= GiB / 20)
    needs = option.memory
    return (
        f"  GiB at the peak ({needs.moment}): {shown}\n"
        f"  loading {needs.loading / GiB:.1f} GiB a GPU; host memory of a machine {needs.host / GiB:.0f} GiB, "
        f"while loading {needs.host_loading / GiB:.0f} GiB\n"
        f"  with whole logits and peft's own adapters, as most other software runs: {option.plain / GiB:.1f} GiB a GPU"
    )


def _time(speed: Speed, tokens: int | None, price: float | None) -> str:
    text = (
        f"  a step: {speed.step:.3g} s of {speed.tokens:,} tokens (compute {speed.compute:.3g}, communication {speed.communication:.3g}, "
        f"of which {speed.exposed:.3g} not hidden, optimizer {speed.optimizer:.3g})"
    )
    if not tokens:
        return text
    hours = training_hours(speed, tokens)
    dollars = hours * (price or 0) * speed.world
    cost = f", about ${dollars:,.0f}" if dollars >= 0.5 else ", less than $1" if price else ""
    return f"{text}\n  the whole training, {count(tokens)} tokens: {in_words(hours)}{cost}"


def in_words(hours: float) -> str:
    """A time in the unit that suits it: 8 seconds, 12 minutes, 4.4 hours, 3.1 days."""
    units = (("days", 24, 48), ("hours", 1, 1), ("minutes", 1 / 60, 1 / 60), ("seconds", 1 / 3600, 1 / 3600))
    unit, size, _ = next((row for row in units if hours >= row[2]), units[-1])
    number = hours / size
    return f"{number:,.0f} {unit}" if number >= 10 else f"{max(number, 0.1):.2g} {unit}"


def training_hours(speed: Speed, tokens: int) -> float:
    return tokens / speed.tokens_per_second / 3600


def notes(plan: Plan) -> list[str]:
    """Notes about a plan's figures."""
    run, needs = plan.chosen.run, plan.chosen.memory
    notes = []
    if run.shape.guessed:
        notes.append(f"models of type {run.shape.model_type or 'unknown'} are not known: read as a Llama")
    if not run.shape.head_as_is:
        notes.append("the model changes its logits after the head, so that they are computed whole")
    notes += [
        f"{option.strategy}: {option.refused}"
        for option in plan.options
        if option.refused and option is not plan.chosen
    ]
    notes += _of_experts(run)
    if plan.chosen.strategy.offload and plan.context.host_memory is None:
        notes.append(f"host memory was not looked at: each machine needs {needs.host / GiB:.0f} GiB")
    if plan.context.memory is None:
        notes.append("no GPU is here, and none was given: --gpu H100-80GB or --gpu-memory 24GiB tells whether it fits")
    if plan.chosen.speed:
        notes.append("speeds are estimates from the maker's figures, with documents of max_length tokens")
    if run.config.is_grpo:
        notes.append("speeds are those of learning from the answers; the time that answering takes is not planned")
    return notes


def _of_experts(run: PlannedRun) -> list[str]:
    sparse = [layer for layer in run.shape.layers if layer.experts]
    notes = []
    if sparse and run.config.method in ("qlora", "int8"):
        notes.append("experts stay in 16 bits: transformers 5 keeps them in tensors that bitsandbytes does not see")
    if any(run.adapted_experts(layer) for layer in sparse):
        notes.append(
            "adapters on experts copy their weights in each layer (peft 0.21); lora_target_modules: [q_proj, k_proj, v_proj, o_proj] does not"
        )
    return notes


def scaling_table(scales: list[Scale]) -> str:
    """Tokens a second by number of machines and strategy, and what is left of the rate per GPU."""
    lines = (f"{row[0]:>8} {row[1]:>6}" + "".join(f"{cell:>16}" for cell in row[2:]) for row in scaling_cells(scales))
    return "\n".join(["", *lines, *scaling_ends(scales)])


def scaling_cells(scales: list[Scale]) -> list[list[str]]:
    """The table's cells, its head first: machines, GPUs, and a column for each strategy."""
    names = list(dict.fromkeys(row.option.strategy.name for row in scales))
    cells = {(row.nnodes, row.option.strategy.name): row for row in scales}
    table = [["machines", "GPUs", *names]]
    for nodes in dict.fromkeys(row.nnodes for row in scales):
        cells_of_row = [cells.get((nodes, name)) for name in names]
        gpus = next(row.option.run.world for row in cells_of_row if row)
        table.append([str(nodes), str(gpus), *map(_scaled, cells_of_row)])
    return table


def _scaled(row: Scale | None) -> str:
    if row is None or row.option.refused or row.option.verdict == Verdict.TOO_BIG:
        return "-" if row is None else "refused" if row.option.refused else str(row.option.verdict)
    return f"{count(row.option.tokens_per_second)} {row.efficiency:>4.0%}"


def scaling_ends(scales: list[Scale]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row.option.strategy.name for row in scales):
        low = next(
            (row for row in scales if row.option.strategy.name == name and row.option.usable and row.efficiency < 0.7),
            None,
        )
        if low:
            lines.append(
                f"{name} stops scaling at {low.nnodes} machines ({low.efficiency:.0%} of the rate per GPU): {low.waits_for}"
            )
    return lines


def as_values(
    plan: Plan,
    *,
    tokens: int | None,
    price: float | None,
    scales: list[Scale],
    against: list[str],
    assumed: dict[str, str],
) -> dict[str, Any]:
    """A plan for machines. Bytes and seconds; what is not known is None."""
    run, context = plan.chosen.run, plan.context
    return {
        "model": run.shape.name,
        "parameters": run.shape.parameters,
        "trainable": run.trainable,
        "method": run.config.method,
        "precision": context.precision.label,
        "gpu": context.kind.name if context.kind else None,
        "gpu_memory_bytes": context.memory,
        "nproc": context.nproc,
        "nnodes": context.nnodes,
        "micro_batch": run.config.per_device_train_batch_size,
        "max_length": run.config.max_length,
        "why": plan.why,
        **option_values(plan.chosen, tokens=tokens, price=price),
        "strategies": [option_values(option, tokens=tokens, price=price) for option in plan.options],
        "scaling": [
            {
                "nnodes": row.nnodes,
                "efficiency": row.efficiency,
                "waits_for": row.waits_for,
                **option_values(row.option, tokens=tokens, price=price),
            }
            for row in scales
        ],
        "train_refuses": against,
        "assumed": assumed,
        "notes": notes(plan),
    }


def option_values(option: Option, *, tokens: int | None, price: float | None) -> dict[str, Any]:
    """One strategy for machines."""
    needs, rate = option.memory, option.speed
    known = option.verdict != Verdict.UNKNOWN
    hours = training_hours(rate, tokens) if rate and tokens else None
    return {
        "strategy": option.strategy.name,
        "verdict": "refused" if option.refused else str(option.verdict),
        "fits": option.usable if known else None,
        "refused": option.refused,
        "per_gpu_bytes": needs.peak,
        "parts": dict(needs.parts),
        "plain_per_gpu_bytes": option.plain,  # with --disable_fused lm_head,lora,norm,mlp
        "peak_moment": needs.moment,
        "loading_bytes": needs.loading,
        "host_bytes": needs.host,
        "host_loading_bytes": needs.host_loading,
        "gradient_checkpointing": option.run.config.gradient_checkpointing,
        "largest_micro_batch": option.largest_micro_batch,
        "largest_max_length": option.largest_max_length,
        "step_seconds": rate.step if rate else None,
        "compute_seconds": rate.compute if rate else None,
        "communication_seconds": rate.communication if rate else None,
        "tokens_per_second": rate.tokens_per_second if rate else None,
        "mfu": rate.mfu if rate else None,
        "hours": hours,
        "dollars": hours * price * rate.world if rate and hours and price else None,
    }
