"""What each of two processes does in `test_decode_together.py`: `python decode_together.py PROCESS PORT FILE`."""

import sys

import jax
import numpy as np

process, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)

from helpers import quick_compilation
from test_decode_together import sampled

from eqx_specgrpo.decoding import AdaptiveLength
from eqx_specgrpo.layout import make_mesh

mesh = make_mesh(2)
assert mesh.for_rollouts() is mesh and not mesh.is_addressable
seen = []
with quick_compilation():
    rollouts = sampled(
        mesh, draft_length=AdaptiveLength(2), on_segment=lambda observation, _: seen.append(observation.seconds)
    )
times = [-1.0 if seconds is None else seconds for seconds in seen]
np.savez(file, tokens=rollouts.tokens, lengths=rollouts.lengths, times=np.asarray(times))
