import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_specgrpo.models import Linear, cast_weights, matmul
from eqx_specgrpo.models._linear import gather

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


def _has_bfloat16_kernels() -> bool:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.is_file() else ""
    return jax.default_backend() == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_weight_is_not_converted_on_cpu():
    # What makes a bfloat16 weight slow on CPU is a float32 copy of all of it at every call, which the compiler inserts
    # where it has no kernel. Whether it has one depends on the processor.
    if not _has_bfloat16_kernels():
        pytest.skip("this processor has no bfloat16 instructions")
    compiled = _lowered().compile().as_text()
    assert f"bf16[{OUT},{IN}]" in compiled
    assert not re.search(rf"= f32\[{OUT},{IN}\]\S* convert\(", compiled)
    assert not re.search(rf"= f32\[{IN},{OUT}\]\S* convert\(", compiled)


@pytest.mark.parametrize("rows, out", [(1, OUT), (2, 2), (ROWS, OUT), (ROWS, OUT - 1), (300, OUT)])
def test_bfloat16_weight_gradient(getkey, rows, out):
    """Of even and odd sizes, alone and under `vmap`: what XLA can't run, it says only when it runs."""
    x, cotangent = jr.normal(getkey(), (3, rows, IN)), jr.normal(getkey(), (3, rows, out))
    weight = jnp.zeros((out, IN), jnp.bfloat16)
    gradient = jax.jit(lambda x, g: jax.vjp(lambda w: matmul(x, w), weight)[1](g)[0])
    rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
    expected = jnp.einsum("bro,bri->boi", rounded(cotangent), rounded(x))
    for found in (
        jnp.stack([gradient(*pair) for pair in zip(x, cotangent, strict=True)]),
        jax.vmap(gradient)(x, cotangent),
    ):
        # One rounding to the weight's dtype, and the order of the sum.
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)


def test_weight_gradient_has_bfloat16_operands_on_cpu():
    # The weight's gradient contracts the leading axes of both operands, for which XLA has a float32 kernel only.
    if not _has_bfloat16_kernels():
        pytest.skip("this processor has no bfloat16 instructions")
    rows, out, size = 512, 192, 320
    arguments = jnp.zeros((rows, size)), jnp.zeros((out, size), jnp.bfloat16), jnp.zeros((rows, out))
    step = jax.jit(lambda x, w, g: jax.vjp(matmul, x, w)[1](g))
    compiled = step.lower(*arguments).compile().as_text()
    products = re.findall(r" dot\((%\S+), (%\S+)\)", compiled)
    assert len(products) == 2
    for computation in compiled.split("\n\n"):
        for names in re.findall(r" dot\((%\S+), (%\S+)\)", computation):
            for name in names:
                assert f"{name} = bf16[" in computation, computation


@pytest.mark.parametrize("rows", [1, 2, 128, 129])
def test_float32_product_does_not_depend_on_its_operands_order(getkey, rows):
    # Few rows and many are two programs on CPU; either has the same gradients.
    x, weight = jr.normal(getkey(), (rows, IN)), jr.normal(getkey(), (OUT, IN)) / np.sqrt(IN)
    y, pullback = jax.vjp(matmul, x, weight)
    expected, expected_pullback = jax.vjp(lambda x, weight: x @ weight.T, x, weight)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for found, want in zip(pullback(y), expected_pullback(y), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-3)


def test_float32_weight_is_the_first_operand_on_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("reads what XLA makes on CPU")

    def product(rows, out):
        compiled = jax.jit(matmul).lower(jnp.zeros((rows, IN)), jnp.zeros((out, IN))).compile().as_text()
        return set(re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", compiled))

    assert product(16, OUT) == {(str(OUT), "16")}
    assert product(512, OUT) == {("512", str(OUT))}
    # A large result, as the logits of a vocabulary are, is turned by a second product, and of many rows not at all.
    assert product(16, 49152) == {("49152", "16"), ("16", "49152")}
    assert product(64, 49152) == {("49152", "64"), ("64", "49152")}
    assert product(65, 49152) == {("65", "49152")}


def test_turning_a_large_result_by_a_product_changes_no_number(getkey):
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere nothing is turned")
    x, weight = jr.normal(getkey(), (9, IN)), jr.normal(getkey(), (49152, IN))
    product = lambda x, weight: jax.lax.optimization_barrier(jax.lax.dot_general(weight, x, (((1,), (1,)), ((), ()))))
    np.testing.assert_array_equal(jax.jit(matmul)(x, weight), jax.jit(product)(x, weight).T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gather_is_indexing_in_float32(getkey, dtype):
    table = jr.normal(getkey(), (OUT, IN)).astype(dtype)
    index = jnp.array([[3, 0, 3], [OUT - 1, 7, 3]])
    reference = jr.normal(getkey(), (2, 3, IN))
    rows, gradient = jax.value_and_grad(lambda table: jnp.sum(gather(table, index) * reference))(table)
    plain = table.astype(jnp.float32)
    expected, expected_gradient = jax.value_and_grad(lambda table: jnp.sum(table[index] * reference))(plain)
    np.testing.assert_array_equal(gather(table, index), plain[index])
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    assert gradient.dtype == dtype
    # The rows of a token that comes several times are summed before they are rounded.
    np.testing.assert_array_equal(gradient, expected_gradient.astype(dtype))


def test_gather_does_not_convert_the_table_on_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("reads what XLA makes on CPU")
    compiled = jax.jit(gather).lower(jnp.zeros((OUT, IN), jnp.bfloat16), jnp.zeros((2, 3), jnp.int32)).compile()
    assert f"bf16[{OUT},{IN}]" in compiled.as_text()
    assert f"f32[{OUT},{IN}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < OUT * IN


def test_gather_in_a_loop_does_not_copy_the_table_on_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("reads what XLA makes on CPU")

    def loop(table, index, rounds):
        def body(_, carry):
            index, total = carry
            return (index + 1) % OUT, total + gather(table, index).sum()

        return jax.lax.fori_loop(0, rounds, body, (index, jnp.float32(0)))[1]

    arguments = jnp.zeros((OUT, IN), jnp.bfloat16), jnp.zeros((2, 3), jnp.int32), jnp.int32(5)
    compiled = jax.jit(loop).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < OUT * IN
