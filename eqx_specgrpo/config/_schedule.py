"""The policy's learning rate over a run."""

import numpy as np
import optax

from ._tree import RunConfig

# transformers has a name of its own for constant with a warm-up; here every schedule takes `warmup_steps`.
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def rate_schedule(config: RunConfig) -> optax.Schedule:
    """The learning rate as a function of the steps done: a linear warm-up, then what `grpo.lr_scheduler_type` says.

    The first step of a warm-up over `n` steps has `1 / n` of the rate, so that none is without effect, and step `n` has
    all of it. A rate that falls would be 0 one step after the last.
    """
    grpo = config.grpo
    rate, warmup = grpo.learning_rate, grpo.warmup_steps
    falling = max(config.steps - warmup, 1)
    match grpo.lr_scheduler_type:
        case "linear":
            main = optax.linear_schedule(rate, 0.0, falling)
        case "cosine":
            main = optax.cosine_decay_schedule(rate, falling)
        case _:
            main = optax.constant_schedule(rate)
    if warmup == 0:
        return main
    rising = optax.linear_schedule(rate / warmup, rate, warmup - 1) if warmup > 1 else optax.constant_schedule(rate)
    return optax.join_schedules([rising, main], [warmup])


def learning_rate(config: RunConfig, step: int) -> float:
    """The policy's learning rate at a step, of which so many came before."""
    return float(np.asarray(rate_schedule(config)(step)))


def rate_advice(old: RunConfig, new: RunConfig, done: int) -> str | None:
    """What to know of the learning rate of a run that goes on with another number of steps, if it changes.

    **Arguments:**

    - `done`: steps that are done.
    """
    before, after = learning_rate(old, max(done - 1, 0)), learning_rate(new, done)
    if old.steps == new.steps or done == new.steps or after <= before:
        return None
    how = "linearly" if new.grpo.lr_scheduler_type == "linear" else "as a cosine"
    return (
        f"the learning rate goes back up: it was {before:.3g} at step {done} of {old.steps} and is {after:.3g} at step "
        f"{done + 1} of {new.steps}, since it falls {how} to 0 at the last step. For a rate that does not depend on "
        'steps, start a run with grpo.lr_scheduler_type = "constant"'
    )
