"""A policy that is divided over devices of two processes: they decode together, and choose alike."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.random as jr
import numpy as np
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import Coupled, FixedLength, decode
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.layout import OneDevice


def sampled(mesh, draft_length, **options):
    return decode(
        tiny_transformer(num_layers=1), [[1, 2, 3], [4]], draft=randomise(MedusaHeads.fresh(16, 2), 1, 0.1),
        length=draft_length, verifier=Coupled(), key=jr.key(1), max_new_tokens=20, eos_ids=(0,), samples=2,
        smallest_bucket=2, mesh=mesh, **options,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_tokens_are_those_of_one_process(tmp_path):
    script, port = Path(__file__).with_name("decode_together.py"), str(free_port())
    files = [tmp_path / f"{process}.npz" for process in (0, 1)]
    commands = [[sys.executable, str(script), str(i), port, str(file)] for i, file in enumerate(files)]
    started = [subprocess.Popen(c, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands]
    said = [process.communicate(timeout=300)[0].decode(errors="replace") for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    with quick_compilation():
        expected = sampled(OneDevice(), FixedLength(0))
    found = [np.load(file) for file in files]
    for one in found:
        np.testing.assert_array_equal(one["tokens"], expected.tokens)
        np.testing.assert_array_equal(one["lengths"], expected.lengths)
    # Both saw the first one's clock.
    np.testing.assert_array_equal(found[0]["times"], found[1]["times"])
    assert len(found[0]["times"]) > 1
