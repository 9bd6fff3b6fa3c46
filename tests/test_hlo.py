"""Collectives of a program, counted by hand and in XLA:CPU's own text."""

import jax
import jax.numpy as jnp

from mclr_jax import hlo
from mclr_jax.training.devices import Devices

HLO = """HloModule jit_step, num_partitions=4

%piece.1 (p.1: bf16[2,4]) -> bf16[8,4] {
  ROOT %all-gather.7 = bf16[8,4]{1,0:T(8,128)S(1)} all-gather(%p.1), channel_id=9, dimensions={0}
}

%piece.2 (p.2: bf16[2,4]) -> bf16[8,4] {
  ROOT %all-gather.8 = bf16[8,4]{1,0} all-gather(%p.2), channel_id=9, dimensions={0}
}

%body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %all-reduce.1 = f32[16]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-reduce.2 = f32[16]{0} all-reduce(%y), channel_id=1, to_apply=%add
}

%below (s: (s32[])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit.1), direction=LT, backend_config={"flag":[]}
}

%not_constant (s: (s32[])) -> pred[] {
  %zero = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%of_the_tpu (s: (s32[])) -> (s32[]) {
  %all-gather.9 = f32[2]{0} all-gather(%z), channel_id=14
}

%unknown (s: (s32[])) -> (s32[]) {
  %all-to-all.3 = s8[7]{0} all-to-all(%z), channel_id=4
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %f.1 = bf16[8,4]{1,0} fusion(%a), kind=kCustom, calls=%piece.1
  %f.2 = bf16[8,4]{1,0} fusion(%f.1), kind=kCustom, calls=%piece.2
  %while.1 = (s32[], f32[16]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[]) while(%u), condition=%not_constant, body=%unknown
  %while.3 = (s32[]) while(%u), condition=%below, body=%of_the_tpu
  %collective-permute-start = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[]) collective-permute-start(%b), channel_id=5
  %collective-permute-done = f32[2,3]{1,0} collective-permute-done(%collective-permute-start)
  %reduce-scatter.5 = (f32[3]{0}, pred[5]{0}) reduce-scatter(%d, %e), channel_id=6, dimensions={0}
}
"""  # noqa: E501


def test_collectives_of_a_program_are_counted_by_hand():
    assert hlo.collectives(HLO) == {
        "all-reduce": {"count": 6, "bytes": 3 * 2 * 64},  # of one channel, as by pmap
        "all-gather": {"count": 1 + 28, "bytes": 64 + 28 * 8},  # one in two pieces
        "reduce-scatter": {"count": 1, "bytes": 12 + 5},
        "all-to-all": {"count": 1, "bytes": 7},
        "collective-permute": {"count": 1, "bytes": 24},
    }


def test_a_parameter_is_gathered_whole_in_each_round():
    """Rows of the data times a sharded matrix of 4 kB, 3 times: XLA:CPU's own text of a loop."""
    devices = Devices("fsdp")
    split = jax.sharding.NamedSharding(devices.mesh, jax.P("data"))
    whole = jax.sharding.NamedSharding(devices.mesh, jax.P())

    def loop(x, w):
        def multiply(i, x):
            shifted = jax.lax.with_sharding_constraint(w + i, split)  # no gathering before the loop
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(shifted, whole))

        return jax.lax.fori_loop(0, 3, multiply, x)

    arguments = (jax.ShapeDtypeStruct((n, 32), jnp.float32, sharding=split) for n in (8, 32))
    text = jax.jit(loop, out_shardings=split).lower(*arguments).compile().as_text()
    assert hlo.collectives(text) == {"all-gather": {"count": 3, "bytes": 3 * 4 * 32 * 32}}
