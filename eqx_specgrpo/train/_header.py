"""What a run is about to do, in a few lines at its start."""

import equinox as eqx
import jax

from ..config import RunParts, model_name, shown_name
from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel, AdaptedTransformer, Adapters
from ..records import machine
from ..runtime import kept_programs
from ._state import RunState


def header(parts: RunParts, state: RunState, start: int) -> list[str]:
    """One line each on the model, the task, the rollouts, the draft, and the programs that are compiled already.

    **Arguments:**

    - `start`: steps that are done.
    """
    config, grpo = parts.config, parts.config.grpo
    about = machine()
    steps = f"{config.steps - start} more steps" if start else f"{config.steps} steps"
    rewards = zip(parts.rewards.names, parts.rewards.weights, strict=True)
    weighted = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in rewards)
    return [
        f"model     {model_name(config)}: {_policy(state.policy)}, {config.model.dtype} on {about['device']} "
        f"({about['processor']}, {about['cores']} cores)",
        f"task      {shown_name(config.task.name)}, rewards {weighted}",
        f"rollouts  {steps} of {grpo.prompts_per_step} prompts x {grpo.num_generations} completions, each of up to "
        f"{grpo.max_completion_length} tokens",
        f"draft     {_draft(parts, state.draft)}",
        f"compiled  {_programs()}",
    ]


def _policy(policy: AbstractLanguageModel) -> str:
    if not isinstance(policy, AdaptedTransformer):
        return _size(policy)
    adapters = policy.adapters
    return f"{_size(policy.base)}, beside which adapters of rank {adapters.rank} learn ({_size(adapters)})"


def _size(module: AbstractLanguageModel | AbstractDraft | Adapters) -> str:
    arrays = jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))
    count = sum(array.size for array in arrays)
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name} parameters"
    return f"{count:,} parameters"


def _draft(parts: RunParts, draft: AbstractDraft) -> str:
    config = parts.config.draft
    if not config.enabled:
        return "none: plain decoding"
    source = config.kind if config.path is None else f"{config.kind} from {config.path}"
    guesses = f"up to {config.length} tokens a round, as pays" if config.adaptive else f"{config.length} tokens a round"
    learns = "learns at every step" if config.learns and draft.train_length > 0 else "does not learn"
    size = _size(draft) if draft.train_length > 0 else "nothing to train"
    return f"{source} ({size}), {learns}; guesses {guesses}, verifier {config.verifier}"


def _programs() -> str:
    kept = kept_programs()
    if kept is None:
        return "at every start anew: there is no cache of programs (set JAX_COMPILATION_CACHE_DIR to a folder)"
    folder, count = kept
    return f"{count} programs are in the cache {folder}; those that are missing are compiled in the first steps"
