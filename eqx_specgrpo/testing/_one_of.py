import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..decoding import AbstractAcceptanceRule, AbstractVerifier


class OneOf(AbstractAcceptanceRule):
    """Several rules in one compiled program, of which one is in force: to check many is then to compile once.

    **Arguments:**

    - `rules`: the rules.
    - `index`: which of them is in force.
    """

    rules: tuple[AbstractAcceptanceRule, ...]
    index: Int[Array, ""]

    def __init__(self, rules: tuple[AbstractAcceptanceRule, ...], index: int | Int[Array, ""]):
        self.rules = tuple(rules)
        self.index = jnp.asarray(index, jnp.int32)

    def survival(self, target, proposal):
        return lax.switch(self.index, [rule.survival for rule in self.rules], target, proposal)

    def next_weights(self, target, proposal, num_accepted):
        branches = [rule.next_weights for rule in self.rules]
        return lax.switch(self.index, branches, target, proposal, num_accepted)


def verifier_name(verifier: AbstractVerifier) -> str:
    """What to call it in a message."""
    if isinstance(verifier, OneOf):
        return verifier_name(verifier.rules[int(verifier.index)])
    return type(verifier).__name__
