"""All partitioning of lmjax: names for array axes, one table from names to mesh axes, and the mesh.

A model names the axes of its parameters (`param`) and of its activations (`shard`); a `Layout` says
how many devices each mesh axis has; `RULES` joins the two. Weights and activations have different
names, so that fully sharded data parallelism is the one rule `embed -> fsdp`.

`layout`: devices per mesh axis. `names`: axes of arrays and the table. `active`: the mesh in use.
"""

from lmjax.sharding.active import (
    Pipeline,
    axis_size,
    mapped,
    per_device,
    pipeline,
    platform,
    shard,
    split,
    split_axes,
    split_over_length,
    use,
    ways,
)
from lmjax.sharding.layout import MESH_AXES, Layout, Split, described, nearest
from lmjax.sharding.names import (
    AXES,
    RULES,
    Boxed,
    Rules,
    batch_sharding,
    batch_ways,
    mesh_axes,
    param,
    shardings_of,
    spec,
    split_batch,
    splits_of,
    unbox,
)

__all__ = [
    "AXES",
    "MESH_AXES",
    "RULES",
    "Boxed",
    "Layout",
    "Pipeline",
    "Rules",
    "Split",
    "axis_size",
    "batch_sharding",
    "batch_ways",
    "described",
    "mapped",
    "mesh_axes",
    "nearest",
    "param",
    "per_device",
    "pipeline",
    "platform",
    "shard",
    "shardings_of",
    "spec",
    "split",
    "split_axes",
    "split_batch",
    "split_over_length",
    "splits_of",
    "unbox",
    "use",
    "ways",
]
