"""A draft of one's own: a recurrent network over the drafted tokens, one small cell for all positions.

    specgrpo run --draft examples/custom_draft.py:MyDraft
    specgrpo distill --draft examples/custom_draft.py:MyDraft --set draft.options.state_size=64 --out drafts/mine

or, to put it through the library's conformance checks on the embedded model:

    python examples/custom_draft.py

The cell (after Zhang et al. 2024, "Recurrent drafter", section 3) carries a state `s`, which starts at zero. At each
drafted position it takes in the embedding `e` of the newest token and the target's newest hidden state `h`:
`s <- silu(recur(s) + read([h, e]))`. The target's own unembedding turns `h + write(s)` into logits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from eqx_specgrpo.drafts import AbstractDraft, DraftError, Proposal, pick_positions
from eqx_specgrpo.models import Linear


class MyDraft(AbstractDraft):
    """Trained: the three matrices of the cell. Frozen: the target's embedding and unembedding, which are arguments."""

    read: Linear
    recur: Linear
    write: Linear
    max_length: int = eqx.field(static=True)
    layers: tuple[int, ...] = eqx.field(static=True, default=())

    def __init__(self, target, max_length, *, state_size: int = 128, key):
        size, keys = target.hidden_size, jr.split(key, 3)
        self.read = Linear(2 * size, state_size, use_bias=True, key=keys[0])
        self.recur = Linear(state_size, state_size, use_bias=False, key=keys[1])
        write = Linear(state_size, size, use_bias=False, key=keys[2])
        self.write = eqx.tree_at(lambda linear: linear.weight, write, jnp.zeros((size, state_size)))
        self.max_length = max_length

    @property
    def train_length(self):
        return self.max_length

    def check(self, target):
        size = self.write.weight.shape[0]
        if size != target.hidden_size:
            raise DraftError(f"this MyDraft has hidden states of size {size}, the target's have {target.hidden_size}")

    def step(self, target, state, hidden, token):
        inputs = [x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) for x in (hidden, target.embed(token))]
        state = jax.nn.silu(self.recur(state) + self.read(jnp.concatenate(inputs, axis=-1)))
        return state, hidden + self.write(state)

    def no_state(self, hidden):
        return jnp.zeros((*hidden.shape[:-1], self.write.weight.shape[1]))

    def init(self, target, features, tokens, lengths, capacity):
        return pick_positions(features.last, lengths - 1)  # what is remembered of a row: its newest hidden state

    def propose(self, target, hidden, last_token, sampler, length):
        state, token, steps = self.no_state(hidden), last_token, []
        for offset in range(length):
            state, output = self.step(target, state, hidden, token)
            token, distribution = sampler(target.unembed(output), offset)
            steps.append((token, distribution))
        return Proposal.stack(steps), hidden

    def commit(self, target, hidden, features, block, num_accepted):
        return pick_positions(features.last, num_accepted)

    def train_hidden(self, target, features, tokens):
        state, outputs = self.no_state(features.last), []
        for offset in range(self.max_length):  # the features at i predict token i + 1, the first that the cell is told
            state, output = self.step(target, state, features.last, jnp.roll(tokens, -1 - offset, axis=1))
            outputs.append(output)
        return jnp.stack(outputs, axis=2)

    def train_logits(self, target, hidden):
        return target.unembed(hidden)

    def provenance(self):
        hidden_size, state_size = self.write.weight.shape
        return {"hidden_size": hidden_size, "state_size": state_size}


if __name__ == "__main__":
    from eqx_specgrpo.config import default_model_path
    from eqx_specgrpo.models import load_model
    from eqx_specgrpo.runtime import keep_compiled_programs
    from eqx_specgrpo.testing import check_draft

    keep_compiled_programs()  # as the command line does: a second start is quick
    target = load_model(default_model_path())
    print(check_draft(MyDraft(target, 3, key=jr.key(0)), target, on_progress=print))
