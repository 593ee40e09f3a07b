"""Another model as the draft: its cache is right whatever was accepted, and it learns what it drafts from."""

import functools as ft
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from chain_rounds import (
    LengthsInTurn,
    check_every_kind_of_round,
    check_nothing_beyond_the_capacity,
    check_training_logits,
)
from helpers import EVERY_OPTION, quick_compilation, tabular_model, tiny_transformer
from tiny_run import END, tiny_folder as tiny_folder, tiny_tokenizer
from tokenizers import Tokenizer as Backend, models

from eqx_specgrpo.decoding import Coupled, GreedySampling, Rejection, Sampling, decode
from eqx_specgrpo.distill import DraftBatch, ForwardKL, draft_gradients
from eqx_specgrpo.drafts import (
    DraftError,
    IndependentSampler,
    LayerSkipDraft,
    ModelDraft,
    check_same_vocabulary,
    draft_kind,
    load_draft,
    load_model_draft,
    save_draft,
)
from eqx_specgrpo.errors import CheckpointError
from eqx_specgrpo.models import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    Tokenizer,
    load_pretrained,
    sequence_features,
)

LENGTH, NEW, CONTEXT = 3, 21, 40
# The first has room for its 21 tokens; the others end where the model's context does.
PROMPTS = [[1, 2, 3], list(range(12)) * 2, [*range(12)] * 3 + [4]]
LIMITS = [min(NEW, CONTEXT - len(prompt)) for prompt in PROMPTS]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


TARGET = tiny_transformer(max_position_embeddings=CONTEXT)
OTHER = tiny_transformer(seed=5, hidden_size=8, intermediate_size=12, num_heads=2, max_position_embeddings=CONTEXT)
DRAFTS = {"itself": ModelDraft(TARGET, LENGTH), "another": ModelDraft(OTHER, LENGTH), "none": None}
VERIFIERS = {"coupled": Coupled(), "rejection": Rejection(), "greedy": None}


@ft.cache
def _decode(
    draft: str,
    verifier: str,
    *,
    lengths: tuple[int, ...] = (LENGTH,),
    max_rounds: int = 64,
    eos_ids: tuple[int, ...] = (),
):
    return decode(
        TARGET,
        PROMPTS,
        draft=DRAFTS[draft],
        verifier=VERIFIERS[verifier],
        sampling=GreedySampling() if verifier == "greedy" else Sampling(1.0),
        length=LengthsInTurn(lengths, max_rounds) if draft != "none" else None,
        key=jr.key(9),
        max_new_tokens=NEW,
        eos_ids=eos_ids,
        samples=3,
        smallest_bucket=16,  # no shrinking: fewer programs, and finished rows go on to be drafted for
    )


#
# Decoding
#


@pytest.mark.parametrize("verifier", ["greedy", "coupled", "rejection"])
def test_the_target_drafts_for_itself_and_everything_is_accepted(verifier):
    """Rewinding, absorbing and the last token of a full acceptance: one error in any of them, and a guess is wrong."""
    statistics = _decode("itself", verifier).statistics
    # The first token of a row comes with the prompt's pass, and every round emits four.
    rounds = -(-(np.repeat(LIMITS, 3) - 1) // (LENGTH + 1))
    np.testing.assert_array_equal(statistics.target_forwards, rounds)
    np.testing.assert_array_equal(statistics.emitted, np.repeat(LIMITS, 3) - 1)
    assert statistics.emitted[0] / statistics.target_forwards[0] == LENGTH + 1


def test_the_tokens_are_those_of_plain_decoding():
    plain = _decode("none", "coupled", eos_ids=(12,))
    for found in (
        _decode("another", "coupled", lengths=(3, 0), max_rounds=1, eos_ids=(12,)),
        _decode("another", "coupled", eos_ids=(12,)),
    ):
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        np.testing.assert_array_equal(found.stop_reasons, plain.stop_reasons)
        np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    assert 0 < found.statistics.accepted.sum() < found.statistics.drafted.sum()
    assert len(set(plain.lengths.tolist())) > 3


def test_rounds_without_drafting_change_nothing():
    statistics = _decode("itself", "coupled", lengths=(3, 0, 0, 3, 3, 0), max_rounds=1).statistics
    unfinished = np.repeat(LIMITS, 3) == NEW
    np.testing.assert_array_equal(statistics.accepted[unfinished], statistics.drafted[unfinished])
    assert (statistics.drafted[unfinished] < statistics.target_forwards[unfinished, None]).all()


#
# The cache
#


def test_every_kind_of_round_leaves_the_cache_right():
    check_every_kind_of_round(DRAFTS["another"], TARGET, OTHER)


def test_nothing_is_written_beyond_the_capacity():
    check_nothing_beyond_the_capacity(DRAFTS["another"], TARGET, OTHER)


def _state(draft, prompt_tokens: int, capacity: int):
    """Shapes of the state after two prompts."""
    prompts, lengths = jnp.zeros((2, prompt_tokens), jnp.int32), jnp.full(2, prompt_tokens)
    return eqx.filter_eval_shape(lambda: draft.init(TARGET, None, prompts, lengths, capacity))


@pytest.mark.parametrize("length", [1, 3])
def test_the_state_has_one_shape_and_a_row_for_an_axis(length):
    draft, state = DRAFTS["another"], _state(DRAFTS["another"], 4, 30)
    last = jnp.zeros(2, jnp.int32)
    sampler = IndependentSampler(Sampling(1.0), jr.split(jr.key(0), 2))
    _, proposed = eqx.filter_eval_shape(lambda state: draft.propose(TARGET, state, last, sampler, length), state)
    block = jnp.zeros((2, length + 1), jnp.int32)
    committed = eqx.filter_eval_shape(lambda state: draft.commit(TARGET, state, None, block, last), state)
    assert state == proposed == committed
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))


def test_a_round_without_drafting_runs_no_model():
    block, none = jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, jnp.int32)
    commit = jax.make_jaxpr(lambda state: DRAFTS["another"].commit(TARGET, state, None, block, none))
    program = str(commit(_state(DRAFTS["another"], 4, 30)))
    assert "scatter" in program and not any(name in program for name in ("dot_general", "while", "scan", "custom_vjp"))


#
# Learning
#


def test_training_logits_are_the_drafting_logits():
    check_training_logits(DRAFTS["another"], TARGET, OTHER.hidden_size)


def test_everything_of_the_draft_learns_and_nothing_of_the_target():
    tokens = jr.randint(jr.key(2), (3, 14), 0, TARGET.vocab_size, jnp.int32)
    features = eqx.filter_jit(sequence_features)(TARGET, tokens)
    batch = DraftBatch(features, tokens, jnp.array([3, 5, 2]), jnp.array([9, 1, 8]))

    def gradients_of(draft):
        settings = dict(temperature=jnp.float32(1.0), alpha=jnp.zeros(1), position_decay=jnp.float32(0.8))
        return draft_gradients(draft, TARGET, batch, ForwardKL(), **settings, new=10, chunk=16)

    draft = DRAFTS["another"]
    result = gradients_of(draft)
    gradients = jax.tree.leaves(result.gradients)
    assert len(gradients) == len(jax.tree.leaves(eqx.filter(draft, eqx.is_inexact_array))) > 8
    assert all(np.abs(gradient).max() > 1e-6 for gradient in gradients)
    assert 0.0 < float(result.acceptance[0]) < 0.99
    # Nothing of the target is even looked at.
    used = jax.make_jaxpr(lambda target, features: draft.train_hidden(target, features, tokens))(TARGET, features).jaxpr
    assert not {id(var) for var in used.invars} & {id(var) for eqn in used.eqns for var in eqn.invars}
    # It is the best draft there is.
    perfect = gradients_of(DRAFTS["itself"])
    assert abs(float(perfect.loss)) < 1e-5 and float(perfect.acceptance[0]) == pytest.approx(1.0, abs=1e-5)


#
# On disk
#


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_layers=1, rope_scaling=rope, tie_embeddings=rope is None, qk_norm=True)
        for rope in (
            *(None, LinearRope(2.0), Llama3Rope(8.0, 1.0, 4.0, 16), DynamicRope(2.0)),
            LongRope((1.0, 3.0), (2.0, 9.0), 24, 1.25),
        )
    ]
    + [EVERY_OPTION],
)
def test_a_saved_draft_comes_back_to_the_bit(tmp_path, changes):
    model = tiny_transformer(seed=1, **changes)
    draft = ModelDraft(model, 2)
    save_draft(tmp_path, draft, TARGET, "tiny")
    assert eqx.tree_equal(load_draft(tmp_path, TARGET), draft, typematch=True)
    assert json.loads((tmp_path / "draft.json").read_text())["kind"] == draft_kind(draft) == "model"


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": {"type": "yarn"}}, {"rope_scaling": {"type": "ntk"}}, {"num_layers": "two"}, {"depth": 3}],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, change):
    save_draft(tmp_path, DRAFTS["another"], TARGET, "tiny")
    about = json.loads((tmp_path / "draft.json").read_text())
    about["settings"]["config"] |= change
    (tmp_path / "draft.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="draft.json can't be read"):
        load_draft(tmp_path, TARGET)


def test_only_a_transformer_can_be_saved(tmp_path):
    draft = ModelDraft(tabular_model(seed=0, vocab=13, scale=1.0), 2)
    with pytest.raises(DraftError, match="around a TabularModel can't be saved"):
        save_draft(tmp_path / "draft", draft, TARGET, "tiny")
    assert not (tmp_path / "draft").exists()


def test_a_pretrained_model_becomes_a_draft(tiny_folder):
    draft, tokenizer = load_model_draft(tiny_folder, 2)
    target, target_tokenizer = load_pretrained(tiny_folder)
    assert draft.max_length == 2 and eqx.tree_equal(draft.model, target)
    draft.check(target)
    check_same_vocabulary(tokenizer, target_tokenizer)


#
# What does not fit
#


def test_another_vocabulary_is_refused():
    draft = ModelDraft(eqx.filter_eval_shape(tiny_transformer, vocab_size=11), 2)
    with pytest.raises(DraftError, match="has 11 entries, but the target's has 13.*own family"):
        draft.check(TARGET)
    DRAFTS["another"].check(TARGET)


@pytest.mark.parametrize("max_length", [0, 9])
def test_lengths_that_no_decoder_asks_for_are_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length is {max_length}, but a ModelDraft drafts 1 to 8"):
        ModelDraft(OTHER, max_length)
    with pytest.raises(ValueError, match=f"max_length is {max_length}, but a LayerSkipDraft drafts 1 to 8"):
        eqx.filter_eval_shape(LayerSkipDraft, 16, 1, max_length, key=jr.key(0))


def test_a_context_that_the_rows_outgrow_is_refused():
    short = ModelDraft(tiny_transformer(num_layers=1, max_position_embeddings=CONTEXT - 1), LENGTH)
    with pytest.raises(DraftError, match="context holds 39 tokens, but the target's rows may reach 40"):
        decode(TARGET, PROMPTS, draft=short, key=jr.key(0), max_new_tokens=NEW)
    # The target's context is what counts where the run could go on beyond it, and the run where it is the shorter one.
    assert _state(DRAFTS["itself"], 16, 100)
    assert _state(short, 16, 39 + LENGTH + 1)
    with pytest.raises(DraftError, match="context holds 39"):
        _state(short, 16, 40 + LENGTH + 1)


def _tokenizer(tokens: list[str]) -> Tokenizer:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    backend.add_special_tokens([tokens[0]])
    return Tokenizer(backend, {}, None, ())


def test_token_ids_that_mean_something_else_are_refused():
    words = ["<s>", "one", "two", "three"]
    check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(chat_template=None))
    # Ids of one side alone, and the names of special tokens, are nothing to the guesses.
    check_same_vocabulary(_tokenizer(words), _tokenizer([*words, "four"]))
    check_same_vocabulary(_tokenizer(words), _tokenizer([END, *words[1:]]))
    with pytest.raises(DraftError, match="disagree about 2 token ids, among them 2: 'two' here, 'three' there"):
        check_same_vocabulary(_tokenizer(words), _tokenizer(["<s>", "one", "three", "two"]))
