"""Names of axes, the mesh, and what of an array lies where."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from lmjax.errors import UserError
from lmjax.optim.presets import adamw, lion
from lmjax.sharding import (
    MESH_AXES,
    RULES,
    Boxed,
    Layout,
    batch_sharding,
    batch_ways,
    mesh_axes,
    param,
    platform,
    shard,
    shardings_of,
    spec,
    unbox,
    use,
)


class Toy(nn.Module):
    """An embedding and a stack of two blocks, each sharded axis at least once."""

    width: int = 8
    axes: tuple[str | None, ...] = ("embed", "mlp")

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        table = param(self, "table", zeros, (16, self.width), ("vocab", "embed"))
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={"axis": "layers"},
        )
        return blocks(self.width, self.axes, name="blocks")(x + table[0], None)[0]


class Block(nn.Module):
    width: int
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x, _):
        zeros = nn.initializers.zeros
        up = param(self, "up", zeros, (self.width, 4 * self.width), self.axes)
        heads = param(self, "query", zeros, (self.width, 4, 2), ("embed", "heads", "head_dim"))
        bias = param(self, "bias", zeros, (4 * self.width,), ("mlp",))
        return x + ((x @ up + bias).sum() + heads.sum()), None


def params_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(module.width))["params"]


def mesh_of(devices, **sizes):
    return Layout(**({"data": 1} | sizes)).mesh(devices)


def specs_of(tree, mesh):
    """path -> spec as the tuple of what each axis is split over."""
    leaves = jax.tree_util.tree_flatten_with_path(shardings_of(tree, mesh))[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): s.spec for k, s in leaves}


# Layout


@pytest.mark.parametrize(
    ("fields", "count", "expected"),
    [
        ({}, 8, {"data": 8}),
        ({}, 1, {"data": 1}),
        ({"fsdp": 2, "tensor": 2}, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 1, "fsdp": -1, "context": 2}, 8, {"fsdp": 4, "context": 2}),
        ({"slices": 2, "data": 2, "fsdp": 2}, 8, {"slices": 2, "data": 2, "fsdp": 2}),
        ({"data": 1, "expert": 4, "stage": -1}, 8, {"expert": 4, "stage": 2}),
    ],
)
def test_layout_resolves(fields, count, expected):
    assert Layout(**fields).sizes(count) == dict.fromkeys(MESH_AXES, 1) | expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 0}, "^fsdp is 0: must be at least 1, or -1"),
        ({"tensor": -2}, "^tensor is -2"),
        ({"fsdp": -1}, "^data and fsdp are -1: only one axis"),
        ({"stage_microbatches": -1}, "^stage_microbatches is -1"),
        ({"stage_repeats": 0}, "stage_repeats 0: give at least 0 and at least 1"),
    ],
)
def test_layout_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        Layout(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 3}, r"\(data=-1, tensor=3\) asks for a multiple of 3 devices, and there are 8"),
        ({"tensor": 16}, "asks for a multiple of 16 devices"),
        ({"data": 2, "fsdp": 2}, r"\(data=2, fsdp=2\) asks for 4 devices, and there are 8"),
        ({"data": 1}, r"\(one device\) asks for 1 devices.* fit: \(fsdp=8\), \(data=2, fsdp=4\),"),
        ({"data": 4, "tensor": 3}, r"fit: \(data=4, tensor=2\), "),
    ],
)
def test_layout_that_does_not_fit_the_devices(fields, message):
    with pytest.raises(UserError, match=message):
        Layout(**fields).sizes(8)


def test_mesh_has_every_axis_slowest_network_first(devices):
    mesh = Layout(slices=2, data=1, fsdp=2, tensor=2).mesh(devices)
    assert mesh.axis_names == MESH_AXES
    assert (MESH_AXES[0], MESH_AXES[-1]) == ("slices", "tensor")
    assert mesh.devices.shape == (2, 1, 2, 1, 1, 1, 2)
    assert mesh.devices.ravel().tolist() == list(devices)
    # neighbours along `tensor` are neighbours among the devices
    assert mesh.devices[0, 0, 0, 0, 0, 0].tolist() == list(devices[:2])


# Names


def test_rules_name_mesh_axes_only():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)


def test_param_refuses_unknown_axis_and_wrong_rank():
    with pytest.raises(ValueError, match=r"unknown axis name 'mpl'\. Did you mean 'mlp'"):
        params_of(Toy(axes=("embed", "mpl")))
    with pytest.raises(ValueError, match=r"1 axis names \('embed',\) for an array of rank 2"):
        params_of(Toy(axes=("embed",)))


def test_shard_refuses_unknown_axis_and_wrong_rank_even_without_a_mesh():
    with pytest.raises(ValueError, match=r"unknown axis name 'batches'\. Did you mean 'batch'"):
        shard(jnp.zeros((2, 3)), "batches", None)
    with pytest.raises(ValueError, match="1 axis names"):
        shard(jnp.zeros((2, 3)), "batch")


def test_a_mesh_axis_serves_one_axis_of_an_array():
    """The first name that asks gets it."""
    assert mesh_axes(("mlp", "vocab", "embed")) == [("tensor",), (), ("fsdp",)]
    assert spec(("batch", "embed", None)) == P(("slices", "data", "fsdp", "expert"), None, None)
    assert spec(("embed", "batch")) == P(("fsdp",), ("slices", "data", "expert"))


def test_scan_names_its_axis():
    params = params_of(Toy())
    assert params["table"].axes == ("vocab", "embed")
    assert params["blocks"]["up"].axes == ("layers", "embed", "mlp")
    assert params["blocks"]["up"].value.shape == (2, 8, 32)
    assert params["blocks"]["bias"].axes == ("layers", "mlp")


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_scanned_axis_comes_and_goes(index):
    box, scan = Boxed(jnp.zeros((2, 3)), ("embed", "mlp")), {"axis": "layers"}
    stacked = box.add_axis(index, scan)
    assert stacked.axes[index] == "layers"
    assert stacked.remove_axis(index, scan).axes == box.axes


# Where things lie


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (
            {"fsdp": 8},
            {"table": (1, 8), "up": (1, 8, 1), "query": (1, 8, 1, 1), "bias": (1, 1)},
        ),
        (
            {"tensor": 4, "data": 2},
            {"table": (4, 1), "up": (1, 1, 4), "query": (1, 1, 4, 1), "bias": (1, 4)},
        ),
        (
            {"stage": 2, "fsdp": 2, "tensor": 2},
            {"table": (2, 2), "up": (2, 2, 2), "query": (2, 2, 2, 1), "bias": (2, 2)},
        ),
        ({"data": 8}, {"table": (1, 1), "up": (1, 1, 1), "query": (1, 1, 1, 1), "bias": (1, 1)}),
    ],
    ids=["fsdp", "tensor", "stage-fsdp-tensor", "data"],
)
def test_parameters_are_cut(devices, sizes, expected):
    """Into how many parts each axis goes."""
    params = params_of(Toy())
    shardings = shardings_of(params, mesh_of(devices, **sizes))
    flat = {"table": params["table"], **params["blocks"]}
    found = {"table": shardings["table"], **shardings["blocks"]}
    for name, parts in expected.items():
        shape = flat[name].value.shape
        local = found[name].shard_shape(shape)
        assert tuple(n // m for n, m in zip(shape, local, strict=True)) == parts, name


def test_indivisible_size_names_the_parameter(devices):
    message = (
        "parameter blocks/query has 6 along 'embed', which fsdp = 4 devices do not divide. "
        r"The nearest layouts that fit: \(data=2, fsdp=2\)"
    )
    with pytest.raises(UserError, match=message):
        shardings_of({"blocks": params_of(Toy(width=6))["blocks"]}, mesh_of(devices[:4], fsdp=4))


@pytest.mark.parametrize(("optimizer", "count"), [(adamw, 2), (lion, 1)], ids=["adamw", "lion"])
def test_moments_lie_where_their_parameters_do(devices, optimizer, count):
    params, mesh = params_of(Toy()), mesh_of(devices, fsdp=2, tensor=2, data=2)
    chain = optimizer(learning_rate=lambda step: jnp.float32(1.0), average=0.9)
    state = jax.eval_shape(chain.init, params)
    found, state_specs = specs_of(params, mesh), specs_of(state, mesh)
    for name, expected in found.items():
        copies = [s for path, s in state_specs.items() if path.endswith(name)]
        assert copies == [expected] * (count + 1), name  # the moments and the average
    scalars = {
        s for path, s in state_specs.items() if path.endswith(("count", "step", "learning_rate"))
    }
    assert scalars == {P()}


def test_what_has_no_box_is_replicated(devices):
    assert shardings_of(jnp.zeros(3), mesh_of(devices, fsdp=8)).spec == P()


def test_unbox_has_the_structure_of_the_shardings(devices):
    params = params_of(Toy())
    mesh = mesh_of(devices, fsdp=8)
    assert jax.tree.structure(unbox(params)) == jax.tree.structure(shardings_of(params, mesh))


def test_batch_rows_are_split_over_the_data_parallel_axes(devices):
    mesh = mesh_of(devices, slices=2, data=1, fsdp=2, tensor=2)
    assert batch_ways(mesh) == 4
    assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)


def test_shard_does_nothing_without_a_mesh_or_on_one_device(devices):
    x = jnp.zeros((8, 4))
    assert shard(x, "batch", "act_mlp") is x
    with use(mesh_of(devices[:1])):
        assert shard(x, "batch", "act_mlp") is x


def test_shard_constrains_to_the_mesh_in_use(devices):
    mesh = mesh_of(devices, data=4, tensor=2)

    def step(x):
        with use(mesh):
            return shard(x * 2, "batch", "act_mlp")

    y = jax.jit(step)(jnp.ones((8, 4)))
    assert y.sharding.shard_shape(y.shape) == (2, 2)
    np.testing.assert_array_equal(y, 2.0)
    x = jnp.zeros((8, 4))
    assert shard(x, "batch", "act_mlp") is x  # the mesh is no longer in use


def test_use_is_undone_after_an_error(devices):
    with pytest.raises(RuntimeError), use(mesh_of(devices, data=8)):
        raise RuntimeError
    x = jnp.zeros((8, 4))
    assert shard(x, "batch", None) is x


def test_platform_is_that_of_the_mesh_in_use(devices):
    with use(mesh_of(devices, data=8)):
        assert platform() == devices[0].platform
    assert platform() == jax.default_backend()


def test_bytes_per_device_fall_with_fsdp(devices):
    params = params_of(Toy())
    shardings = shardings_of(params, mesh_of(devices, fsdp=8))
    sizes = [
        (math.prod(s.shard_shape(p.shape)), math.prod(p.shape))
        for p, s in zip(jax.tree.leaves(unbox(params)), jax.tree.leaves(shardings), strict=True)
        if p.shape != (2, 32)  # biases stay whole
    ]
    assert all(whole == 8 * local for local, whole in sizes)
