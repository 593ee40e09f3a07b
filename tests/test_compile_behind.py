"""Programs that a thread compiles while decoding goes on."""

import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import (
    AdaptiveLength,
    CompileAtOnce,
    CompileBehind,
    CompileSparingly,
    Coupled,
    FixedLength,
    SegmentPlan,
    decode,
)
from eqx_specgrpo.decoding._ahead import lower
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.runtime import count_compilations


def waited_for(compiler):
    while compiler.is_busy:
        time.sleep(0.01)


def test_what_was_compiled_for_shapes_is_not_compiled_again_for_arrays():
    @eqx.filter_jit(donate="all-except-first")
    def function(context, state, power):
        for _ in range(5):
            state = jnp.sin(state @ state) * context[0] ** power
        return state

    shapes = (jax.ShapeDtypeStruct((), jnp.float32), "static"), jax.ShapeDtypeStruct((8, 8), jnp.float32), 3
    compiler = CompileBehind()
    assert not compiler.ready("it", lambda: lambda: [lower(function, *shapes)])
    waited_for(compiler)
    assert compiler.ready("it", lambda: pytest.fail("it is there"))
    assert compiler._begun["it"].exception() is None
    assert compiler.seconds("it") > 0 and compiler.seconds("it") == 0
    state = jnp.ones((8, 8))
    with count_compilations() as counter:
        function((jnp.float32(2.0), "static"), state, 3)
    assert counter.programs == 0 and counter.seconds == 0 and state.is_deleted()


def test_a_thread_that_fails_leaves_the_error_to_whoever_runs_it():
    compiler = CompileBehind()

    def fail():
        raise ValueError("no such program")

    compiler.ready("it", lambda: fail)
    waited_for(compiler)
    assert compiler.ready("it", lambda: fail) and compiler.seconds("it") == 0


def test_time_of_another_thread_is_told_apart():
    shape = jax.ShapeDtypeStruct((3, 5), jnp.float32)

    def compile_something():
        jax.jit(lambda x: jnp.cos(x) @ x.T).lower(shape).compile()

    with count_compilations() as counter:
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()
        assert counter.seconds == 0 < counter.seconds_behind and counter.programs == 1
        jax.jit(lambda x: jnp.tan(x) @ x.T).lower(shape).compile()
    assert counter.seconds > 0 and counter.programs == 2


def test_decoding_goes_on_while_smaller_batches_and_lengths_are_compiled():
    """The tokens are plain decoding's all the time, and once all is there nothing is waited for."""
    target, heads = tiny_transformer(seed=3), randomise(MedusaHeads.fresh(16, 2), 0, 0.3)
    settings = dict(verifier=Coupled(), key=jr.key(1), max_new_tokens=60, smallest_bucket=1, eos_ids=[3, 5, 7, 11])
    prompts = [[1 + i, 2, 3] for i in range(8)]
    with quick_compilation():
        plain = decode(target, prompts, length=FixedLength(0), **settings)
        assert len(set(plain.lengths.tolist())) > 3, "rows have to end at different times"
        compiler, seen, states = CompileBehind(), [], [None]

        def keep(observation, state):
            seen.append(observation)
            states.append(state)

        def decoded():
            seen.clear()
            found = decode(
                target,
                prompts,
                draft=heads,
                length=AdaptiveLength(2),
                length_state=states[-1],
                compiler=compiler,
                on_segment=keep,
                **settings,
            )
            np.testing.assert_array_equal(found.tokens, plain.tokens)
            waited_for(compiler)
            return sum(segment.compile_seconds for segment in seen)

        first = decoded()
        assert first > 0, "the first program has nothing to go on with meanwhile"
        rows = {segment.rows for segment in seen}
        waits = [decoded() for _ in range(6)]
        assert waits[-1] == 0 and rows < {segment.rows for segment in seen}
        assert all(segment.elapsed > 0 for segment in seen)


def test_a_new_length_is_compiled_while_another_one_goes_on():
    target, heads = tiny_transformer(seed=4), randomise(MedusaHeads.fresh(16, 2), 0, 0.3)
    compiler, seen, lengths = CompileBehind(), [], iter([0, 0])

    class Plans(AdaptiveLength):
        def choose(self, state, rows, context):
            return SegmentPlan(next(lengths, 2), 2)

    with quick_compilation():
        for _ in range(2):
            decode(
                target,
                [[1, 2, 3]] * 4,
                draft=heads,
                length=Plans(2),
                key=jr.key(1),
                max_new_tokens=24,
                smallest_bucket=4,
                compiler=compiler,
                on_segment=lambda observation, _: seen.append(observation),
            )
            waited_for(compiler)
    assert seen[0].compile_seconds > 0 and all(segment.compile_seconds == 0 for segment in seen[1:])
    assert [segment.plan.length for segment in seen[:3]] == [0, 0, 0], "the plan was two guesses from the third on"
    drafted = [segment for segment in seen if segment.plan.length == 2]
    assert drafted and drafted[0].behind_seconds > 0 and sum(segment.behind_seconds for segment in drafted[1:]) == 0


def test_at_once_is_always_ready():
    compiler = CompileAtOnce()
    assert compiler.ready("it", lambda: pytest.fail("nothing is compiled ahead")) and not compiler.is_busy
    assert compiler.seconds("it") == 0.0
    compiler.close()


def test_nothing_is_compiled_only_to_be_measured_again():
    target, heads = tiny_transformer(seed=4), randomise(MedusaHeads.fresh(16, 2), 0, 0.3)
    plain = SegmentPlan(0, 2)

    class Looks(AdaptiveLength):
        def choose(self, state, rows, context):
            return SegmentPlan(2, 2, otherwise=SegmentPlan(1, 2, otherwise=plain))

    def lengths(compiler, length):
        seen = []
        with quick_compilation():
            decode(
                target,
                [[1, 2, 3]] * 4,
                draft=heads,
                length=length,
                key=jr.key(1),
                max_new_tokens=12,
                smallest_bucket=4,
                compiler=compiler,
                on_segment=lambda observation, _: seen.append(observation.plan.length),
            )
        return set(seen)

    sparing = CompileSparingly()
    assert lengths(sparing, Looks(2)) == {0}
    assert lengths(sparing, FixedLength(2)) == {2}
    assert lengths(sparing, Looks(2)) == {2}, "it is there now, from another decoding"
    assert lengths(CompileAtOnce(), Looks(2)) == {2}


def test_a_smaller_batch_is_compiled_once_it_was_waited_for():
    """In all decodings together, each batch for itself."""
    compiler = CompileSparingly(patience=2.0)

    def asked(name, waited):
        return compiler.may_shrink(name, lambda: pytest.fail("nothing is compiled ahead"), waited)

    assert not asked("four", 0.0) and not asked("four", 1.5) and not asked("two", 0.0)
    assert asked("four", 0.6) and not asked("two", 1.9) and asked("two", 0.2)
    assert asked("four", 0.0)
    assert CompileAtOnce().may_shrink("four", lambda: pytest.fail("nothing is compiled ahead"), 0.0)
    with pytest.raises(ValueError, match="patience is -1"):
        CompileSparingly(patience=-1.0)


def test_rows_that_have_ended_stay_until_a_smaller_batch_is_worth_compiling():
    target = tiny_transformer(seed=3)
    prompts = [[1 + i, 2, 3] for i in range(8)]

    def decoded(compiler):
        seen = []
        with quick_compilation():
            rollouts = decode(
                target,
                prompts,
                length=FixedLength(0),
                key=jr.key(1),
                max_new_tokens=60,
                smallest_bucket=1,
                eos_ids=[3, 5, 7, 11],
                compiler=compiler,
                on_segment=lambda observation, _: seen.append(observation.rows),
            )
        return rollouts.tokens, set(seen)

    at_once, rows_at_once = decoded(CompileAtOnce())
    never, rows_never = decoded(CompileSparingly(patience=1e9))
    _, rows_without_patience = decoded(CompileSparingly(patience=0.0))
    _, rows_soon = decoded(CompileSparingly(patience=1e-9))
    np.testing.assert_array_equal(never, at_once)
    assert rows_never == {8} and rows_without_patience == rows_at_once and len(rows_at_once) > 2
    assert min(rows_soon) < 8, "some rounds were waited for it"
