"""Device layouts: pmap, or jit with replicated or fully sharded (FSDP) state.

A step is written once, for one shard, with an optional axis name; `Devices.compile` applies
`jax.pmap` or `jax.jit` to the step. In every layout the state has no leading device axis.
"""

import dataclasses
import mmap
import os
import pathlib
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
MODES = ("pmap", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Devices:
    """All devices of all processes along one axis."""

    # "pmap" (replicated state, explicit collectives), "data" (replicated state, jit over a mesh) or
    # "fsdp" (jit; parameters, averages and optimizer state sharded).
    parallel: str = "pmap"
    devices: tuple[jax.Device, ...] | None = None  # None for all devices

    def __post_init__(self):
        if self.parallel not in MODES:
            raise ValueError(f"parallel is {self.parallel!r}; expected one of {MODES}.")

    @property
    def mesh(self) -> Mesh:
        """One axis over all devices of all processes."""
        devices = np.array(self.devices or jax.devices())
        return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def axis_name(self) -> str | None:
        """The axis name for `jax.lax.pmean` in the step; None if XLA inserts the collectives."""
        return AXIS if self.parallel == "pmap" else None

    def check_batch_size(self, batch_size: int, parts: int = 1) -> None:
        """Raise ValueError unless devices and gradient accumulation divide the batch equally."""
        if batch_size % self.mesh.size:
            raise ValueError(
                f"batch_size is {batch_size}, which {self.mesh.size} devices cannot share equally; "
                f"use a multiple of {self.mesh.size}."
            )
        rows = batch_size // self.mesh.size if self.parallel == "pmap" else batch_size
        if rows % parts:
            raise ValueError(
                f"grad_accumulation is {parts}, which does not divide the {rows} rows that a step "
                f"computes at a time; use a divisor of {rows}, or another batch_size."
            )

    def state_shardings(self, state: Any) -> Any:
        """A NamedSharding for every leaf of a tree of arrays or shapes.

        FSDP shards the largest axis that the devices divide, and replicates leaves without one.
        """
        mesh = self.mesh.local_mesh if self.parallel == "pmap" else self.mesh

        def sharding(leaf):
            spec: list[str | None] = []
            if self.parallel == "fsdp":
                divisible = [n if n % mesh.size == 0 else 0 for n in leaf.shape]
                if max(divisible, default=0):
                    spec = [None] * len(leaf.shape)
                    spec[int(np.argmax(divisible))] = AXIS
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(sharding, state)

    def initialise(self, draw: Callable[[], Any], complete: Callable[[Any], Any]) -> Any:
        """complete(draw()), placed by `state_shardings`; the host draws the parameters.

        No other device holds them whole, and all kinds of devices start from the same numbers.
        """
        params = self.put_state(_on_host(draw))
        shardings = self.state_shardings(jax.eval_shape(complete, params))
        return jax.jit(complete, out_shardings=shardings, donate_argnums=0)(params)

    def put_state(self, state: Any) -> Any:
        """A tree of host or device arrays, placed by `state_shardings`."""

        def put(x, sharding):
            there = getattr(x, "sharding", None) == sharding
            return x if there else jax.device_put(np.asarray(x), sharding)

        return jax.tree.map(put, state, self.state_shardings(state))

    def put_batches(self, batches: Any) -> Any:
        """Host arrays (K, rows of this process, ...) -> device arrays, rows spread over devices."""

        def put(x):
            if self.parallel == "pmap":
                local = self.mesh.local_mesh.size
                x = x.reshape(x.shape[0], local, x.shape[1] // local, *x.shape[2:])
            sharding = NamedSharding(self.mesh, PartitionSpec(None, AXIS))
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(put, batches)

    def compile(self, update: Callable) -> Callable:
        """(state, frozen, batches (K, B, ...), count ()) -> (state, metrics), the state donated."""
        if self.parallel == "pmap":
            axes = (None, None, 1, None)
            return jax.pmap(
                update, AXIS, in_axes=axes, out_axes=None, devices=self.devices, donate_argnums=0
            )
        replicated, inside = NamedSharding(self.mesh, PartitionSpec()), self.in_mesh(update)

        def sharded(state, frozen, batches, count):
            new_state, metrics = inside(state, frozen, batches, count)
            shardings = self.state_shardings(new_state)
            return jax.lax.with_sharding_constraint((new_state, metrics), (shardings, replicated))

        return jax.jit(sharded, donate_argnums=0)

    def in_mesh(self, function: Callable) -> Callable:
        """The function, traced such that networks gather kernels and divide rows (`layers`)."""

        def inside(*arguments):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*arguments)

        return inside

    def to_global(self, state: Any) -> Any:
        """The state as arrays over all processes, as checkpoints and sampling need."""
        return self._converted(multihost_utils.host_local_array_to_global_array, state)

    def from_global(self, state: Any) -> Any:
        """The inverse of `to_global`."""
        return self._converted(multihost_utils.global_array_to_host_local_array, state)

    def _converted(self, convert: Callable, state: Any) -> Any:
        several = self.parallel == "pmap" and jax.process_count() > 1
        return convert(state, self.mesh, PartitionSpec()) if several else state


def _on_host(draw: Callable[[], Any]) -> Any:
    """draw() on the CPU of this process, if JAX may use it, otherwise on the first device."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS does not name the CPU
        host = None
    # One program, which runs once: it takes longer to optimise than to run. But of a U-Net, whose
    # many kernels have few shapes, it compiles 3 times as long as one program for each shape.
    with jax.default_device(host):
        traced = jax.jit(draw).trace()
        if len(jax.tree.leaves(traced.out_info)) > 100:
            return draw()
        options = {"xla_backend_optimization_level": 0} if host else None
        return traced.lower().compile(compiler_options=options)()


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a tree of shardings, for ahead-of-time compilation and `restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def shardings(devices: tuple[jax.Device, ...] | None = None) -> tuple[NamedSharding, NamedSharding]:
    """Rows divided among the devices, by default all, and a copy on each of them."""
    mesh = Devices("data", devices).mesh
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def replicated(tree: Any) -> Any:
    """The arrays of a tree copied to each device, unless all devices have them."""
    if all(len(x.sharding.device_set) == jax.device_count() for x in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() > 1:  # arrays of one process do not move to the devices of others
        tree = jax.device_get(tree)
    return jax.device_put(tree, shardings()[1])


def in_batches(
    run: Callable[..., Any], read: Callable[[np.ndarray], Any], count: int, batch_size: int, *,
    fixed: bool = False, axis: int = 0,
) -> Iterator[tuple[np.ndarray, Any]]:  # fmt: skip
    """(rows (n,), run(*read(rows))) for all of `count` rows, a batch at a time.

    The batch size is at most `count`, unless `fixed`, and is rounded up to a multiple of the
    devices, which divide the rows. The last batch is padded by its own rows, so that one program
    computes all batches; the results are trees of NumPy arrays with n rows along `axis`.
    """
    size = batch_size if fixed else min(batch_size, max(count, 1))
    size += -size % jax.device_count()
    spread = shardings()[0]
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        found = run(*jax.device_put(read(np.resize(rows, size)), spread))
        kept = (slice(None),) * axis + (slice(len(rows)),)
        yield rows, jax.tree.map(lambda x, kept=kept: np.asarray(x)[kept], found)


def check_memory(what: str, numbers: int, remedy: str) -> None:
    """ValueError if so many float32 numbers do not fit into the memory of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else np.inf
    if 4 * numbers > (memory := pages * mmap.PAGESIZE):
        raise ValueError(
            f"{what} need {4 * numbers / 1e9:.3g} GB; this machine has {memory / 1e9:.3g} GB. "
            f"{remedy}"
        )


def barrier(name: str) -> None:
    """Return when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def service() -> Any:
    """JAX's distributed service as this process sees it: process_id, num_processes, client.

    The devices need not be made for it, which `jax.process_index` would do.
    """
    return distributed.global_state


def is_first() -> bool:
    """True in process 0, which alone writes files and prints results."""
    return service().process_id == 0


def exists(path: pathlib.Path) -> bool:
    """True if a file exists, as all processes see it.

    RuntimeError: some processes see it and others do not.
    """
    found = path.exists()
    if jax.process_count() > 1:
        seen = multihost_utils.process_allgather(np.array(found))
        if not seen.all() and seen.any():
            raise RuntimeError(
                f"{path} exists for {seen.sum()} of {len(seen)} processes; use folders on a disk "
                "that all processes share."
            )
    return found


def banner() -> str:
    """One line with the devices of this process, which makes a silent CPU fallback visible."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return (
        f"jax {jax.__version__} on {jax.default_backend()}: {jax.device_count()} device(s) "
        f"({', '.join(kinds)}), {jax.process_count()} process(es)"
    )


def peak_memory() -> int:
    """The most bytes in use so far: of the fullest device, or of this process on the CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = max(one.get("peak_bytes_in_use", 0) for one in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_accelerator() -> None:
    """Raise RuntimeError if the default backend is the CPU."""
    if jax.default_backend() == "cpu":
        raise RuntimeError(
            "config.require_accelerator is set, but JAX found no accelerator: "
            f"{banner()}. Install JAX for your accelerator (pip install 'jax[tpu]' or "
            "'jax[cuda12]'), or pass --config.require_accelerator=False."
        )
