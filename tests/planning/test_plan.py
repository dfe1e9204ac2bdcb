"""The plan of a run: its numbers, its text, the search for the largest batch, and what is said where it cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dgr_kernels.attention import Visibility
from jax.extend.core import jaxprs_in_params

from dgr_jax.errors import UserError
from dgr_jax.models.chips import CHIPS, GIB
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.cost import Cost
from dgr_jax.models.decoder import init_model
from dgr_jax.planning.machines import Machine
from dgr_jax.planning.plan import Plan, Step, check_fits, largest_batch
from dgr_jax.planning.programs import Program

CONFIG = ModelConfig("qwen3", 512, 64, 96, 3, 4, 2, 16, qk_norm=True)


def matmul_flops(jaxpr) -> int:
    """Of all matrix products of a program without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted], dtype=int)
            total += 2 * depth * np.prod(equation.outvars[0].aval.shape, dtype=int)
        for inner in jaxprs_in_params(equation.params):
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * matmul_flops(inner)
    return int(total)


@pytest.mark.parametrize("passes", [1, 3])
def test_arithmetic_is_that_of_the_model(passes):
    """Rows of one token, which see no more than themselves: every product is then a visible pair's."""
    rows = 65  # of fewer, a product stands in the program once for CPUs and once for the rest
    model = init_model(CONFIG, 0)
    tokens = jnp.zeros((rows, 1), jnp.int32)

    def total(model):
        hidden = model(tokens, tokens, Visibility.causal(rows, 1))
        return jnp.sum(hidden @ model.unembed_weight.T)

    function = total if passes == 1 else jax.grad(total)
    expected = matmul_flops(jax.make_jaxpr(function)(model).jaxpr)
    found = Cost.of_rows(CONFIG, rows, 1, 1, passes=passes, itemsize=4, copies=1).flops
    assert found == expected


def test_a_token_costs_what_a_row_of_one_does():
    row = Cost.of_rows(CONFIG, 5, 1, 1, passes=1, itemsize=4, copies=1)
    assert Cost.of_token(CONFIG, 5, 1, itemsize=4, copies=1).flops == row.flops


def program(total: int, **held: int) -> Program:
    return Program("train", held, total - sum(held.values()), "ENTRY %main (x: f32[]) -> f32[] {\n}\n", 3.0)


MACHINE = Machine("v5e:1", CHIPS["v5e"], [None])


def plan(total: int, **changes) -> Plan:
    step = Step(program(total, weights=2 * GIB, optimiser=4 * GIB), Cost(1e13, 1e10), 4096)
    return Plan(**{"title": "sft", "machine": MACHINE, "rows": 4, "gradients": GIB, "steps": [step], **changes})


def test_a_plan_reads_as_a_table():
    lines = plan(10 * GIB, largest=7).text().splitlines()
    table = {line[:26].strip(): line[26:].split() for line in lines if line.startswith("  ")}
    assert table["weights"] == ["2.00"] and table["gradients"] == ["1.00"]
    assert table["activations and the rest"] == ["3.00"] and table["together"] == ["10.00"]
    assert "worst moment 10.00 of 15.75 GiB, of which 5% stay free: fits" in lines
    assert "largest batch that fits: 7 rows (this plan: 4)" in lines
    assert any("so at best 80,691 tokens a second, bound by arithmetic" in line for line in lines)


def test_a_cache_stays_while_something_else_runs():
    cached = Step(program(9 * GIB, weights=GIB, cache=7 * GIB), Cost(1, 1), 1)
    alone = Step(program(3 * GIB, weights=GIB), Cost(1, 1), 1)
    assert plan(0, steps=[cached, alone]).peak == 10 * GIB


def test_what_does_not_fit_is_said_with_advice():
    check_fits(plan(int(0.95 * CHIPS["v5e"].memory)), "advice")
    too_much = plan(15 * GIB)
    assert "DOES NOT FIT" in too_much.text()
    with pytest.raises(
        UserError, match=r"15.00 GiB a device do not fit v5e:1, which has 15.75 and keeps 5% free; take"
    ):
        check_fits(too_much, "take fewer rows")


@pytest.mark.parametrize("grain", [1, 8])
@pytest.mark.parametrize(("fixed", "each", "bend"), [(5, 3, 0), (90, 3, 0), (5, 3, 0.02), (5, 50, 0), (5, 96, 0)])
def test_the_largest_batch_is_confirmed_by_a_compilation(grain, fixed, each, bend):
    asked = []

    def total(rows):
        asked.append(rows)
        return int(fixed + each * rows + bend * rows**2)

    found = largest_batch(total, grain, grain, 100)
    fits = [rows for rows in range(grain, 100, grain) if total(rows) <= 95]
    assert found <= max(fits, default=0)
    if bend == 0:
        assert found == max(fits, default=0)
    elif fits:
        assert found >= 0.8 * max(fits) - grain
    assert not found or found in asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4:1", "'v4' is not one of v5e, v5p, v6e, h100; give one, and how many: v5e:1"),
        ("v5e:3", "there is no v5e slice of 3 chips; give one of 1, 4, 8, 16"),
        ("h100:12", "12 GPUs are no whole boxes of 8; give a multiple of it"),
        ("v5p:0", "'0' is no number of devices"),
        ("v5p:4x", "'4x' is no number of devices"),
    ],
)
def test_a_machine_that_is_not_is_named(name, message):
    with pytest.raises(UserError, match=message):
        Machine.of(name)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="`device`: its compiler is not installed; pip install libtpu"):
        Machine.of("v5e:256")
