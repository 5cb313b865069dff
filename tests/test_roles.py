from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring import NETS, analysed, build, eager_loss, labelled, score, subject_of
from torch import Tensor, nn

import slimc
from slimc.analysis import Analysis
from slimc.gradients import gate_gradients
from slimc.roles import Site, gated, joint, readers, writers


def places(sites: tuple[Site, ...]) -> list[tuple[str, str | None]]:
    return [(site.node.name, site.operand.name if site.operand else None) for site in sites]


def joint_gates(analysis: Analysis, sites: tuple[Site, ...], *, per_sample: bool = False) -> Tensor:
    """[batches or samples, variables]."""
    subject = subject_of(analysis, labelled())
    found = gate_gradients(subject, sites, per_sample=per_sample)
    return torch.cat([joint(analysis.types, sites, each.values) for each in found])


def test_gates_sit_after_batch_norms_even_behind_a_concatenation() -> None:
    assert places(writers(analysed("resnet").types)) == [(f"batch_norm{n}", None) for n in ("", "_1", "_2")]
    dense = writers(analysed("densenet").types)
    assert places(dense) == [(f"batch_norm{n}", None) for n in ("", "_1", "_2")]
    assert [int((site.factors >= 0).sum()) for site in dense] == [4, 7, 12]


def test_without_norms_gates_sit_on_the_layers() -> None:
    found = writers(analysed("resnet").types, after_norms=False)
    assert places(found) == [(f"conv2d{n}", None) for n in ("", "_1", "_2")]


def test_a_transformers_stream_is_written_by_parameters_too() -> None:
    found = places(writers(analysed("vit").types))
    assert ("cat", "expand") in found  # the class token
    assert ("add", "position") in found
    assert len(found) == 7  # and patches, qkv, projection, both layers of the MLP


def test_every_channel_has_a_writer_and_a_reader() -> None:
    for name in NETS:
        analysis = analysed(name)
        for sites in (writers(analysis.types), readers(analysis.types)):
            known = gated(analysis.types, sites)
            assert all(known[group.variables].all() for group in analysis.groups), name


def test_a_value_that_goes_elsewhere_too_is_gated_before_the_norm() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.a(torch.relu(self.norm(x)))
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    found = places(writers(slimc.inspect(PreActivation(), torch.randn(2, 3, 4, 4)).types))
    assert found == [("conv2d", None), ("conv2d_1", None)]


# -- identities of gates ------------------------------------------------------------------------------


def test_a_gate_after_a_batch_norm_is_gamma_and_beta_times_their_gradients() -> None:
    model, (x, y) = build("resnet"), labelled(1)[0]
    eager_loss(model, x, y).backward()  # type: ignore[no-untyped-call]
    norms = [model.get_submodule(name) for name in ("bn0", "bn1", "bn2")]
    wanted = [(n.weight * n.weight.grad + n.bias * n.bias.grad).detach() for n in norms]  # type: ignore[operator]
    analysis = slimc.inspect(model, x)
    (found,) = gate_gradients(subject_of(analysis, [(x, y)]), writers(analysis.types))
    for own, each in zip(found.values, wanted, strict=True):
        torch.testing.assert_close(own[0], each)


def test_a_gate_is_a_finite_difference_of_the_loss() -> None:
    model, (x, y) = build("resnet"), labelled(1)[0]
    analysis = slimc.inspect(model, x)
    (found,) = gate_gradients(subject_of(analysis, [(x, y)]), writers(analysis.types))
    bn1 = model.get_submodule("bn1")

    def closed(channel: int, gate: float) -> float:
        def scale(_module: nn.Module, _inputs: object, value: Tensor) -> Tensor:
            factor = torch.ones(4, dtype=torch.float64)
            factor[channel] = gate
            return value * factor[:, None, None]

        handle = bn1.register_forward_hook(scale)
        with torch.no_grad():
            value = float(eager_loss(model, x, y))
        handle.remove()
        return value

    step = 1e-6
    for channel in range(4):
        slope = (closed(channel, 1 + step) - closed(channel, 1 - step)) / (2 * step)
        assert found.values[1][0, channel] == pytest.approx(slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("per_sample", [False, True])
def test_writers_and_readers_of_a_stream_agree_with_signs_and_not_without(per_sample: bool) -> None:
    analysis = analysed("resnet")
    write, read = (joint_gates(analysis, sites(analysis.types), per_sample=per_sample) for sites in (writers, readers))
    torch.testing.assert_close(write, read)
    assert write.abs().max() > 1e-3
    subject = subject_of(analysis, labelled(1))
    stream = analysis.groups[0].variables
    sums = []
    for sites in (writers(analysis.types), readers(analysis.types)):
        (found,) = gate_gradients(subject, sites)
        sums.append(sum(own.abs()[0].sum() for own, site in zip(found.values, sites, strict=True) if
                        np.isin(site.factors, stream).any()))  # fmt: skip
    assert not torch.isclose(torch.as_tensor(sums[0]), torch.as_tensor(sums[1]), rtol=1e-3)


def test_before_or_after_a_relu_makes_no_difference_and_the_consumer_agrees() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(torch.relu(self.a(x))).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, (x, y) = Plain().double().eval(), labelled(1)[0]
    analysis = slimc.inspect(model, x)
    subject = subject_of(analysis, [(x, y)])
    (write,), (read,) = (list(gate_gradients(subject, s(analysis.types))) for s in (writers, readers))
    torch.testing.assert_close(write.values[0], read.values[0])  # right before the ReLU, right after it
    eager_loss(model, x, y).backward()  # type: ignore[no-untyped-call]
    weight = model.b.weight
    assert weight.grad is not None
    torch.testing.assert_close(read.values[0][0], (weight * weight.grad).sum((0, 2, 3)).detach())


def test_per_sample_gates_are_those_of_each_sample_alone() -> None:
    for name in NETS:
        analysis = analysed(name)
        for sites in (writers(analysis.types), readers(analysis.types)):
            together = joint_gates(analysis, sites, per_sample=True)
            alone: list[Tensor] = []
            for x, y in labelled():
                for row in range(len(x)):
                    subject = subject_of(analysis, [(x[row : row + 1], y[row : row + 1])])
                    alone.extend(joint(analysis.types, sites, f.values) for f in gate_gradients(subject, sites))
            torch.testing.assert_close(together, torch.cat(alone))
            assert together.abs().max() > 1e-4


def test_samples_folded_into_windows_are_still_told_apart() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.fc = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            y = x.reshape(n * 3, 2, 4)
            return self.fc(self.down(torch.relu(self.up(y))).reshape(n, 6, 4).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Windows().double()
    x, y = torch.randn(4, 6, 4).double(), torch.tensor([0, 1, 2, 3])
    together = score("fisher", model, [(x, y)])
    alone = [score("fisher", model, [(x[i : i + 1].repeat(2, 1, 1), y[i : i + 1].repeat(2))]) for i in range(4)]
    for name, own in together.items():
        np.testing.assert_allclose(own, np.mean([each[name] for each in alone], 0), rtol=1e-9)
        assert own.max() > 0
