"""What a run knows of the memory that its updates may take, and what it says of how they go about it."""

from collections.abc import Callable

import equinox as eqx
import jax

from ..config import RunParts
from ..grpo import UpdateBatch, UpdateBudget, UpdateChoice, choose_update, num_prompts, padded_width
from ..layout import AbstractDeviceMesh
from ..models import AbstractLanguageModel, platform_of
from ..runtime import Memory

# A micro-batch of more tokens is no faster on a CPU, and takes more memory.
_TOKENS_ON_CPU = 2048
_FEATURES = 4  # the last, and the outputs of three layers


class UpdatePlanner:
    """Chooses the size of micro-batches and gradient checkpointing for each update, and prints a line when the choice
    changes.

    The choice depends only on the memory at the start of a run and on the shapes of a step. A resumed run uses the
    memory of its first start, so that it computes the same.

    **Arguments:**

    - `memory`: memory at the start of the run; `None` if it is not known.
    - `say`: called with a line to print.
    """

    def __init__(self, memory: Memory | None = None, say: Callable[[str], None] = lambda text: None):
        self._memory, self._say, self._said = memory, say, ""

    def choose(self, parts: RunParts, policy: AbstractLanguageModel, batch: UpdateBatch) -> UpdateChoice:
        """Chooses for one batch of rollouts."""
        grpo, dtype = parts.config.grpo, parts.config.model.dtype
        rows, new = batch.completion_tokens.shape
        prompt = batch.tokens.shape[1] - new
        is_divided = not parts.loss.loss.traits.depends_on_micro_batches
        mesh = parts.mesh
        alone = 1 if is_divided else -(-rows // grpo.gradient_accumulation_steps // mesh.data)
        longest = new if batch.completion_lengths is None else int(batch.completion_lengths.max())
        width = min(padded_width(longest), new) if is_divided else new
        prompts = num_prompts(min(alone, len(batch.prompt_rows)), len(batch.prompt_rows))
        usual = _TOKENS_ON_CPU if platform_of(policy) == "cpu" else None
        auto = grpo.gradient_checkpointing == "auto"
        choice = choose_update(
            policy,
            alone * width + prompts * prompt,
            self._budget(policy, mesh.padded(rows) // mesh.data * (prompt + new), mesh),
            dtype=dtype,
            chunk=parts.loss.chunk,
            gradient_checkpointing=None if auto else parts.loss.gradient_checkpointing,
            max_tokens=grpo.max_tokens_per_micro_batch,
            usual_tokens=usual,
        )
        told = f"{choice.gradient_checkpointing} {choice.max_tokens}"
        if told != self._said:
            self._said = told
            self._say(choice.reason)
        return choice

    def _budget(self, policy: AbstractLanguageModel, positions: int, mesh: AbstractDeviceMesh) -> UpdateBudget | None:
        """Of one device. Besides the policy and its optimizer it will have: the copy to compute with, which may be
        gathered whole, gradients of two micro-batches, and the features of its rows, once of each micro-batch and once
        of all of them. As much for every draft, on which the policy's update may not depend."""
        if self._memory is None:
            return None
        memory, devices = self._memory, mesh.data * mesh.model
        if memory.is_shared:
            memory = Memory(memory.available // devices, memory.total // devices, memory.is_shared)
        weights = sum(x.size for x in jax.tree.leaves(eqx.filter(policy, eqx.is_inexact_array)))
        copies = 4 * weights // mesh.model + 2 * 4 * weights // devices
        return UpdateBudget.of(memory, copies + 2 * _FEATURES * 4 * policy.hidden_size * positions)
