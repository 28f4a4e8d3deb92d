"""The mesh, the rules from logical axes to mesh axes, and shardings; loud on every mistake."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from treerl.errors import UserError

AXES = ("data", "fsdp", "tensor")
TREES = PartitionSpec(("data", "fsdp"))  # trees and bins: first axis over both

# logical axis of a parameter or an activation -> mesh axis
RULES = {
    "trees": TREES[0],  # of a batch, and its bins
    "vocab": "tensor",
    "alphabet": None,  # a vocabulary of characters, not worth cutting
    "embed": "fsdp",  # of parameters: gathered where they are used
    "heads": "tensor",
    "kv_heads": "tensor",
    "group": None,
    "head_dim": None,
    "gate_up": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None) -> Mesh:
    """A mesh; one size may be -1, the rest.

    On TPUs neighbours in the mesh are neighbours in the torus, and of several slices, which only a slower network
    joins, each has its own part of the data axis.

    Args:
      devices: None is all there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices)
    given = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or min(sizes.values()) < -1 or 0 in sizes.values():
        raise UserError(f"{given} cannot work; set positive sizes, at most one of them -1 for the rest.")
    if free:
        sizes[free[0]] = count // known
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"{given} does not fit the number of devices, {count}; set sizes that multiply to {count}, or one of them to -1 for the rest."
        )
    shape = [sizes[axis] for axis in AXES]
    if getattr(devices[0], "platform", None) != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise UserError(
            f"{given} cannot span {slices} slices, of which each needs its own part of mesh.data={sizes['data']}; make that a "
            f"multiple of {slices}."
        )
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    inner = [shape[0] // slices, *shape[1:]]
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1], devices, allow_split_physical_axes=True), AXES)


def lone(mesh: Mesh) -> Mesh:
    """A mesh of the first device alone: what a program is built for that each device runs by itself."""
    return Mesh(mesh.devices[:1, :1, :1], AXES)


def parameter_shardings(mesh: Mesh, axes, shapes, *, gathered: bool = False):
    """Shardings of parameters from their logical axes.

    Args:
      axes: nested dict of tuples of logical names. shapes: the same of ShapeDtypeStruct; stacked
        layers have one more axis in front, which is never sharded.
      gathered: leave the fsdp axis out, as the sampler does once before its loop.

    Raises:
      ValueError: for an unknown logical axis, one mesh axis used twice, or a size that does not
        divide, naming the parameter.
    """

    def one(path, names, shape):
        where = jax.tree_util.keystr(path)
        spec = [None] * (len(shape.shape) - len(names))
        for name, size in zip(names, shape.shape[len(spec) :]):
            if name not in RULES:
                raise ValueError(f"{where}: no sharding rule for logical axis {name!r}; add it to sharding.RULES.")
            axis = RULES[name]
            axis = None if gathered and axis == "fsdp" else axis
            if axis is not None and axis in spec:
                raise ValueError(f"{where}: mesh axis {axis!r} is used twice by {names}; change sharding.RULES.")
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{where}: {name}={size} does not divide by mesh.{axis}={mesh.shape[axis]}; "
                    f"the nearest size that does is {math.ceil(size / mesh.shape[axis]) * mesh.shape[axis]}."
                )
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_names = lambda x: isinstance(x, tuple)
    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_names)


def constrain(x, mesh: Mesh | None, *names, gathered: bool = False):
    """Says how a traced array lies on the mesh, by a logical name or None for each axis; mesh None says nothing.

    Args:
      gathered: leave the fsdp axis out: parameters on their way into a product.
    """
    if mesh is None:
        return x
    axes = (None if name is None else RULES[name] for name in names)
    spec = PartitionSpec(*(None if gathered and axis == "fsdp" else axis for axis in axes))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value everywhere."""
    return NamedSharding(mesh, PartitionSpec())


def trees(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, TREES)


def tree_shards(mesh: Mesh) -> int:
    """Number of parts that a batch of trees is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_rows(where: NamedSharding, count: int) -> np.ndarray:
    """Rows of a first axis of size `count` that this process's devices hold, ascending."""
    cuts = where.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[cut[0]] for cut in cuts]))


def shapes(tree, where: NamedSharding):
    """A pytree of host arrays as the ShapeDtypeStructs of what `place` makes of them."""
    dtype = jax.dtypes.canonicalize_dtype
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype(np.asarray(x).dtype), sharding=where), tree)


def place(tree, where: NamedSharding, rows: np.ndarray | None = None, count: int | None = None):
    """Puts a pytree of host arrays onto the mesh, in each process the parts of its own devices.

    Args:
      rows: the arrays hold these rows, see `own_rows`, of `count` in all; None: they hold everything.
    """

    def one(x):
        x = np.asarray(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
        if rows is None:
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
        first = {number: i for i, number in enumerate(rows.tolist())}

        def part(index):
            cut = range(count)[index[0]]
            return x[first[cut[0]] :][: len(cut)]

        return jax.make_array_from_callback((count, *x.shape[1:]), where, part)

    return jax.tree.map(one, tree)
