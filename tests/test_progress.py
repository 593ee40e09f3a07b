"""What a run says while it goes on, and what is compiled."""

import io
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from eqx_specgrpo.decoding import DecodeProgress
from eqx_specgrpo.records import RunProgress, _progress
from eqx_specgrpo.runtime import count_compilations, kept_programs

TRACE, COMPILE = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"


def progress_to(terminal: bool) -> tuple[RunProgress, io.StringIO]:
    file = io.StringIO()
    return RunProgress(Console(file=file, width=200, force_terminal=terminal)), file


def compiling(seconds: float, name: str = "jit(policy_gradients)") -> None:
    """What JAX says of a compilation, with nothing compiled."""
    jax.monitoring.record_scalar(COMPILE, time.time(), fun_name=name)
    time.sleep(min(seconds, 0.2))
    jax.monitoring.record_event_duration_secs(COMPILE, seconds, fun_name=name)


def test_the_live_line_says_what_is_compiled_while_it_is():
    progress, file = progress_to(terminal=True)
    with progress:
        progress.phase("step 1: policy update [of 2]")
        lines = [progress.line()]
        jax.monitoring.record_scalar(COMPILE, time.time(), fun_name="jit(policy_gradients)")
        lines.append(progress.line())
        jax.monitoring.record_event_duration_secs(COMPILE, 3.0, fun_name="jit(policy_gradients)")
        lines.append(progress.line())
    assert lines == [
        "step 1: policy update [of 2]",
        "compiling policy_gradients, program 1, 0 s: step 1: policy update [of 2]",
        "step 1: policy update [of 2]",
    ]
    assert "policy update [of 2]: compiled policy_gradients in 3.0 s" in file.getvalue()
    before = file.getvalue()
    compiling(1.0)
    assert file.getvalue() == before, "afterwards it does not listen any more"


def test_jax_says_when_it_begins():
    """By events of its own, which tests above make up."""
    progress, _ = progress_to(terminal=True)
    seen = []
    watch = progress._watch
    progress.compilations._watch = lambda program: (watch(program), seen.append(program))

    def a_function_of_this_test(x):
        return jnp.sin(x) + 1

    with progress:
        jax.jit(a_function_of_this_test)(jnp.ones(3))
    assert "a_function_of_this_test" in seen and seen[-1] is None


def test_a_log_is_told_once_of_what_takes_long(monkeypatch):
    monkeypatch.setattr(_progress, "_LOG_AFTER", 0.05)
    progress, file = progress_to(terminal=False)
    with progress:
        progress.phase("step 1: rollout")
        compiling(0.01, "little")
        compiling(6.0)
        time.sleep(0.1)
    assert file.getvalue().splitlines() == [
        "step 1: rollout ...",
        "  step 1: rollout: compiling policy_gradients, program 2 ...",
        "  step 1: rollout: compiled policy_gradients in 6.0 s",
    ]


def test_short_compilations_are_counted_and_not_told():
    told: list[str] = []
    with count_compilations(told.append) as counter:
        compiling(0.1, "little")
        compiling(1.5, "short")
        compiling(6.0)
    assert counter.count == 2 and told == ["compiled policy_gradients in 6.0 s"]


def test_rates_leave_compiling_out():
    progress, _ = progress_to(terminal=True)
    with progress:
        progress.phase("step 1: rollout")
        progress._since -= 12.0  # began 12 s ago
        compiling(10.0)
        progress.decoding(DecodeProgress(active=3, rows=8, tokens=100))
        rate = re.fullmatch(r"step 1: rollout: 100 tokens, 3 of 8 rows active, (\d+) tokens/s", progress.line())
    assert rate is not None and 40 <= int(rate[1]) <= 50


def test_time_by_phase():
    progress, _ = progress_to(terminal=False)
    with progress:
        with pytest.raises(KeyError), progress.timed("update", "step 1: update"):
            compiling(0.1)
            raise KeyError
        with progress.timed("update", "step 2: update"):
            pass
        assert list(progress.times.laps()) == ["update"] and progress.times.laps() == {}
        record = progress.times.record(from_step=1)
    assert record["seconds"]["update"] >= record["compiling"]["update"] == pytest.approx(0.1)
    assert sum(record["seconds"].values()) == pytest.approx(record["total"])


def test_stages_within_stages_count_once():
    """A little program that is compiled while a larger one is traced is part of the larger one's time."""
    with count_compilations() as counter:
        jax.monitoring.record_scalar(TRACE, time.time(), fun_name="large")
        compiling(1.0, "little")
        jax.monitoring.record_event_duration_secs(TRACE, 3.0, fun_name="large")
        compiling(2.0, "large")
        jax.monitoring.record_event("/jax/compilation_cache/cache_hits")
    assert (counter.seconds, counter.programs, counter.count, counter.loaded) == (5.0, 2, 2, 1)


def test_a_step_without_a_guess_says_so():
    progress, file = progress_to(terminal=False)
    metrics = {"reward": 0.5, "completions/mean_length": 9.0, "entropy": 1.0, "time/step": 2.0}
    metrics |= {"spec/tokens_per_second": 10.0, "spec/acceptance_length": 1.0}
    progress.stepped(1, 3, metrics | {"spec/draft_length": 0.0})
    progress.stepped(2, 3, metrics | {"spec/draft_length": 0.5}, compiling=1.6)
    first, second = file.getvalue().splitlines()
    assert first.startswith("step 1/3") and "nothing drafted" in first and "acceptance length" not in first
    assert second.startswith("step 2/3") and "acceptance length 1.00" in second
    assert first.endswith("  2.0 s") and second.endswith("  2.0 s, 2 of it compiling")


KEEP = """
import jax, jax.numpy as jnp
jnp.ones(3) + 1  # JAX has looked for a folder, and found none
import eqx_specgrpo as sg
{before}
sg.keep_compiled_programs()
print(jax.config.values["jax_compilation_cache_dir"], jax.config.values["jax_persistent_cache_min_compile_time_secs"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7))
"""


@pytest.mark.parametrize("before", ["", 'jax.config.update("jax_compilation_cache_dir", "{own}")'])
def test_a_script_keeps_programs_though_jax_is_imported(before, tmp_path, monkeypatch):
    for name in ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "ENABLE_COMPILATION_CACHE"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = tmp_path / "own"
    code = KEEP.format(before=before.format(own=own))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    folder, least = done.stdout.split()
    if before:
        assert (folder, float(least)) == (str(own), 1.0), "the user's own settings stay"
    else:
        assert folder.startswith(str(tmp_path / "cache" / "eqx_specgrpo")) and float(least) == 0.2
        entries = list((tmp_path / "cache" / "eqx_specgrpo").rglob("*-cache"))
        assert len(entries) >= 1, "nothing was kept"


def test_kept_programs(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert kept_programs() == (tmp_path, 0)
        (tmp_path / "jit_f-1234-cache").write_bytes(b"")
        (tmp_path / "jit_f-1234-atime").write_bytes(b"")
        assert kept_programs() == (tmp_path, 1)
        jax.config.update("jax_compilation_cache_dir", None)
        assert kept_programs() is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
