"""Joint Search-and-Training: weights and a parameter for each channel are trained together, in sampled sub-networks.

Source: Lu et al., "Beyond Network Pruning: a Joint Search-and-Training Approach" (IJCAI 2020), equations 1 to 9 and
algorithms 1 and 2. A channel's gate is its share of a softmax over its group, times the number of channels (so that
all gates start as 1), behind the norm, where a scale is felt; after sampling, over the kept channels. A small network
(ThresNet) gives each group a distribution over thresholds, and learns by REINFORCE from what sub-networks came to.
Ours: sub-networks are scaled to the budget, so that the reward is the loss alone; noise is in units of the parameters'
own spread, since they start alike and train for few epochs; weights and parameters see the same data in turn, for a
loader cannot be parted; rewards have a running mean taken off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimc.scores import Scores
from slimc.training import lifts, widths
from slimc.training.gates import Place, gates_of, plain_name
from slimc.training.judge import Judge
from slimc.training.loop import Hooks
from slimc.training.network import Alive
from slimc.training.phase import Phase
from slimc.training.run import Run
from slimc.training.schedule import demand, schedule

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_MOMENTUM = 0.9
_SEARCH = 1_000_037
_STEM, _INNER = 128, (64, 16)
_POLICY_RATE = 1e-3
_FORGETS = 0.5
"""The weight of the last reward in the running mean."""


@schedule(
    "joint-search",
    "a parameter for each channel is trained with the weights, in sub-networks that are sampled by it",
    "Lu et al., Joint Search-and-Training, IJCAI 2020",
    mends=False,
)
def joint_search(
    run: Run,
    *,
    networks: int = 6,
    coarse: float = 0.2,
    architecture: float = 0.2,
    penalty: float = 1e-3,
    rate: float = 0.05,
    noise: float = 0.5,
    finetune: float = 0.4,
) -> Iterator[Phase]:
    """Train all together, then `networks` sub-networks in turn, cut to the best one, and fine-tune.

    coarse, finetune: shares of the epochs; sub-networks have the others, and their channels' parameters `architecture`
    of each. penalty: of the norm of the parameters in coarse training (lambda). rate: of the parameters. noise: on
    them when sampling, in their standard deviations.
    """
    demand(1, networks=networks)
    demand(0, 1, finetune=finetune, architecture=architecture)
    demand(0, round(1 - finetune, 9), coarse=coarse)
    demand(0, penalty=penalty, noise=noise, rate=rate)
    lifts.check_reachable(run.network, run.network.places, run.selection)
    search = _Search(run, rate)
    run.gate(identity=True)
    epochs = run.options.epochs
    yield search.phase("coarse", coarse * epochs, lambda name: True, penalty)
    each = (1 - coarse - finetune) * epochs / networks
    rewards, shares = [], []
    for number in range(networks):
        sample = run.event("sample", partial(search.sample, number, noise))
        search.take(sample["alive"])
        yield run.phase("weights", (1 - architecture) * each, trains=lambda name: not plain_name(name)[1])
        yield search.phase("architecture", architecture * each, lambda name: plain_name(name)[1])
        learned = run.event("learn", partial(search.learn, sample["actions"]))
        search.recall(learned)
        rewards.append(learned["reward"])
        shares.append(sample["shares"].numpy())
    chosen = run.event("best", partial(search.best, shares[int(np.argmax(rewards))])).numpy()
    run.cut(lambda: chosen)
    run.merge()
    yield run.phase("finetune", run.left)


class ThresNet(nn.Module):
    """From the parameters of a group's channels to scores of `THRESHOLDS`; widths have stems of their own."""

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({str(size): nn.Linear(size, _STEM) for size in sorted(set(sizes))})
        layers: list[nn.Module] = [nn.ReLU()]
        for before, after in pairwise((_STEM, *_INNER)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(_INNER[-1], len(THRESHOLDS)))

    def forward(self, groups: Sequence[Tensor]) -> Tensor:
        """[groups, thresholds] logarithms of probabilities."""
        found: Tensor = self.head(torch.stack([self.stems[str(len(own))](own.float()) for own in groups]))
        return found.log_softmax(1)


def kept(shares: Tensor, threshold: float) -> int:
    """How many of the largest shares reach a threshold together; at least one (algorithm 1, line 5)."""
    reached = shares.sort(descending=True).values.cumsum(0) >= threshold
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(shares)


class _Search:
    """alpha: [variables] the channels' parameters. alive: the channels of the present sub-network."""

    def __init__(self, run: Run, rate: float) -> None:
        self._run, self._rate, self._loss = run, rate, Judge(run)
        network = run.network
        known = ~np.isnan(lifts.members_of_channels(network, network.places))
        self._groups = [group for group in network.analysis.groups if group.width and known[group.variables].all()]
        self.alpha = torch.zeros(len(network.alive), dtype=torch.float64)
        self._velocity = torch.zeros_like(self.alpha)
        self.alive: Alive = network.alive.copy()
        with torch.random.fork_rng():
            torch.manual_seed(run.options.seed)
            self._policy = ThresNet(group.width for group in self._groups)
        self._adam = torch.optim.Adam(self._policy.parameters(), lr=_POLICY_RATE)
        self._mean: float | None = None

    def phase(self, name: str, epochs: float, trains: Callable[[str], bool], penalty: float = 0.0) -> Phase:
        """A phase in which the parameters move."""
        tally = {"alpha": self.alpha, "velocity": self._velocity}
        return self._run.phase(
            name, epochs, trains=trains, hooks=Hooks(before_step=partial(self._move, penalty)), tally=tally
        )

    def take(self, alive: Tensor) -> None:
        """Go on with a sub-network."""
        self.alive = alive.numpy()
        self._velocity.zero_()

    def sample(self, number: int, noise: float) -> dict[str, Tensor]:
        """A sub-network at the budget: its channels, each group's share before scaling, and the thresholds taken."""
        rng = np.random.default_rng([self._run.options.seed, _SEARCH, number])
        with torch.no_grad():
            chances = self._policy(self._parameters()).exp().double().numpy()
        actions = [int(rng.choice(len(THRESHOLDS), p=own / own.sum())) for own in chances]
        noisy, shares = self.alpha.clone(), np.ones(len(self._run.analysis.groups))
        for group, action, own in zip(self._groups, actions, self._parameters(), strict=True):
            spread = float(own.std(correction=0)) or 1.0
            drawn = own + noise * spread * torch.from_numpy(rng.gumbel(size=len(own)))
            noisy[torch.from_numpy(group.variables)] = drawn
            shares[group.number] = kept(drawn.softmax(0), THRESHOLDS[action]) / len(own)
        self.alive = self._chosen(noisy, shares)
        self._put()
        return {
            "alive": torch.from_numpy(self.alive), "shares": torch.from_numpy(shares), "actions": torch.tensor(actions),
        }  # fmt: skip

    def learn(self, actions: Tensor) -> dict[str, Any]:
        """The reward of the sub-network, and the policy after it (equation 4)."""
        reward = -self._loss()
        mean = reward if self._mean is None else self._mean
        chances = self._policy(self._parameters()).gather(1, actions[:, None])
        self._adam.zero_grad()
        (-(reward - mean) * chances.sum()).backward()
        self._adam.step()
        mean += _FORGETS * (reward - mean)
        policy, adam = copy.deepcopy((self._policy.state_dict(), self._adam.state_dict()))
        return {"reward": reward, "mean": mean, "policy": policy, "adam": adam}

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Be as after `learn`."""
        self._mean = learned["mean"]
        self._policy.load_state_dict(learned["policy"])
        self._adam.load_state_dict(learned["adam"])

    def best(self, shares: Scores) -> Tensor:
        """The channels of these shares with the largest parameters, which are opened."""
        self.alive = self._chosen(self.alpha, shares)
        self._put()
        return torch.from_numpy(self.alive)

    def _parameters(self) -> list[Tensor]:
        return [self.alpha[torch.from_numpy(group.variables)] for group in self._groups]

    def _chosen(self, values: Tensor, shares: Scores) -> Alive:
        network, scores = self._run.network, np.full(len(self.alpha), np.nan)
        for group in self._groups:
            scores[group.variables] = values[torch.from_numpy(group.variables)].numpy()
        return self._run.selection.choose(widths.preference(network, widths.order(network, scores), shares))

    def _move(self, penalty: float) -> None:
        """A step of the parameters along the gradients of their gates; the gates follow."""
        alpha = self.alpha.clone().requires_grad_()
        gates = self._gates(alpha)
        total = penalty * torch.stack([alpha[torch.from_numpy(g.variables)].norm() for g in self._groups]).sum()
        for place, phi in gates_of(self._run.network.module, self._run.network.places):
            if phi.grad is not None:
                total = total + (self._rows(place, gates) * phi.grad.cpu().double()).sum()
                phi.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        assert alpha.grad is not None
        self._velocity.mul_(_MOMENTUM).add_(alpha.grad)
        self.alpha.sub_(self._rate * self._velocity)
        self._put()

    @torch.no_grad()
    def _put(self) -> None:
        gates = self._gates(self.alpha)
        for place, phi in gates_of(self._run.network.module, self._run.network.places):
            phi.copy_(self._rows(place, gates))

    def _gates(self, alpha: Tensor) -> Tensor:
        """[variables + 1] softmax over the open channels of each group times their number; the last is no channel."""
        gates = torch.cat([torch.from_numpy(self.alive).to(alpha), alpha.new_ones(1)])
        for group in self._groups:
            open_ = torch.from_numpy(group.variables[self.alive[group.variables]])
            gates = gates.index_put((open_,), len(open_) * alpha[open_].softmax(0))
        return gates

    def _rows(self, place: Place, gates: Tensor) -> Tensor:
        return gates[torch.from_numpy(lifts.factors(self._run.network, place))].prod(1)
