"""The checksum against one written in plain Python integers, on any mesh and in any parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.ops.checksum import checksum
from lmjax.sharding import Layout

M = 2**32
sum_of = jax.jit(checksum)


def mix(x):
    """MurmurHash3's fmix32, on integers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % M
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % M
    return x ^ (x >> 16)


def in_python(x):
    """Element by element, by the definition in the docstring."""
    x = np.atleast_1d(x)
    seeds = [(axis + 1) * 0x9E3779B9 % M for axis in range(x.ndim + 1)]
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    total = [0, 0]
    for index in np.ndindex(x.shape):
        word = int(np.asarray(x[index]).reshape(1).view(bits)[0])
        place = sum(mix((i + seeds[axis]) % M) for axis, i in enumerate(index)) + seeds[-1]
        value = mix((word + place) % M)
        total = [(total[0] + value) % M, (total[1] + value * (place | 1)) % M]
    return total


def random(shape, dtype, seed=0):
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype is bool:
        return bits[..., 0] > 127
    return bits.view(dtype)[..., 0].copy() if shape else bits.view(dtype)[0]


DTYPES = [bool, np.int8, np.uint16, np.int32, np.float16, jnp.bfloat16, np.float32]


@pytest.mark.parametrize("dtype", [*DTYPES, jnp.float8_e4m3fn])
def test_equals_the_definition(dtype):
    """On random bits, of which some are NaN."""
    for shape in [(), (3, 2, 4), (0, 3)]:
        x = random(shape, dtype)
        assert sum_of(x).tolist() == in_python(x)
    assert sum_of(x).dtype == np.uint32


def test_four_bits_are_those_of_the_number():
    x = np.arange(-8, 8)
    wanted = in_python((x % 16).astype(np.uint8))
    assert sum_of(jnp.asarray(x, jnp.int4)).tolist() == wanted


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, bool])
def test_is_no_function_of_the_sharding(dtype, devices):
    mesh = Layout(data=2, fsdp=2, tensor=2).mesh(devices)
    x = random((8, 4, 16), dtype)
    wanted = sum_of(x).tolist()
    specs = [(), ("fsdp",), (None, "tensor", "fsdp"), (("data", "fsdp"), None, "tensor")]
    for spec in specs:
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert sum_of(placed).tolist() == wanted


def test_any_bit_of_any_element_and_any_exchange_changes_it():
    x = random((3, 5), np.float32)
    whole = tuple(sum_of(x).tolist())
    found = {whole}
    for index in np.ndindex(x.shape):
        for bit in range(32):
            changed = x.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            found.add(tuple(sum_of(changed).tolist()))
    assert len(found) == 1 + 15 * 32
    assert len({f[0] for f in found}) == len({f[1] for f in found}) == len(found)
    for changed in (x[::-1], x[:, ::-1], np.roll(x, 1), x.reshape(5, 3), x.ravel()):
        assert tuple(sum_of(changed).tolist()) not in found
    assert sum_of(np.float32(0.0)).tolist() != sum_of(np.float32(-0.0)).tolist()


def test_parts_add_to_the_whole():
    x = random((5, 3, 7), np.float32)
    pieces = itertools.product([(0, 2), (2, 5)], [(0, 1), (1, 3)], [(0, 3), (3, 7)])
    parts = [sum_of(x[i:a, j:b, k:c], (i, j, k)) for (i, a), (j, b), (k, c) in pieces]
    np.testing.assert_array_equal(np.sum(parts, 0, dtype=np.uint32), sum_of(x))


def test_what_has_no_checksum_is_refused():
    with pytest.raises(TypeError, match="no checksum of complex64"):
        checksum(jnp.zeros(2, jnp.complex64))
    with pytest.raises(TypeError, match="no checksum of key"):
        checksum(jax.random.key(0))
