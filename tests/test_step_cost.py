"""What a decode step costs where rows were evicted, counted: no machine changes the numbers."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from step_cost import batches, measure

pytestmark = pytest.mark.engine

SHORT, LONG, ROWS, BUDGET, STEPS = 322, 642, 4, 128, 4


@pytest.fixture(scope="module")
def figures(is_v2, no_engine) -> dict[int, dict]:
    if is_v2:
        pytest.skip("the same on both runners: run on v1")
    no_engine()
    return {layers: measure(layers, ROWS, [SHORT, LONG], BUDGET, STEPS) for layers in (4, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [4, 16])
def test_a_step_costs_few_launches_and_what_is_kept(figures, num_layers):
    runs = figures[num_layers]
    for context in (SHORT, LONG):
        # Stock vLLM: the kernel.
        assert set(runs[f"stock, none, {context}"]["layers"]["launches"]) == {num_layers}
    for owners, rows in batches(ROWS):
        short, long = (runs[f"{owners}, {rows}, {context}"] for context in (SHORT, LONG))
        for run in (short, long):
            # A kernel for each kind of owners, a gather and a scatter.
            beyond = {launches / num_layers - 1 for launches in run["layers"]["launches"]}
            expected = {"none": 0, "half": 3 + (owners == "both"), "all": {"layer": 0, "head": 1}.get(owners, 3)}
            assert beyond == {expected[rows]}, (owners, rows)
            assert not any(run["layers"]["waits"] + run["step"]["waits"])
            assert len(run["step"]["launches"]) == STEPS // 2
        for part in ("layers", "step"):
            assert short[part]["bytes"] == long[part]["bytes"], (owners, rows, part)
            assert short[part]["launches"] == long[part]["launches"]
            assert any(short[part]["bytes"]) == (rows != "none" and (part, owners, rows) != ("layers", "layer", "all"))


def test_the_part_beside_the_layers_does_not_grow_with_them(figures):
    for name, run in figures[16].items():
        assert run["step"]["launches"] == figures[4][name]["step"]["launches"]
