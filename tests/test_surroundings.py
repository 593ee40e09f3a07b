"""Whatever environment, locale, terminal and home a process is given, and whatever numbers and paths it is told."""

import io
import json
import os
import subprocess
import sys

import jax
import pytest
from helpers import tabular_model
from tiny_run import main_like, tiny_folder as tiny_folder

from eqx_specgrpo.config import RunConfig, load_config
from eqx_specgrpo.decoding import decode
from eqx_specgrpo.errors import ConfigError, UserError
from eqx_specgrpo.files import json_line, print_json, user_path
from eqx_specgrpo.runtime import as_typed, check_jax, keep_compiled_programs, set_aside_number_settings

#
# Numbers
#

_SECTIONS = {key: type(getattr(RunConfig(), key)) for key in ("model", "task", "reward", "grpo", "draft")}
_KEYS = [key for key in RunConfig.model_fields if key not in _SECTIONS] + [
    f"{section}.{name}" for section, model in _SECTIONS.items() for name in model.model_fields
]
# As TOML, or as text where it is none.
_VALUES = ("-1", "0", "nan", "-inf", "1e300", "1e-320", "0.99999999999", f"1{'0' * 30}", "9" * 5000, "2147483648")
_VALUES += ("true", "[nan]", "[1e300]", "{}", "1979-05-27", "[" * 2000, '"\\u0000"', "none")


@pytest.mark.parametrize("key", _KEYS)
def test_any_value_of_any_key_is_taken_or_refused(key):
    """And what is taken is a number in 32 bits too."""
    for value in _VALUES:
        try:
            config = load_config(None, [f"{key}={value}"])
        except UserError as error:
            said = str(error)
            assert len(said) < 600 and (key.rpartition(".")[2] in said or said.startswith("the path ")), (value, error)
            continue
        section, _, name = key.rpartition(".")
        found = vars(vars(config)[section] if section else config)[name]
        for number in found if isinstance(found, list) else [found]:
            if isinstance(number, int):
                assert abs(number) < 2**32
            elif isinstance(number, float) and key != "grpo.temperature":  # which is kept in range where it is used
                assert number == 0 or 1e-38 < abs(number) < 3.5e38


def test_settings_that_32_bits_make_another_number_of():
    for setting, words in (
        ("grpo.adam_beta2=0.99999999999", "grpo.adam_beta2 = 0.99999999999: it must be less than 1 in 32 bits"),
        ("grpo.adam_epsilon=1e-60", "grpo.adam_epsilon = 1e-60: it must be at least 1.18e-38"),
        ("grpo.learning_rate=1e39", r"grpo.learning_rate = 1e\+39: it must be at most 3.4e\+38"),
        ("reward.weights=[1.0, 1e39]", r"reward.weights = 1e\+39"),
        ("steps=2147483648", "steps = 2147483648: it must be a whole number below 2147483648"),
        ("grpo.prompts_per_step=1000000", "= 8000000: a step can have 1048576 completions at most"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(None, [setting])
    assert load_config(None, ["grpo.temperature=1e-60", "seed=4294967295"]).seed == 4294967295


@pytest.fixture
def specgrpo(monkeypatch, capsys):
    return lambda *arguments: main_like(monkeypatch, capsys, *map(str, arguments))


_SEEDS = ("-1", 2**32, 10**30, "nan", "1.5")
_NO_NUMBERS = ("nan", "inf", "-inf", "-1")


@pytest.mark.parametrize(
    "command, option, values",
    [
        ("generate", "--seed", _SEEDS),
        ("generate", "--temperature", _NO_NUMBERS),
        ("generate", "--top-p", ("0", "0.0", "1.5", *_NO_NUMBERS)),
        ("generate", "--top-k", ("0", "-1", "nan")),
        ("generate", "--num-generations", ("0", "-1", 10**12)),
        ("generate", "--max-completion-length", ("0", "-1", "nan")),
        ("verify", "--seed", _SEEDS),
        ("verify", "--rows", ("1", "-1", 10**12)),
        ("verify", "--tokens", ("0", "-1")),
        ("bench", "--seed", _SEEDS),
        ("bench", "--temperature", _NO_NUMBERS),
        ("bench", "--top-p", ("0", *_NO_NUMBERS)),
        ("bench", "--minutes", ("0", *_NO_NUMBERS)),
        ("bench", "--rows", ("0", "-4", "nan", 10**30, "")),
        ("bench", "--lengths", ("9", "-1", 10**30)),
        ("bench", "--rounds", ("0", "-1")),
        ("run", "--seed", _SEEDS),
        ("run", "--steps", ("0", "-1", 10**30, "nan")),
        ("distill", "--seed", _SEEDS),
        ("distill", "--steps", ("0", "-1", "nan")),
        ("distill", "--minutes", ("0", *_NO_NUMBERS)),
        ("distill", "--temperature", ("0", *_NO_NUMBERS)),
        ("distill", "--learning-rate", _NO_NUMBERS),
        ("distill", "--prompts", ("0", "-1", 10**30)),
    ],
)
def test_numbers_of_options(command, option, values, specgrpo, tmp_path):
    """Refused before a model is loaded."""
    common = {"generate": ["--prompt", "a"], "verify": [], "bench": []}.get(command, ["--out", tmp_path / "out"])
    for value in values:
        code, out, err = specgrpo(command, *common, f"{option}={value}")
        assert code == 2 and out == "" and "Traceback" not in err, (value, code, out, err)
        assert not (tmp_path / "out").exists()


#
# Paths, text and JSON
#


def test_paths_that_lead_nowhere(specgrpo, tmp_path):
    with pytest.raises(UserError, match="~nobody_of_this_name/x: it isn't known where this home folder is"):
        user_path("~nobody_of_this_name/x")
    for path, words in (("~nobody_of_this_name/x", "home folder"), ("x" * 5000, "can't be used: File name too long")):
        code, _, err = specgrpo("generate", "--prompt", "a", "--model", path)
        assert code == 2 and words in err and len(err) < 400
        code, _, err = specgrpo("run", "--dry-run", "--task", f"{path}.jsonl")
        assert code == 2 and words in err
        code, _, err = specgrpo("run", "--dry-run", "--reward", f"{path}.py:f")
        assert code == 2 and words in err
    code, _, err = specgrpo("run", "--dry-run", "--out", "x" * 5000)
    assert code == 2 and "File name too long" in err and "Traceback" not in err
    deep = tmp_path / "deep.toml"
    for text in (f"steps = {'9' * 5000}", f"steps = {'[' * 3000}"):
        deep.write_text(text)
        code, _, err = specgrpo("run", "--dry-run", deep)
        assert code == 2 and "deep.toml is not valid TOML" in err


def test_json_has_no_nan(capsys):
    assert json_line({"a": [float("nan"), float("-inf"), 1.5], 2: "é"}) == '{"a": [null, null, 1.5], "2": "é"}'
    assert json_line("é", ascii_only=True) == '"\\u00e9"'
    print_json({"a": float("inf")})
    assert json.loads(capsys.readouterr().out) == {"a": None}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        json_line(object())


def test_json_in_a_locale_of_ascii(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    print_json("é \ud800")
    sys.stdout.flush()
    assert buffer.getvalue() == b'"\\u00e9 \\ud800"\n'


def test_arguments_as_typed():
    assert as_typed("é".encode().decode("ascii", "surrogateescape")) == "é" == as_typed("é")
    with pytest.raises(UserError, match="not text in UTF-8"):
        as_typed("\udcff")


#
# JAX and the home folder
#


def test_numbers_that_jax_is_set_to(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "True")
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "strict")
    assert [message.split()[0] for message in set_aside_number_settings()] == [
        "JAX_ENABLE_X64=True",
        "JAX_NUMPY_DTYPE_PROMOTION=strict",
    ]
    assert "JAX_ENABLE_X64" not in os.environ
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    assert not list(set_aside_number_settings()) and os.environ["JAX_ENABLE_X64"] == "0"
    check_jax()
    with jax.enable_x64(True), pytest.raises(UserError, match="set to 64 bits"):
        decode(tabular_model(seed=0, vocab=3, scale=1.0), [[1]], key=jax.random.key(0), max_new_tokens=1)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(UserError, match="refuses to mix dtypes"):
        check_jax()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend\nlong story")])
def test_no_device(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="no device .*(AssertionError|Unknown backend).*JAX_PLATFORMS is 'cuda'"):
        check_jax()
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match="set JAX_PLATFORMS=cpu"):
        check_jax()


def test_a_home_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_entry():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("eqx_specgrpo.runtime._process.Path.home", no_entry)
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")


def test_everything_at_once(tiny_folder):
    """In a process of its own: a locale of ASCII, a terminal without abilities, no home, other numbers."""
    odd = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TERM": "dumb",
        "COLUMNS": "20",
        "HOME": "/proc/nowhere",
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEBUG_NANS": "1",
    }
    options = ["--model", str(tiny_folder), "--prompt", "é", "--max-completion-length", "2", "--temperature", "1e-300"]
    finished = subprocess.run(
        [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", "generate", *options, "--json"],
        env=os.environ | odd,
        capture_output=True,
    )
    completion = json.loads(finished.stdout)
    assert finished.returncode == 0 and len(completion["prompt_tokens"]) == 2 and completion["logprobs"] == [0.0, 0.0]
    assert finished.stderr.count(b"is set aside") == 2 and b"Traceback" not in finished.stderr
