"""In what order recovery steps are run, and which are kept: steps and a judge of one number stand for the real ones."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slimc import recover


class Task(SimpleNamespace):
    """A slim graph of one number."""

    @property
    def number(self) -> float:
        return float(self.slim.weight.detach())


class Judge:
    """The number itself is the distance."""

    def verdict(self, slim: nn.Module) -> recover.Verdict:
        return recover.Verdict(float(slim.get_parameter("weight").detach()), None, None)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Task, list[tuple[str, float, float, bool]]]]:
    """Run steps, each of which changes the number, from 8 on; gives the task and what was told of each step."""

    def run(
        steps: dict[str, Callable[[float], float]], in_order: bool = False
    ) -> tuple[Task, list[tuple[str, float, float, bool]]]:
        def find(name: str) -> recover.Step:
            def change(task: Any) -> str:
                with torch.no_grad():
                    task.slim.weight.fill_(steps[name](task.number))
                return f"did {name}"

            return recover.Step(name, "", "", change)

        monkeypatch.setattr(recover, "find", find)
        task = Task(slim=nn.Linear(1, 1, bias=False))
        nn.init.constant_(task.slim.weight, 8.0)
        told: list[str] = []
        found = recover.run(task, tuple(steps), Judge(), told.append, in_order)  # type: ignore[arg-type]
        said = [(name, outcome.before, outcome.after, outcome.kept) for name, outcome in found]
        assert set(told) == set(steps)
        return task, said

    return run


def test_the_step_that_helps_most_comes_first(outcomes: Callable[..., Any]) -> None:
    task, said = outcomes({"a": lambda x: x - 1, "b": lambda x: x / 4})
    assert said == [("b", 8, 2, True), ("a", 2, 1, True)]
    assert task.number == 1


def test_steps_that_are_named_keep_their_order(outcomes: Callable[..., Any]) -> None:
    task, said = outcomes({"a": lambda x: x - 1, "b": lambda x: x / 4}, in_order=True)
    assert said == [("a", 8, 7, True), ("b", 7, 1.75, True)]
    assert task.number == 1.75


def test_what_does_not_help_at_first_is_tried_again_after_what_does(outcomes: Callable[..., Any]) -> None:
    task, said = outcomes({"a": lambda x: 0.5 if x < 7 else 20.0, "b": lambda x: x - 2})
    assert said == [("b", 8, 6, True), ("a", 6, 0.5, True)]
    assert task.number == 0.5


def test_what_helps_nowhere_is_undone_and_told(outcomes: Callable[..., Any]) -> None:
    task, said = outcomes({"a": lambda x: x + 1, "b": lambda x: x / 2})
    assert said == [("b", 8, 4, True), ("a", 4, 5, False)]
    assert task.number == 4
    task, said = outcomes({"a": lambda x: x + 1, "b": lambda x: x})
    assert said == [("a", 8, 9, False), ("b", 8, 8, True)]
    assert task.number == 8


def test_distillation_comes_last_even_where_it_helps_most(outcomes: Callable[..., Any]) -> None:
    task, said = outcomes({"distill": lambda x: x / 8, "a": lambda x: x - 1})
    assert said == [("a", 8, 7, True), ("distill", 7, 0.875, True)]
    assert task.number == 0.875


def test_an_interrupt_leaves_what_was_kept_before(
    outcomes: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> float:
        raise KeyboardInterrupt

    kept: list[float] = []
    judge = recover.restored_on_error

    def watched(module: Any) -> Any:
        kept.append(float(module.weight.detach()))
        return judge(module)

    monkeypatch.setattr(recover, "restored_on_error", watched)
    with pytest.raises(KeyboardInterrupt):
        outcomes({"a": lambda x: x - 1, "distill": interrupted})
    assert kept == [8, 7]
