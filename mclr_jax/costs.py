"""Findings of `plan`, as lines for humans."""

from collections.abc import Mapping
from typing import Any


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.3g} GiB"


def memory(cost: Mapping[str, Any]) -> str:
    """The memory of a chip by its parts, and whether it suffices."""
    parts = {k: v for k, v in cost["memory_per_chip_bytes"].items() if v is not None}
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"{listed or 'unknown'}: {'fits' if cost['fits'] else 'DOES NOT FIT'}"


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:21s} {line}" for name, line in lines.items())


def sampling(cost: Mapping[str, Any]) -> str:
    """Findings of `plan.sampling`."""
    each = cost["thousand_samples"]
    lines = {
        "sampling": f"{cost['batch_size']} at once, guidance scale {cost['guidance_scale']:g}, "
        f"{each['network_calls']} network calls each",
        "... memory per chip": memory(cost),
        "... 1,000 samples": f"{each['flops']:.4g} FLOPs, at least {each['chip_seconds']:.3g} "
        "chip-seconds",
        "... compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)


def training(cost: Mapping[str, Any]) -> str:
    """Findings of `plan.planned`."""
    each, roofline, samples = (
        cost[key] for key in ("flops_per_example", "roofline", "thousand_samples")
    )
    chip = roofline["chip"]
    exchanged = (f"{kind} {each['count']} ({each['bytes'] / 2**20:.3g} MiB)"
                 for kind, each in cost["collectives"].items())  # fmt: skip
    seconds = ", ".join(f"{name} {value:.2e}" for name, value in roofline["seconds"].items())
    peaks = (f"{chip['flops'] / 1e12:g} TFLOP/s, memory {chip['bandwidth'] / 1e9:g} GB/s, "
             f"links {chip['link'] / 1e9:g} GB/s ({chip['source']})")  # fmt: skip
    lines = {
        "topology": f"{cost['topology']}: {cost['chips']} chips of "
        f"{_bytes(cost['chip_memory_bytes'])}; parallel={cost['parallel']}",
        "step": f"{cost['batch_size']} examples, {cost['steps_per_dispatch']} steps in a dispatch",
        "parameters": f"{cost['parameters']:,}, and frozen {cost['frozen_parameters']:,}",
        "memory per chip": memory(cost),
        "FLOPs": f"{cost['flops_per_step']:.4g} a step; of one example {each['forward']:.4g} "
        f"forward, {each['step']:.4g} in a step",
        "collectives per step": ", ".join(exchanged) or "none",
        "seconds per step": f"at least {roofline['seconds_per_step']:.2e} ({seconds})",
        "peaks assumed": peaks,
        "whole training": f"at least {cost['device_hours']:.3g} chip-hours",
        "1,000 samples": f"{samples['network_calls']} network calls each, "
        f"{samples['flops']:.4g} FLOPs, at least {samples['chip_seconds']:.3g} chip-seconds",
        "compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)
