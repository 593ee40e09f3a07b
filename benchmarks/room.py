"""One decoding with a limit that its rows do not come to: peak memory of the process, and milliseconds a round.

    python benchmarks/scaling.py --out results/scaling --max-new-tokens 512,8192

calls this in a process for each limit. Prints JSON.
"""

import argparse
import json
import resource
import statistics
import time
from typing import Any

import jax
import jax.random as jr
import numpy as np

from eqx_specgrpo import Prompts
from eqx_specgrpo.decoding import FixedLength, SegmentObservation, decode
from eqx_specgrpo.models import Transformer, TransformerConfig
from eqx_specgrpo.runtime import keep_freed_memory

PROMPT = 128


class Enough(Exception):
    """All rows have come as far as was asked."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--end", type=int, default=300, help="tokens after which decoding is stopped")
    parser.add_argument("--layers", type=int, default=30)
    arguments = parser.parse_args()
    keep_freed_memory()
    # SmolLM2-135M's sizes, but for the vocabulary.
    config = TransformerConfig(
        vocab_size=16384,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=arguments.layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=PROMPT + arguments.max_new_tokens,
        tie_embeddings=True,
    )
    target = Transformer(config, key=jr.key(0))
    prompt = np.asarray(jr.randint(jr.key(1), (1, PROMPT), 0, config.vocab_size))
    seconds, processor, rounds, last = [], [], 0, time.process_time()

    def see(observation: SegmentObservation, _: Any) -> None:
        nonlocal rounds, last
        rounds += observation.rounds
        now = time.process_time()
        if observation.seconds is not None:
            seconds.append(observation.seconds / observation.rounds)
            processor.append((now - last) / observation.rounds)
        last = now
        if rounds >= arguments.end:
            raise Enough

    try:
        decode(
            target,
            Prompts(prompt, np.full(1, PROMPT, np.int32)),
            length=FixedLength(0),
            key=jr.key(2),
            max_new_tokens=arguments.max_new_tokens,
            samples=arguments.rows,
            on_segment=see,
        )
    except Enough:
        pass
    found = {
        "max_new_tokens": arguments.max_new_tokens,
        "rows": arguments.rows,
        "rounds": rounds,
        "milliseconds_per_round": 1e3 * statistics.median(seconds),
        # Of all cores; depends less on what else a machine has to do.
        "processor_milliseconds_per_round": 1e3 * statistics.median(processor),
        "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    statistics_of_device = jax.local_devices()[0].memory_stats()
    if statistics_of_device:
        found["peak_device_bytes"] = statistics_of_device["peak_bytes_in_use"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
