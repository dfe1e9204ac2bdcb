"""Traffic and copies, read from the text of programs."""

import jax
import jax.numpy as jnp
import pytest

from dgr_jax.planning.hlo import Traffic, collectives, instructions

TEXT = """HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition.2 (s: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body.3 (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %gathered = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, dimensions={0}, metadata={op_name="a/dot"}
  %started = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%w), channel_id=2, dimensions={0}
  %done = bf16[8,128]{1,0} all-gather-done(%started)
  ROOT %t = (s32[], bf16[8,128]) tuple(%i, %done)
}

%open.4 (s: s32[]) -> pred[] {
  ROOT %less.2 = pred[] compare(%a, %b), direction=LT
}

%again.5 (s: s32[]) -> s32[] {
  %c = f32[4,4]{1,0} copy(%x), metadata={op_name="b/transpose"}
  ROOT %r = f32[16]{0} reduce-scatter(%c), channel_id=3, dimensions={0}, to_apply=%add.1
}

ENTRY %main.6 (w: bf16[2,128]) -> f32[] {
  %loop = (s32[], bf16[8,128]) while(%init), condition=%condition.2, body=%body.3
  %loop.2 = s32[] while(%init.2), condition=%open.4, body=%again.5
  %loop.3 = s32[] while(%init.3), condition=%open.4, body=%again.5, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %all = (f32[], pred[8]) all-reduce(%y, %z), channel_id=4, to_apply=%add.1
}
"""


def test_traffic_counts_loops_and_what_is_started():
    assert collectives(TEXT) == {
        "all-gather": Traffic(2 * 36, 2 * 36 * 8 * 128 * 2),
        "reduce-scatter": Traffic(1 + 5, 6 * 16 * 4),  # a loop of which nothing is known beforehand counts once
        "all-reduce": Traffic(1, 4 + 8),
    }


def test_copies_are_found_with_where_they_come_from():
    copies = [one for one in instructions(TEXT) if one.opcode == "copy"]
    assert [(one.times, one.arrays, one.source) for one in copies] == [
        (1, (("f32", (4, 4)),), "b/transpose"),
        (5, (("f32", (4, 4)),), "b/transpose"),
    ]


@pytest.mark.parametrize("length", [3, 7])
def test_a_real_program_says_how_often_its_loop_runs(length):
    def run(x):
        return jax.lax.scan(lambda carry, _: (jnp.sin(carry @ carry), None), x, None, length=length)[0]

    text = jax.jit(run).lower(jnp.ones((64, 64))).compile().as_text()
    dots = [one for one in instructions(text) if one.opcode in ("dot", "custom-call") and "dot_general" in one.source]
    assert [one.times for one in dots] == [length]
