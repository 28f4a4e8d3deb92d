"""The mesh and the rules of `treerl.sharding`, on devices that stand for real ones; loud on every mistake."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from treerl import sharding
from treerl.errors import UserError


def test_mesh_covers_all_devices():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.size == jax.device_count()
    assert sharding.tree_shards(mesh) == jax.device_count()


def test_mesh_sizes(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: list(range(8)))
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: dict(zip(axes, devices.shape)))
    shape = lambda *sizes: dict(zip(("data", "fsdp", "tensor"), sizes))
    assert sharding.make_mesh(data=-1, fsdp=2) == shape(4, 2, 1)
    assert sharding.make_mesh(data=2, fsdp=-1, tensor=2) == shape(2, 2, 2)
    assert sharding.make_mesh(data=1, fsdp=1, tensor=8) == shape(1, 1, 8)
    assert sharding.make_mesh(tensor=2, devices=[5, 6]) == shape(1, 1, 2)
    for bad in (dict(data=-1, fsdp=-1), dict(data=0), dict(fsdp=-2)):
        sizes = dict(data=-1, fsdp=1, tensor=1) | bad
        with pytest.raises(UserError) as error:
            sharding.make_mesh(**bad)
        assert str(error.value) == (
            f"mesh.data={sizes['data']}, mesh.fsdp={sizes['fsdp']}, mesh.tensor=1 cannot work; "
            "set positive sizes, at most one of them -1 for the rest."
        )
    for bad in (dict(data=3), dict(fsdp=3), dict(fsdp=16), dict(data=4), dict(data=4, fsdp=4)):
        sizes = dict(data=-1, fsdp=1, tensor=1) | bad
        with pytest.raises(UserError) as error:
            sharding.make_mesh(**bad)
        assert str(error.value) == (
            f"mesh.data={sizes['data']}, mesh.fsdp={sizes['fsdp']}, mesh.tensor=1 does not fit the number of "
            "devices, 8; set sizes that multiply to 8, or one of them to -1 for the rest."
        )


class Chip:
    """Stands for a TPU of a slice: what `mesh_utils` reads of it."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, number: int, of_slice: int, side: int):
        self.id, self.slice_index, self.coords = number, of_slice, (number % side, number // side % side, 0)

    def __repr__(self):
        return f"{self.slice_index}:{self.coords}"


def test_slices_have_their_own_part_of_data(monkeypatch):
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: devices)
    chips = [Chip(i, s, 2) for s in (1, 0) for i in range(4)]
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2, devices=chips)
    assert mesh.shape == (2, 2, 2)
    assert [{chip.slice_index for chip in part.flat} for part in mesh] == [{0}, {1}]
    mesh = sharding.make_mesh(data=4, tensor=2, devices=chips)
    assert [{chip.slice_index for chip in part.flat} for part in mesh] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError) as error:
        sharding.make_mesh(data=1, fsdp=-1, devices=chips)
    assert str(error.value) == (
        "mesh.data=1, mesh.fsdp=-1, mesh.tensor=1 cannot span 2 slices, of which each needs its own part of mesh.data=1; "
        "make that a multiple of 2."
    )


def test_neighbours_of_a_torus_are_neighbours_of_the_mesh(monkeypatch):
    """Not the order in which devices are counted: along tensor, the innermost axis, all chips lie in one line."""
    monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: devices)
    chips = [Chip(i, 0, 4) for i in np.random.default_rng(0).permutation(16)]
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=4, devices=chips)
    for line in (*mesh[0], *mesh[0].T):
        assert 1 in (len({chip.coords[0] for chip in line}), len({chip.coords[1] for chip in line}))


class Sizes:
    """Stands for a mesh of 8 devices, of which only the sizes are read."""

    shape = {"data": 2, "fsdp": 2, "tensor": 2}


def shardings(axes, sizes, monkeypatch, **options):
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), sizes, is_leaf=lambda x: isinstance(x, tuple))
    return sharding.parameter_shardings(Sizes(), axes, shapes, **options)


def test_parameters_follow_the_rules(monkeypatch):
    axes = {"block": {"q": ("embed", "heads", "head_dim"), "scale": ("norm",)}, "table": ("vocab", "embed")}
    sizes = {"block": {"q": (3, 8, 4, 5), "scale": (3, 7)}, "table": (10, 8)}  # 3 stacked layers
    assert shardings(axes, sizes, monkeypatch) == {
        "block": {"q": PartitionSpec(None, "fsdp", "tensor", None), "scale": PartitionSpec(None, None)},
        "table": PartitionSpec("tensor", "fsdp"),
    }
    assert shardings(axes, sizes, monkeypatch, gathered=True) == {
        "block": {"q": PartitionSpec(None, None, "tensor", None), "scale": PartitionSpec(None, None)},
        "table": PartitionSpec("tensor", None),
    }


@pytest.mark.parametrize(
    "axes, sizes, message",
    [
        (("embed", "colour"), (8, 8), "['a']['w']: no sharding rule for logical axis 'colour'; add it to sharding.RULES."),
        (("heads", "mlp"), (8, 8), "['a']['w']: mesh axis 'tensor' is used twice by ('heads', 'mlp'); change sharding.RULES."),
        (("embed", "heads"), (8, 5), "['a']['w']: heads=5 does not divide by mesh.tensor=2; the nearest size that does is 6."),
        (("embed",), (3, 7), "['a']['w']: embed=7 does not divide by mesh.fsdp=2; the nearest size that does is 8."),
    ],
)  # fmt: skip
def test_parameter_errors(axes, sizes, message, monkeypatch):
    with pytest.raises(ValueError) as error:
        shardings({"a": {"w": axes}}, {"a": {"w": sizes}}, monkeypatch)
    assert str(error.value) == message
