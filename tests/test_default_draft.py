"""The trained heads that come with the embedded model."""

import warnings

import jax.random as jr
import pytest

import eqx_specgrpo as sg


@pytest.fixture(scope="module")
def target():
    return sg.load_pretrained(sg.default_model_path())


def test_they_are_of_the_model_they_come_with(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that they were trained for another model
        draft = sg.load_draft(sg.default_draft_path(), target[0])
    assert isinstance(draft, sg.MedusaHeads) and draft.max_length == 4


def test_they_guess_right(target):
    """Fresh heads have an acceptance length of 1."""
    policy, tokenizer = target
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "What is 12 + 7 - 3? Think step by step."}])
    rollouts = sg.decode(
        policy,
        [prompt],
        draft=sg.load_draft(sg.default_draft_path(), policy),
        length=sg.FixedLength(3),
        key=jr.key(0),
        max_new_tokens=48,
        eos_ids=tokenizer.eos_ids,
        samples=4,
    )
    assert rollouts.statistics.acceptance_length > 2.5
