"""The dump is small enough to be reviewed by eye, and is compared with goldens that were."""

from __future__ import annotations

from pathlib import Path

import pytest
from zoo import CASES

from slimc.analysis import analyse

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["Residual", "Grouped", "FusedAttention", "UnknownOperator"])
def test_the_dump_is_the_one_reviewed_by_eye(name: str, regenerate: bool) -> None:
    text = analyse(*CASES[name].build()).dump()
    path = GOLDEN / f"{name}.txt"
    if regenerate:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "run pytest --regenerate and review the difference"


def test_sizes_in_the_dump_add_up_to_the_shapes_of_the_tensors() -> None:
    analysis = analyse(*CASES["DenseConcat"].build())
    widths = {f"g{g.number}": g.width for g in analysis.groups}
    tensors = analysis.dump().split("\n\n")[1].splitlines()
    assert len(tensors) == len(analysis.types.tensors)
    for line in tensors:
        name, sizes = line.split(" ", 1)
        found = [eval(size, {}, dict(widths)) for size in sizes.strip("[]").split(",") if size]
        assert found == [len(axis) for axis in analysis.types.tensors[name]], line


def test_an_operator_without_a_rule_is_in_the_dump() -> None:
    assert "frozen by slimc_zoo.mystery.default at mystery" in analyse(*CASES["UnknownOperator"].build()).dump()
