import errno
import json
import os
import shutil
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_specgrpo.errors import CheckpointError, UserError
from eqx_specgrpo.records import _checkpoint
from eqx_specgrpo.records._checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def small(value):
    return {"policy": {"w": jnp.full((3,), value, jnp.float32)}, "other": {"n": jnp.asarray(value, jnp.int32)}}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def value_of(run):
    """What resuming would find: the value that was saved, read back whole."""
    folder = latest_checkpoint(run)
    assert folder is not None
    trees, meta = load_checkpoint(folder, small(0))
    assert eqx.tree_equal(trees, small(meta["step"]))
    return meta["step"]


def save(run, step, **options):
    return save_checkpoint(run, step, small(step), {"cursor": step}, **options)


def test_bitwise_round_trip(tmp_path, getkey):
    bits = np.arange(2**16, dtype=np.uint16)
    trees = {
        "policy": [
            eqx.nn.Linear(3, 2, key=getkey()),
            {"bf16": jnp.asarray(bits).view(jnp.bfloat16), "f16": jnp.asarray(bits).view(jnp.float16)},
        ],
        "state": {
            "nan": jnp.asarray(np.array([0x7FC00001, 0xFFC12345, 0x80000000], np.uint32)).view(jnp.float32),
            "scalar": jnp.asarray(7, jnp.int32),
            "weak": jnp.asarray(0.1),
            "empty": jnp.zeros((0, 3)),
            "flags": jnp.array([True, False]),
            "int8": jnp.array([-128, 127], jnp.int8),
            "key": jr.key(3),
            "keys": jr.split(jr.key(4, impl="rbg"), 2),
            "raw_key": jr.PRNGKey(5),
            "host": np.arange(6, dtype=np.int64).reshape(2, 3).T,
            "host_scalar": np.float64(0.1),
            "not_an_array": ("kept", 3, None, jnp.tanh),
        },
        "bare": jnp.arange(3),
    }

    def wipe(leaf):
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jr.wrap_key_data(jnp.zeros_like(jr.key_data(leaf)), impl=jr.key_impl(leaf))
        return leaf * 0 if eqx.is_inexact_array(leaf) else np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else leaf

    folder = save_checkpoint(tmp_path, 12, trees, {"cursor": 5, "note": "é"})
    assert folder == tmp_path / "checkpoints" / "step-000012" == latest_checkpoint(tmp_path)
    loaded, meta = load_checkpoint(folder, jax.tree.map(wipe, trees))
    assert meta == {"cursor": 5, "note": "é", "step": 12}
    assert jax.tree.structure(loaded) == jax.tree.structure(trees)
    for new, old in zip(jax.tree.leaves(loaded), jax.tree.leaves(trees), strict=True):
        assert type(new) is type(old)
        if not isinstance(old, jax.Array | np.ndarray | np.generic):
            assert new is old
            continue
        assert new.dtype == old.dtype and new.shape == old.shape
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new, old = jr.key_data(new), jr.key_data(old)
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    assert loaded["state"]["weak"].weak_type and not loaded["state"]["scalar"].weak_type


def test_only_what_is_asked_for_is_read(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "policy.safetensors").unlink()
    trees, _ = load_checkpoint(folder, {"other": small(0)["other"]})
    assert trees["other"]["n"] == 1
    with pytest.raises(CheckpointError, match="holds no 'third', only policy, other"):
        load_checkpoint(folder, {"third": {}})


def test_meta_says_what_was_saved(tmp_path):
    about = json.loads((save(tmp_path, 3) / "meta.json").read_text())
    assert (about["step"], about["jax"], about["meta"]) == (3, jax.__version__, {"cursor": 3})
    (array,) = about["trees"]["policy"].values()
    assert (array["dtype"], array["shape"]) == ("float32", [3])
    (piece,) = array["pieces"]
    assert piece == {"file": "policy.safetensors", "name": "w", "start": [0], "crc32": piece["crc32"]}
    assert piece["crc32"] == zlib.crc32(np.full(3, 3, np.float32).tobytes())


def test_keeps_the_last(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000003", "step-000010"]
    save(tmp_path, 1_000_000, keep=3)
    assert value_of(tmp_path) == 1_000_000
    assert len(names(tmp_path)) == 3


def test_same_step_again(tmp_path):
    save_checkpoint(tmp_path, 2, small(1), {})
    save(tmp_path, 2)
    assert value_of(tmp_path) == 2 and names(tmp_path) == ["step-000002"]


def test_none_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / ".tmp-step-000003-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert latest_checkpoint(tmp_path) is None


class Killed(BaseException):
    """No handler runs for it, as none runs when a process is killed."""


WRITES = ((_checkpoint, "write_tensor_file"), (os, "fsync"), (os, "rename"), (json, "dump"))
REMOVES = ((shutil, "rmtree"),)


def stop_at(monkeypatch, count, error, functions):
    """Lets `count` calls of those functions pass, then raises `error(name)` for ever. Returns the names called."""
    called = []

    def wrap(module, name):
        original = getattr(module, name)

        def stepped(*args, **kwargs):
            called.append(name)
            if len(called) > count:
                raise error(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, stepped)

    for module, name in functions:
        wrap(module, name)
    return called


def killed(_):
    return Killed()


def full(name):
    del name
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("again", [False, True], ids=["next", "same"])
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """Every call that touches the disk is in turn the last one before the process dies."""
    step = 2 if again else 3
    outcomes = []
    for count in range(100):
        run = tmp_path / str(count)
        for earlier in (1, 2):
            save(run, earlier)
        (run / "checkpoints" / ".tmp-step-000009-1").mkdir()  # Left by an earlier kill, so that it is removed too.
        with monkeypatch.context() as patch:
            called = stop_at(patch, count, killed, WRITES + REMOVES)
            try:
                save(run, step)
                died = False
            except Killed:
                died = True
        outcomes.append(value_of(run))
        assert outcomes[-1] in (2, step)
        save(run, 4)  # The run goes on from there, and tidies.
        assert value_of(run) == 4
        assert len(names(run)) == 2 and all(name.startswith("step-") for name in names(run))
        if not died:
            break
    assert count == len(called) >= 10  # All instants were tried.
    if not again:
        assert outcomes == sorted(outcomes) and set(outcomes) == {2, 3}


def test_a_kill_while_replacing_the_only_checkpoint(tmp_path, monkeypatch):
    for count in range(100):
        run = tmp_path / str(count)
        save(run, 1)
        with monkeypatch.context() as patch:
            stop_at(patch, count, killed, WRITES + REMOVES)
            try:
                save(run, 1)
                died = False
            except Killed:
                died = True
        assert value_of(run) == 1
        save(run, 1)
        assert names(run) == ["step-000001"]
        if not died:
            break
    assert count > 5


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    for count in range(100):
        run = tmp_path / str(count)
        save(run, 1)
        save(run, 2)
        with monkeypatch.context() as patch:
            called = stop_at(patch, count, full, WRITES)
            try:
                save(run, 3)
            except UserError as raised:
                message = str(raised)
            else:
                break  # The new checkpoint was in place, and only the removal of an old one failed.
        assert "checkpoint of step 3 could not be written" in message and "No space left on device" in message
        intact = latest_checkpoint(run)
        assert f"nothing saved before is lost, {intact} is whole" in message and "--resume" in message
        assert not list((run / "checkpoints").glob(".tmp-*"))
        assert value_of(run) in (2, 3)
    assert value_of(run) == 3
    assert set(called) == {"write_tensor_file", "fsync", "rename", "dump"}


def test_full_disk_at_the_first_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 0, full, WRITES)
        with pytest.raises(UserError, match="there was no earlier checkpoint"):
            save(tmp_path, 1)
    assert latest_checkpoint(tmp_path) is None and names(tmp_path) == []


def test_damaged_files_are_named_with_the_checkpoint_before(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    file = folder / "policy.safetensors"
    whole = file.read_bytes()
    before = str(tmp_path / "checkpoints" / "step-000001")

    def message(templates=None):
        with pytest.raises(CheckpointError) as info:
            load_checkpoint(folder, templates or small(0))
        assert before in str(info.value) and str(folder) in str(info.value)
        return str(info.value)

    for length in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "policy.safetensors is truncated or corrupt" in message()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "do not match the checksum" in message()
    file.unlink()
    assert "policy.safetensors is missing" in message()
    file.write_bytes(whole)
    assert value_of(tmp_path) == 2
    for content in (b"", b"{}", b'{"format": 1', b"[]"):
        (folder / "meta.json").write_bytes(content)
        assert "meta.json cannot be read" in message()


def test_other_trees_are_named(tmp_path):
    folder = save(tmp_path, 1)
    w = jnp.zeros(3)

    def message(template):
        with pytest.raises(CheckpointError) as info:
            load_checkpoint(folder, {"policy": template})
        assert "There is no earlier checkpoint" in str(info.value)
        return str(info.value)

    assert "missing layers.0.b; unexpected w" in message({"layers": [{"b": w}]})
    assert "missing b" in message({"w": w, "b": w}) and "unexpected" not in message({"w": w, "b": w})
    assert "tensor w is float32[3], this run needs float32[4]" in message({"w": jnp.zeros(4)})
    assert "tensor w is float32[3], this run needs bfloat16[3]" in message({"w": jnp.zeros(3, jnp.bfloat16)})
    assert "tensor w is float32[3], this run needs uint32[2]" in message({"w": jr.key(0)})


def test_newer_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    about = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(folder, small(0))


def test_names_must_differ(tmp_path):
    with pytest.raises(ValueError, match="both called 'a.b'"):
        save_checkpoint(tmp_path, 1, {"tree": {"a": {"b": jnp.zeros(1)}, "a.b": jnp.zeros(1)}}, {})
