"""Check values of losses, KL estimators, corrections and advantages: what is published or worked out by hand (theirs),
and a function that computes the same here. `docs/losses.md` shows the table; `test_policy_losses.py` compares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from eqx_specgrpo.grpo import (
    KL_ESTIMATORS,
    LossNormalizer,
    group_advantages,
    importance_weights,
    leave_one_out_advantages,
    make_policy_loss,
    max_rl_advantages,
    pass_at_k,
    pass_at_k_advantages,
    policy_loss,
)
from eqx_specgrpo.grpo.losses import TokenInputs, binary_kl, gamma_weight

ADVANTAGES = jnp.array([[1.0, -1.0, 2.0]])
OLD = jnp.full((1, 3), -1.0)
CURRENT = jnp.array([[-1.69315, -1.0, -0.59453]])  # ratios 0.5, 1, 1.5
SAMPLER = np.array([[-0.5, -1.5, -0.8]], np.float32)
ALL = np.ones((1, 3), bool)


class Case(NamedTuple):
    """One line of the table."""

    what: str
    theirs: list[float]
    source: str
    ours: Callable[[], Any]


def one_row(logprobs=CURRENT, old=OLD, advantages=ADVANTAGES, loss_type="dapo", options=None, **kwargs):
    """The loss of a row of which every token counts."""
    mask = jnp.ones(logprobs.shape, bool)
    loss = make_policy_loss(loss_type, options)
    return policy_loss(logprobs, old, advantages, mask, normalizer=LossNormalizer.from_mask(mask), loss=loss, **kwargs)


def value(*args, **kwargs):
    return one_row(*args, **kwargs)[0]


def token_losses(loss_type, **options):
    """Before they are averaged."""
    tokens = TokenInputs(CURRENT, OLD, CURRENT - OLD, ADVANTAGES, jnp.ones((1, 3), bool))
    return make_policy_loss(loss_type, options).token_losses(tokens).losses[0]


def weights(mode, low, high, sampler=SAMPLER):
    return importance_weights(np.asarray(OLD), sampler, ALL, mode, low, high)


def corrected(mode, high, loss_type="dapo", level="token"):
    correction = jnp.asarray(weights(mode, None, high))
    return value(loss_type=loss_type, importance_sampling_level=level, importance_weights=correction)


def kl(name, logprobs, reference):
    return KL_ESTIMATORS[name](jnp.array(logprobs), jnp.array(reference))


def average(loss_type):
    losses, mask = jnp.array([[1.0, 9, 9], [2, 2, 2]]), jnp.array([[1, 0, 0], [1, 1, 1]], bool)
    return make_policy_loss(loss_type).average(losses, mask, LossNormalizer.from_mask(mask, max_completion_length=4))


def accumulated():
    losses = jnp.array([[0.5] * 3 + [7], [1] + [7] * 3, [2] * 4, [1.5] * 2 + [7] * 2])
    mask = losses != 7
    normalizer = LossNormalizer.from_mask(mask, num_micro_batches=2)
    loss = make_policy_loss("dapo")
    return sum(loss.average(losses[i : i + 2], mask[i : i + 2], normalizer) for i in (0, 2))


FOUR = np.zeros(4, int)
FORCED = jnp.array([[-0.5, -1.0, -1.5]])
LONG = dict(importance_sampling_level="sequence")

CASES = [
    Case("clip, each token", [-0.5, 1.0, -2.4], "NeMo-RL", lambda: token_losses("dapo")),
    Case("`dapo`", [-0.6333], "NeMo-RL", lambda: value()),
    Case("`dapo`, ratio forced to 1", [-0.6667], "NeMo-RL", lambda: value(old=None)),
    Case(
        "`dapo`, `delta` 3 (dual clip)",
        [4.1667],
        "NeMo-RL",
        lambda: value(
            jnp.array([[-1.69315, -1.0, -0.69741]]),
            jnp.array([[-1.0, -1.0, -3.0]]),
            jnp.array([[1.0, -1.0, -4.0]]),
            options={"delta": 3.0},
        ),
    ),
    Case("sequence ratio", [0.9086], "NeMo-RL", lambda: jnp.exp((CURRENT - OLD).mean())),
    Case("`grpo`, sequence level (GSPO)", [-0.6057], "NeMo-RL", lambda: value(loss_type="grpo", **LONG)),
    Case(
        "`luspo`, A = 1",
        [-2.7257],
        "by hand",
        lambda: value(advantages=jnp.ones((1, 3)), loss_type="luspo", **LONG),
    ),
    Case("`cispo`, cap 5", [0.5434], "TRL", lambda: value(loss_type="cispo", options={"epsilon_high": 5.0})),
    Case("`cispo` without a ratio (REINFORCE)", [0.8333], "NeMo-RL", lambda: value(FORCED, None, loss_type="cispo")),
    Case("`sapo`, each token", [-1.5102, 1.9048, -4.9797], "TRL", lambda: token_losses("sapo")),
    Case("`sapo`", [-1.5284], "TRL", lambda: value(loss_type="sapo")),
    Case(
        "`vespo`, weight of 0.75, A positive and negative",
        [1.1908, 0.6956],
        "TRL",
        lambda: gamma_weight(jnp.log(jnp.full(2, 0.75)), jnp.array([2.0, 3.0]), jnp.array([3.0, 2.0])),
    ),
    Case("`dppo_tv`, 0.2", [-0.8333], "SkyRL", lambda: value(loss_type="dppo_tv", options={"dppo_delta": 0.2})),
    Case("`dppo_tv`, 0.18", [0.1667], "SkyRL", lambda: value(loss_type="dppo_tv", options={"dppo_delta": 0.18})),
    Case("binary KL, each token", [0.0935, 0.0, 0.0682], "SkyRL", lambda: binary_kl(OLD, CURRENT)[0]),
    Case("`dppo_kl`, 0.05", [0.1667], "SkyRL", lambda: value(loss_type="dppo_kl", options={"dppo_delta": 0.05})),
    Case("`dppo_kl`, 0.08", [-0.8333], "SkyRL", lambda: value(loss_type="dppo_kl", options={"dppo_delta": 0.08})),
    Case("weights, unbounded", [0.6065, 1.6487, 0.8187], "NeMo-RL", lambda: weights("token_truncate", None, None)[0]),
    Case(
        "weights, masked outside of 0.5 to 5",
        [0.6065, 0.0, 0.8187],
        "NeMo-RL",
        lambda: weights("token_mask", 0.5, 5.0, np.array([[-0.5, -3.5, -0.8]], np.float32))[0],
    ),
    Case("`dapo`, tokens unbounded", [-0.2065], "NeMo-RL", lambda: corrected("token_truncate", None)),
    Case("`dapo`, tokens truncated at 0.8", [-0.4744], "NeMo-RL", lambda: corrected("token_truncate", 0.8)),
    Case("`dapo`, sequence truncated at 0.8", [-0.5067], "NeMo-RL", lambda: corrected("sequence_truncate", 0.8)),
    Case(
        "GSPO, sequence truncated at 0.8",
        [-0.4846],
        "NeMo-RL",
        lambda: corrected("sequence_truncate", 0.8, "grpo", "sequence"),
    ),
    Case(
        "GSPO, sequence unbounded",
        [-0.4959],
        "NeMo-RL",
        lambda: corrected("sequence_truncate", None, "grpo", "sequence"),
    ),
    Case("k1", [-1, 14, 29], "NeMo-RL", lambda: kl("k1", [-1.0] * 3, [0.0, -15.0, -30.0])),
    Case("k2", [0.5, 98, 420.5], "NeMo-RL", lambda: kl("k2", [-1.0] * 3, [0.0, -15.0, -30.0])),
    Case("k3", [0.7183, 13, 28], "NeMo-RL", lambda: kl("k3", [-1.0] * 3, [0.0, -15.0, -30.0])),
    Case("k3, mean", [0.3621], "NeMo-RL", lambda: kl("k3", [0.0, -1.0, -2.0], [-1.0] * 3).mean()),
    Case("mean of tokens, `dapo`", [1.75], "by hand", lambda: average("dapo")),
    Case("mean of sequences, `grpo`", [1.5], "by hand", lambda: average("grpo")),
    Case("constant, `dr_grpo`", [0.875], "by hand", lambda: average("dr_grpo")),
    Case("two micro-batches, `dapo`", [1.35], "by hand", accumulated),
    Case(
        "advantages `group`",
        [0.8659, -0.8659, -0.8659, 0.8659],
        "TRL",
        lambda: group_advantages(np.array([1.0, 0, 0, 1]), FOUR, 1),
    ),
    Case(
        "advantages `rloo`",
        [-1.5, 0, 1.5],
        "Tunix",
        lambda: leave_one_out_advantages(np.array([1.0, 2, 3]), FOUR[:3], 1),
    ),
    Case(
        "advantages `max_rl`",
        [3, -1, -1, -1],
        "prime-rl",
        lambda: max_rl_advantages(np.array([1.0, 0, 0, 0]), FOUR, 1),
    ),
    Case(
        "advantages `pass_at_k`, unscaled",
        [0, 0.75, 0, 0],
        "verl",
        lambda: pass_at_k_advantages(np.array([0.0, 1, 0.25, 0]), FOUR, 1, "none"),
    ),
    Case("pass@1 and pass@4, 2 of 8 right", [0.25, 0.7857], "by hand", lambda: [pass_at_k(8, 2, k) for k in (1, 4)]),
]


def table() -> str:
    """As it stands in the documentation: theirs beside ours."""
    lines = ["| check | from | theirs | here |", "| --- | --- | --- | --- |"]
    for case in CASES:
        theirs, ours = (", ".join(number(x) for x in np.ravel(values)) for values in (case.theirs, case.ours()))
        lines.append(f"| {case.what} | {case.source} | {theirs} | {ours} |")
    return "\n".join(lines) + "\n"


def number(x: float) -> str:
    text = f"{float(x):.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


if __name__ == "__main__":
    print(table())
