"""A plan of devices as tables to print."""

from collections.abc import Iterator

from jax.sharding import PartitionSpec
from rich.table import Table

from ._device_plan import DevicePlan


def device_tables(plan: DevicePlan) -> Iterator[Table | str]:
    """Whether it fits, the mesh, each parameter's layout, and the bytes of a device."""
    yield _verdict(plan)
    total = plan.data * plan.model
    yield (
        f"{total} device{'s' if total > 1 else ''}: data {plan.data} x model {plan.model}. Rows are divided over "
        f"{plan.data}, the matrices of a copy of the weights over {plan.model}."
    )
    layouts = Table("parameter", "arrays", "shape", "where it is updated", "where it decodes")
    for one in plan.parameters:
        shape = " x ".join(map(str, one.shape)) or "number"
        layouts.add_row(one.path, str(one.number), shape, _spec(one.master), _spec(one.copy))
    yield layouts
    sizes = Table("on each device", "at most")
    for name, size in plan.kept.items():
        sizes.add_row(name.strip(), _text(size))
    for phase, parts in (("rollouts", plan.rollout), ("update", plan.update)):
        sizes.add_section()
        for name, size in parts.items():
            sizes.add_row(f"{phase}: {name}", _text(size))
    sizes.add_section()
    sizes.add_row("most at a time", _text(plan.peak))
    yield sizes
    if plan.choice.gradient_checkpointing:
        yield f"Update: {plan.choice.reason}."


def _verdict(plan: DevicePlan) -> str:
    if plan.memory is None:
        return "How much memory a device has is not known: say so with --memory GIB."
    of = f"{_text(plan.peak)} of {_text(plan.memory)}"
    if plan.peak <= plan.memory:
        return f"It fits: {of}."
    rollout, update = sum(plan.rollout.values()), sum(plan.update.values())
    if rollout > update:
        return (
            f"It does not fit: {of}, while rollouts are decoded. Set grpo.max_rows, a larger devices.model, a shorter "
            "grpo.max_completion_length, or model.dtype = bfloat16."
        )
    return (
        f"It does not fit: {of}, in the update. More devices, lora.rank, a smaller grpo.max_tokens_per_micro_batch or "
        "a larger devices.model take less on each."
    )


def _spec(spec: PartitionSpec) -> str:
    named = [f"axis {number} over {axis}" for number, axis in enumerate(spec) if axis is not None]
    return ", ".join(named) or "whole"


def _text(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
