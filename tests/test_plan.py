from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.errors import PlanError
from slimc.plan import Plan, weights_sha256


class Residual(nn.Module):
    """A stem and a block whose two convolutions and shortcut are coupled."""

    def __init__(self, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def residual(seed: int = 0, **sizes: int) -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Residual(**sizes).eval()
        nn.init.uniform_(model.get_buffer("bn1.running_mean"))
        nn.init.uniform_(model.get_buffer("bn1.running_var"), 0.5, 2)
    return model


INPUT = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def slim() -> slimc.Compressed:
    return slimc.compress(residual(), INPUT, flops=0.3, round_to=1, recover="none")


def edited(plan: Plan, **changes: dict[int, list[int]] | None) -> Plan:
    """The plan with other kept indices; `conv1__weight` stands for conv1.weight."""
    kept = copy.deepcopy(plan.kept)
    for name, axes in changes.items():
        if axes is None:
            del kept[name.replace("__", ".")]
        else:
            kept[name.replace("__", ".")] = axes
    return replace(plan, kept=kept)


def refusal(plan: Plan, model: nn.Module | None = None) -> str:
    with pytest.raises(PlanError) as refused:
        slimc.apply(model or residual(), plan, INPUT)
    return str(refused.value)


# -- as a file ----------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file_as_it_was(slim: slimc.Compressed, tmp_path: Path) -> None:
    slim.plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == json.loads(json.dumps(slim.plan.to_dict()))
    assert loaded.kept == slim.plan.kept
    assert loaded.groups == slim.plan.groups
    assert loaded.source_sha256 == weights_sha256(residual())
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_the_file_says_what_the_interface_promises(slim: slimc.Compressed, tmp_path: Path) -> None:
    slim.plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["kept"]["conv1.weight"].keys() == {"0", "1"}
    assert {"kept", "groups", "targets", "method", "versions", "source_sha256"} <= data.keys()
    for group in data["groups"]:
        assert {"name", "width", "kept", "exact", "members"} <= group.keys()
        found = data["scores"][group["name"]]
        assert len(found) == group["width"]
        variables = {tuple(data["kept"][t][str(a)]) for t, a in group["members"][:1] if t in data["kept"]}
        for indices in variables if group["exact"] else ():
            assert min(found[i] for i in indices) >= max(v for i, v in enumerate(found) if i not in indices)
        for tensor, axis in group["members"]:
            assert residual().state_dict()[tensor].shape[axis] == group["width"]
            assert len(data["kept"].get(tensor, {}).get(str(axis), range(group["width"]))) == group["kept"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[]", 'it needs "kept"'),
        ('{"keep": {}}', 'it needs "kept"'),
        ('{"kept": []}', 'it needs "kept"'),
        ('{"kept": {}, "format": 99}', "format 99"),
        ('{"kept": {"a": [0]}}', '"kept" of a must be a table'),
        ('{"kept": {"a": {"x": [0]}}}', "axis 'x'"),
        ('{"kept": {"a": {"-1": [0]}}}', "axis '-1'"),
        ('{"kept": {"a": {"²": [0]}}}', "axis '²'"),
        ('{"kept": {"a": {"0": [0], "00": [1]}}}', "axis '00'"),
        ('{"kept": {"a": {"' + "1" * 5000 + '": [0]}}}', "wanted an axis number"),
        ("[" * 200_000, "is no JSON"),
        ('{"kept": {"a": {"0": 3}}}', "a list of whole numbers"),
        ('{"kept": {"a": {"0": [1.5]}}}', "a list of whole numbers"),
        ('{"kept": {"a": {"0": [true]}}}', "a list of whole numbers"),
        ('{"kept": {"a": {"0": ["1"]}}}', "a list of whole numbers"),
        ('{"kept": {}, "shapes": [1]}', '"shapes"'),
        ('{"kept": {}, "shapes": {"a": 3}}', '"shapes"'),
        ('{"kept": {}, "groups": [{"name": "g"}]}', '"groups"'),
        ('{"kept": {}, "groups": 3}', '"groups"'),
        ('{"kept": {}, "targets": 3}', '"targets"'),
        ('{"kept": {}, "method": "l1"}', '"method"'),
        ('{"kept": {}, "scores": 3}', '"scores"'),
        ('{"kept": {}, "scores": {"g": [true]}}', '"scores"'),
        ('{"kept": {}, "scores": {"g": 3}}', '"scores"'),
        ('{"kept": {}, "attributes": {"conv": 3}}', '"attributes"'),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_the_place(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as refused:
        Plan.load(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x80\x02\xff\x00")
    with pytest.raises(PlanError, match="is no JSON"):
        Plan.load(tmp_path / "binary")


# -- as a cut -----------------------------------------------------------------------------------------


def test_applied_to_a_state_dictionary_a_plan_gives_the_slim_weights(slim: slimc.Compressed) -> None:
    state, wanted = slim.plan.apply(residual().state_dict()), slim.module.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert sum(t.numel() for t in state.values()) < sum(t.numel() for t in residual().state_dict().values())


def test_kept_alone_rebuilds_the_cut_by_hand_with_torch_only(slim: slimc.Compressed, tmp_path: Path) -> None:
    slim.plan.save(tmp_path / "plan.json")
    kept = json.loads((tmp_path / "plan.json").read_text())["kept"]
    state = residual().state_dict()
    for name, axes in kept.items():
        for axis, indices in axes.items():
            state[name] = state[name].index_select(int(axis), torch.tensor(indices))
    width, inner = state["stem.weight"].shape[0], state["conv1.weight"].shape[0]
    assert (width, inner) != (8, 6)
    by_hand = Residual(width, inner).eval()
    by_hand.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(by_hand(INPUT), slim.module(INPUT))


def test_a_valid_edit_is_accepted_and_proven(slim: slimc.Compressed) -> None:
    survivors = slim.plan.kept["conv1.weight"][0]
    fewer = survivors[1:]
    plan = edited(
        slim.plan,
        conv1__weight={**slim.plan.kept["conv1.weight"], 0: fewer},
        conv2__weight={**slim.plan.kept["conv2.weight"], 1: fewer},
        **{f"bn1__{name}": {0: fewer} for name in ("weight", "bias", "running_mean", "running_var")},
    )
    smaller = slimc.apply(residual(), plan, INPUT)
    assert smaller.plan.kept == plan.kept
    assert smaller.module.get_submodule("bn1").weight.shape == (len(fewer),)
    assert smaller.report.verification is not None
    assert smaller.report.verification.passed
    assert smaller.report.macs.after < slim.report.macs.after
    by_group = {group.name: group.kept for group in smaller.plan.groups}
    assert by_group["conv1.weight"] == len(fewer)
    assert smaller.plan.targets == slim.plan.targets
    assert smaller.plan.scores == slim.plan.scores


def test_a_target_that_an_edited_plan_does_not_meet_is_none_of_its(slim: slimc.Compressed) -> None:
    width = residual().get_parameter("conv1.weight").shape[0]
    plan = slim.plan
    plan = plan.edit(slim.analysis, {group.name: range(group.width) for group in plan.groups})
    whole = slimc.apply(residual(), plan, INPUT)
    assert whole.module.get_parameter("conv1.weight").shape[0] == width
    assert whole.plan.targets == {}


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.weight", "bn1.running_var", "conv2.weight"])
def test_an_edit_of_one_member_is_refused_with_a_coupled_partner(slim: slimc.Compressed, name: str) -> None:
    axis = 1 if name == "conv2.weight" else 0
    group = {("conv1.weight", 0), ("conv2.weight", 1)} | {
        (f"bn1.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")
    }
    broken = {**slim.plan.kept[name], axis: slim.plan.kept[name][axis][1:]}
    said = refusal(edited(slim.plan, **{name.replace(".", "__"): broken}))
    assert said.startswith(f"{name}, axis {axis}: index {slim.plan.kept[name][axis][0]} is removed")
    assert any(f"{partner}, axis {place} keeps" in said for partner, place in group - {(name, axis)})


def test_a_member_left_out_of_an_edit_keeps_everything_and_is_named(slim: slimc.Compressed) -> None:
    assert "axis 0: index" in (said := refusal(edited(slim.plan, bn1__bias=None)))
    assert "bn1.bias, axis 0 keeps" in said


def test_a_group_is_edited_with_all_that_goes_with_it(slim: slimc.Compressed) -> None:
    analysis = slimc.inspect(residual(), INPUT)
    stream = next(g for g in analysis.groups if any(m.tensor == "stem.weight" for m in g.members))
    edited = slim.plan.edit(analysis, {stream.name: [7, 1, 2]})
    for name, axis in (("stem.weight", 0), ("conv1.weight", 1), ("conv2.weight", 0), ("head.weight", 1)):
        assert edited.kept[name][axis] == [1, 2, 7]
    assert edited.kept["bn1.weight"] == slim.plan.kept["bn1.weight"]
    assert (edited.scores, edited.source_sha256) == (slim.plan.scores, slim.plan.source_sha256)
    assert edited.attributes is None
    own = slimc.apply(residual(), edited, INPUT)
    assert own.report.verification is not None
    assert own.report.verification.passed
    assert isinstance(own.module, Residual)
    assert own.module.stem.out_channels == 3
    whole = edited.edit(analysis, {g.name: range(g.width) for g in analysis.groups})
    assert whole.kept == {}


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([], "keep none of its 8"), ([0, 8], "from 0 to 7"), ([-1], "from 0"), ([1, 1], "each once"),
        ([1.9], "whole numbers"), ([True], "whole numbers"), (["a"], "whole numbers"), (3, "whole numbers"),
    ],
)  # fmt: skip
def test_channels_that_a_group_does_not_have_are_refused(slim: slimc.Compressed, channels: Any, said: str) -> None:
    analysis = slimc.inspect(residual(), INPUT)
    name = next(g.name for g in analysis.groups if g.width == 8)
    with pytest.raises(PlanError, match=said):
        slim.plan.edit(analysis, {name: channels})


def test_a_group_that_is_not_there_is_asked_about(slim: slimc.Compressed) -> None:
    analysis = slimc.inspect(residual(), INPUT)
    name = analysis.groups[0].name
    with pytest.raises(PlanError, match=f"did you mean {name}"):
        slim.plan.edit(analysis, {name[:-1]: [0]})


def test_an_edit_that_cuts_the_models_output_is_refused(slim: slimc.Compressed) -> None:
    said = refusal(edited(slim.plan, head__bias={0: [0, 1, 2, 3]}))
    assert "head.bias, axis 0: index 4" in said


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([], "keeps 0 of 6"),
        ([2, 1], "ascending"),
        ([1, 1], "ascending"),
        ([0, 6], "index 6 is outside 0..5"),
        ([-1, 2], "index -1 is outside 0..5"),
    ],
)
def test_indices_that_no_tensor_has_are_refused(slim: slimc.Compressed, indices: list[int], said: str) -> None:
    plan = edited(slim.plan, bn1__bias={0: indices})
    message = refusal(plan)
    assert message.startswith("bn1.bias, axis 0")
    assert said in message
    with pytest.raises(PlanError, match=r"bn1\.bias, axis 0"):
        plan.apply(residual().state_dict())


def test_an_axis_that_the_tensor_does_not_have_is_refused(slim: slimc.Compressed) -> None:
    assert "the tensor has only 1 axes" in refusal(edited(slim.plan, bn1__bias={1: [0]}))


def test_an_unknown_tensor_is_refused_by_name(slim: slimc.Compressed) -> None:
    assert "the plan cuts other.weight" in refusal(edited(slim.plan, other__weight={0: [0]}))


def test_another_architecture_is_refused_at_its_first_mismatch(slim: slimc.Compressed) -> None:
    said = refusal(slim.plan, residual(width=10))
    first = next(name for name in slim.plan.kept if slim.plan.shapes[name] != _shape(residual(width=10), name))
    assert said.startswith(f"{first} has shape {_shape(residual(width=10), first)}")
    assert str(_shape(residual(), first)) in said


def _shape(model: nn.Module, name: str) -> list[int]:
    return list(model.state_dict()[name].shape)


class Tied(nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.decode(torch.relu(self.mix(self.embed(ids))))
        return out


def test_both_names_of_a_tied_weight_are_in_the_plan_and_may_not_disagree() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    slim = slimc.compress(Tied(), ids, params=0.6, round_to=1, recover="none")
    kept = slim.plan.kept
    assert kept["embed.weight"] == kept["decode.weight"]
    for name in ("embed.weight", "decode.weight"):
        one_only = replace(slim.plan, kept={**kept, name: {1: kept[name][1][:-1]}})
        with pytest.raises(PlanError, match=r"embed\.weight|decode\.weight"):
            slimc.apply(Tied(), one_only, ids)
    without_one = replace(slim.plan, kept={n: a for n, a in kept.items() if n != "decode.weight"})
    with pytest.raises(PlanError, match=r"embed\.weight|decode\.weight"):
        slimc.apply(Tied(), without_one, ids)


# -- the hash of the weights --------------------------------------------------------------------------


def test_the_hash_tells_weights_shapes_types_and_names_apart() -> None:
    def holding(**tensors: Tensor) -> nn.Module:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    ones: list[Any] = [
        holding(a=torch.ones(4)), holding(b=torch.ones(4)), holding(a=torch.ones(2, 2)), holding(a=torch.zeros(4)),
        holding(a=torch.ones(4).double()), holding(a=torch.ones(4).bfloat16()), holding(a=torch.ones(4) > 0),
        holding(a=torch.ones(())), holding(a=torch.ones(0)), nn.Module(),
    ]  # fmt: skip
    hashes = [weights_sha256(module) for module in ones]
    assert len(set(hashes)) == len(hashes)
    assert weights_sha256(holding(a=torch.ones(8)[::2])) == hashes[0]
