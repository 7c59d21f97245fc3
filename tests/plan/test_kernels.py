"""Cycles of kernels from the bundles that libtpu writes down: an excerpt, and a kernel of known work where it is."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from unclip_jax.plan.dump import cycles
from unclip_jax.plan.kernels import asking, count_bundles, read_bundles
from unclip_jax.plan.slices import GENERATIONS
from unclip_jax.plan.worker import TPU_ENVIRONMENT

SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1   :  { %13 = vpush.ccrf %v10 }
   0x2 LB: > { %s2 = sphi %s3, %s4  ;;  %s11 = sadd.s32 4294967294, %s2 /* iteration index, stage = 2 */ }
   0x3   : > { %v5 = vld [vmem:[%s2]]
second_minor_factor: 1 */ }
   0x4   :  {} /* End region 42 */
   0x5 LB: > > { %v6 = vmul.f32 %v5, %v5 }
   0x6   : > > { %p7 = scmp.ge.s32.totalorder %s8, 10 /* loop exit test */ }
   0x7 PF: > { %p9 = scmp.ge.s32.totalorder %s2, 386 /* loop exit test */ }
   0x8   :  { %8520 = vsyncpa [#allocation17 + $0x1], 1 }
"""
PROGRAM = """ENTRY %main (x: bf16[8]) -> bf16[8] {
  %kernel.1 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %copy.1 = bf16[8]{0} copy(%kernel.1), backend_config={"estimated_cycles":"50"}
}
"""
COMPILE = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from unclip_jax import sharding
from unclip_jax.models.flash import attend_blocks
from unclip_jax.plan.dump import cycles
from unclip_jax.plan.kernels import read_bundles
from unclip_jax.plan.slices import GENERATIONS, Slice

folder, chip = Path(sys.argv[1]), GENERATIONS["v5e"]
mesh = sharding.make_mesh("dp", topologies.get_topology_desc(**Slice(chip, chip.sides[0]).request()).devices)
for heads in (4, 8):
    x = jax.ShapeDtypeStruct((8, 300, heads, 64), jnp.bfloat16, sharding=sharding.replicated(mesh))
    with sharding.on(mesh):
        traced = jax.jit(lambda q, k, v: attend_blocks(q, k, v, None, causal=True)).trace(x, x, x)
    lowered = traced.lower(lowering_platforms=("tpu",))
    lowered.compile(compiler_options={"xla_dump_to": str(folder / str(heads)), "xla_dump_hlo_as_text": True})
    with next((folder / str(heads)).glob("*after_codegen.txt")).open() as lines:
        known = read_bundles(folder)
        print(cycles(lines, known), sum(bundles for name, bundles in known.items() if name.startswith("products")))
"""


def test_bundles_of_nested_loops_are_multiplied_out():
    assert count_bundles(SCHEDULE.splitlines()) == 3 + (386 - 2) * (3 + 10 * 2)


def test_kernels_cost_what_their_bundles_say(tmp_path):
    (tmp_path / "123-kernel.1-01-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "123-kernel.1-00-schedule-analysis_final_bundles.txt").write_text("")
    found = read_bundles(tmp_path)
    assert cycles(PROGRAM.splitlines(keepends=True), found) == 50 + count_bundles(SCHEDULE.splitlines())
    with pytest.raises(ValueError, match="kernel.1"):
        cycles(PROGRAM.splitlines(keepends=True), {})


def test_libtpu_tells_the_bundles_of_our_attention(tmp_path):
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[plan]'")
    environment = {**os.environ, **TPU_ENVIRONMENT, "LIBTPU_INIT_ARGS": asking(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    (few, kernel), (_, both) = (map(float, line.split()) for line in ended.stdout.splitlines()[-2:])
    chip = GENERATIONS["v5e"]
    least = 2 * 2 * 8 * 4 * 300 * 300 * 64 / (chip.peak / chip.clock)
    assert 2 * least < kernel < few  # heads of 64 channels fill half of the lanes
    assert 1.9 < (both - kernel) / kernel < 2.1  # twice the heads
