"""What a training step will take, from the compiler: memory, work and communication, without running it."""

import json
import os
import sys

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from treerl import processes, profiling
from treerl.errors import UserError
from treerl.experiment import Experiment


def described(topology: str) -> list:
    """Devices of TPU hardware that need not be there, such as v5e:8x8 or v4:2x2x4; needs libtpu."""
    for name, value in dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="", TPU_WORKER_HOSTNAMES="localhost").items():
        os.environ.setdefault(name, value)  # libtpu would ask the cloud, and say that nobody answers
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (RuntimeError, jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"--topology={topology} cannot be described ({str(error).splitlines()[0]}); write GENERATION:SHAPE such as "
            "v5e:8x8, and install the extra `tpu`, which brings libtpu."
        ) from error


def plan(config: ConfigDict, topology: str | None = None) -> dict:
    """Compiles the training step of a config and tells what the compiler knows of it.

    Args:
      topology: of TPUs to compile for; None is the devices at hand.

    Returns:
      devices, mesh; memory of a device in bytes: arguments, outputs, temporaries, aliased (arguments that outputs
      replace), total, limit (None where the device does not say); flops and bytes_accessed of a device, in which XLA
      counts what a loop repeats once; collectives: kind -> [how many, their bytes]; and the largest of these.
    """
    experiment = Experiment(config, devices=described(topology) if topology else None)
    memory, mesh, programs = experiment.compile_step(), experiment.mesh, experiment.programs
    counted, found = {}, [c for program in programs for c in profiling.collectives(program, mesh)]
    for collective in found:
        count, size = counted.get(collective.kind, (0, 0))
        counted[collective.kind] = [count + 1, size + collective.bytes]
    largest = max(found, key=lambda c: c.bytes, default=None)
    plans = [program.memory_analysis() for program in programs]
    top = max(plans, key=profiling.total_bytes)
    costs = [program.cost_analysis() for program in programs]
    device = mesh.devices.flat[0]
    return dict(
        devices=f"{mesh.size} x {device.device_kind}",
        mesh=dict(mesh.shape),
        memory=dict(
            arguments=top.argument_size_in_bytes, outputs=top.output_size_in_bytes, temporaries=top.temp_size_in_bytes,
            aliased=top.alias_size_in_bytes, total=memory.total, limit=memory.limit,
        ),
        flops=sum(cost["flops"] for cost in costs),
        bytes_accessed=sum(cost["bytes accessed"] for cost in costs),
        collectives=counted,
        largest=largest and largest._asdict(),
    )  # fmt: skip


def tell(config: ConfigDict, topology: str | None = None) -> None:
    """Prints the plan, for reading on standard error and as a JSON line on standard output; of several processes the first."""
    found = plan(config, topology)
    if processes.is_first():
        print(table(found), file=sys.stderr)
        print(json.dumps(found))


def table(found: dict) -> str:
    """A plan for reading."""
    memory, largest = found["memory"], found["largest"]
    limit = f" of {memory['limit'] / 1e9:.1f}" if memory["limit"] else ""
    lines = [
        ("devices", f"{found['devices']}, mesh {', '.join(f'{k}={v}' for k, v in found['mesh'].items())}"),
        ("memory of a device", f"{memory['total'] / 1e9:.2f}{limit} GB: arguments {memory['arguments'] / 1e9:.2f}, "
         f"results that need room of their own {(memory['outputs'] - memory['aliased']) / 1e9:.2f}, temporaries "
         f"{memory['temporaries'] / 1e9:.2f}"),
        ("work of a device", f"{found['flops']:.3g} FLOP, {found['bytes_accessed']:.3g} bytes, what a loop repeats counted once"),
    ]  # fmt: skip
    lines += [(kind, f"{count}, {size / 1e9:.3g} GB in all, counted likewise") for kind, (count, size) in found["collectives"].items()]
    if largest:
        lines.append(("the largest", f"{largest['kind']} of {largest['shape']} over {largest['axes'] or '?'}, "
                      f"{largest['bytes'] / 1e9:.3g} GB, {largest['depth']} loops deep: {largest['name'][-120:]}"))  # fmt: skip
    return "\n".join(f"{name:20} {text}" for name, text in lines)
