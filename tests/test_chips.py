"""Peaks of chips against published tables; topologies that are none, and missing compilers."""

import importlib.util
import re

import pytest

from mclr_jax.chips import CHIPS, KINDS_OF_CHIP, topology


def test_peaks_are_near_those_of_the_documentation():
    """GB of memory in Google's tables, of which libtpu leaves most, and the FLOP for each byte."""
    published = {"v4": (32, 229), "v5e": (16, 241), "v5p": (95, 166), "v6e": (32, 560)}
    assert published.keys() == CHIPS.keys()
    for name, (gigabytes, intensity) in published.items():
        chip = CHIPS[name]
        assert 0.95 < chip.memory / gigabytes / 1e9 < 1.1
        assert chip.flops / chip.bandwidth == pytest.approx(intensity, abs=1)


def test_peaks_of_gpus_are_dense():
    """GB of memory, GB/s, and TFLOP/s, half of those with sparsity."""
    published = {
        "NVIDIA H200": (141, 4800, 1979 / 2),
        "NVIDIA H100 80GB HBM3": (80, 3350, 1979 / 2),
        "NVIDIA H100 PCIe": (80, 2000, 1513 / 2),
        "NVIDIA A100-SXM4-80GB": (80, 2039, 624 / 2),
        "NVIDIA A100 80GB PCIe": (80, 1935, 624 / 2),
        "NVIDIA A100-SXM4-40GB": (40, 1555, 624 / 2),
        "NVIDIA A100-PCIE-40GB": (40, 1555, 624 / 2),
        "NVIDIA L4": (24, 300, 242 / 2),
        "Tesla T4": (16, 320, 130 / 2),
    }
    gpus = {name: chip for name, chip in KINDS_OF_CHIP.items() if "TPU" not in name}
    assert published.keys() == gpus.keys()
    for name, (gigabytes, bandwidth, teraflops) in published.items():
        assert gpus[name].memory == gigabytes * 10**9
        assert gpus[name].bandwidth == bandwidth * 1e9
        assert gpus[name].flops == pytest.approx(teraflops * 1e12, rel=1e-3)
    assert {*KINDS_OF_CHIP.values()} >= {*CHIPS.values()}


def test_bad_topologies_and_a_missing_compiler_are_named(monkeypatch):
    for name in ("v5e", "v5e:4", "v5litepod-8", "v9:2x2", "v5e:0x2", "v5e:2x2x2x2", "v5e:2x2*0",
                 "cuda:h100", "cuda:b900x8", "cuda:h100x0"):  # fmt: skip
        with pytest.raises(ValueError, match=rf"'{re.escape(name)}'; expected .*v5e:1x1.*h100x8"):
            topology(name)
    with pytest.raises(ValueError, match=r"9 GPUs on 2 hosts of 8; use a multiple of 2"):
        topology("cuda:h100x9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"libtpu.*pip install .*tpu-compile"):
        topology("v5e:2x2*2")
    with pytest.raises(RuntimeError, match=r"CUDA plugin.*pip install .*gpu-compile"):
        topology("cuda:h100x8")
