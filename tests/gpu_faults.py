"""Faults that `benchmarks/gpu_plan.py --check` has to catch: each is put into a program, which is compiled for an H200.

    python tests/gpu_faults.py      # needs JAX's CUDA plugin (see benchmarks/gpu_plan.py), and no GPU; a minute

Run by `.ci/gpu`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import jax
from gpu_plan import broken_promises, mesh_of_run, programs
from gpu_target import AsksTheHost, compile_with_thunks, mesh_of, placed, read_plan

from eqx_specgrpo.decoding import UntilRowsFinish
from eqx_specgrpo.models import Program

Place = Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]


def cache_copied(program: Program, place: Place) -> tuple[Program, Place]:
    """The state is not donated, so that it is there twice."""
    return program._replace(donated=()), place


def collective_too_many(program: Program, place: Place) -> tuple[Program, Place]:
    """The loop of CPUs, in which the devices agree after each round whether to go on."""
    context, *others = program.arguments
    modules, store, _ = context
    return program._replace(arguments=((modules, store, UntilRowsFinish()), *others)), place


def host_asked(program: Program, place: Place) -> tuple[Program, Place]:
    """A print that was left in the loop."""
    context, state, *others = program.arguments
    modules, store, loop = context

    class Talking(type(loop)):
        def run(self, decode_once, state, max_rounds, stop_below):
            def talking(state):
                jax.debug.print("{}", state.num_new.sum())
                return decode_once(state)

            return super().run(talking, state, max_rounds, stop_below)

    return program._replace(arguments=((modules, store, Talking()), state, *others)), place


FAULTS = {
    "copies a cache": (cache_copied, 1),
    "collectives in a round": (collective_too_many, 2),
    "asks the host": (host_asked, 1),
}


def complaints(program: Program, place: Place, asked: argparse.Namespace) -> list[str]:
    try:
        compiled, thunks = compile_with_thunks(lambda: program.lower(place))
    except AsksTheHost as error:
        return [str(error)]
    return broken_promises(program.name, read_plan(compiled, thunks, 0.0), asked)


def main() -> int:
    jax.config.update("jax_platforms", "cpu")
    wrong = 0
    for expected, (fault, devices) in FAULTS.items():
        asked = argparse.Namespace(
            layers=1, devices=devices, rows=16, prompt=256, new=2048, lengths=(3,), lora_rank=0, target="h200"
        )
        mesh = mesh_of_run(mesh_of(asked.target, devices))
        place = placed(mesh.mesh, asked.rows)
        jax.config.update("jax_default_device", mesh.devices[0])  # see gpu_plan.py
        sound = next(program for program in programs("smollm2-135m", asked, mesh) if program.name.startswith("segment"))
        before, after = complaints(sound, place, asked), complaints(*fault(sound, place), asked)
        is_right = not before and any(expected in what for what in after)
        wrong += not is_right
        print(f"{'caught' if is_right else 'MISSED'} {fault.__name__}: before {before}, after {after}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
