import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_specgrpo.models import Linear, cast_weights, matmul

ROWS, IN, OUT = 6, 96, 80


def _loss(inputs, reference):
    x, weight = inputs
    return jnp.sum(jnp.sin(matmul(x, weight)) * reference)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_bfloat16_close_to_float32(getkey, rows):
    x, reference = jr.normal(getkey(), (rows, IN)), jr.normal(getkey(), (rows, OUT))
    weight = jr.normal(getkey(), (OUT, IN)) / np.sqrt(IN)
    y, (dx, dw) = matmul(x, weight), jax.grad(_loss)((x, weight), reference)
    np.testing.assert_allclose(y, x @ weight.T, atol=1e-5)

    half = weight.astype(jnp.bfloat16)
    half_y, (half_dx, half_dw) = matmul(x, half), jax.grad(_loss)((x, half), reference)
    # Results and the gradient of the input are float32; the weight's gradient has the weight's dtype.
    assert (half_y.dtype, half_dx.dtype, half_dw.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    for found, expected in ((half_y, y), (half_dx, dx), (half_dw, dw)):
        scale = jnp.sqrt(jnp.mean(expected**2))
        assert jnp.max(jnp.abs(found.astype(jnp.float32) - expected)) < 0.05 * scale


def test_bias_and_leading_axes(getkey):
    layer = Linear(IN, OUT, use_bias=True, key=getkey())
    layer = eqx.tree_at(lambda m: m.bias, layer, jr.normal(getkey(), (OUT,)))
    x = jr.normal(getkey(), (2, 3, IN))
    np.testing.assert_allclose(layer(x), x @ layer.weight.T + layer.bias[None, None], atol=1e-5)
    cast = cast_weights(layer, jnp.bfloat16)
    assert (cast.weight.dtype, cast.bias.dtype) == (jnp.bfloat16, jnp.float32)


def _lowered():
    x, weight = jnp.zeros((ROWS, IN)), jnp.zeros((OUT, IN), jnp.bfloat16)
    return jax.jit(jax.value_and_grad(_loss)).lower((x, weight), jnp.zeros((ROWS, OUT)))


def test_all_three_products_take_bfloat16_and_return_float32():
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*?)(?: loc|\n)", _lowered().as_text())
    assert len(products) == 3
    for operands, result in products:
        assert operands.count("xbf16>") == 2 and result.endswith("xf32>"), (operands, result)


def test_weight_is_not_converted_on_cpu():
    # What makes a bfloat16 weight slow on CPU is a float32 copy of all of it at every call, which the compiler inserts
    # where it has no kernel. Whether it has one depends on the processor.
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.is_file() else ""
    if jax.default_backend() != "cpu" or not ("avx512_bf16" in flags or "amx_bf16" in flags):
        pytest.skip("this processor has no bfloat16 instructions")
    compiled = _lowered().compile().as_text()
    assert f"bf16[{OUT},{IN}]" in compiled
    assert not re.search(rf"= f32\[{OUT},{IN}\]\S* convert\(", compiled)
    assert not re.search(rf"= f32\[{IN},{OUT}\]\S* convert\(", compiled)
