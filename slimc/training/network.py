"""The network of a run: trained and cut in turn, always dense.

Every cut is made in the whole graph that was captured, with the weights that the smaller network has by then; so
nothing is captured twice, and groups, names and costs stay the same from the first phase to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slimc import eager
from slimc.analysis import Analysis
from slimc.graph.cost import Costs
from slimc.graph.groups import Grouping
from slimc.graph.infer import Types, attribute
from slimc.graph.resize import Cut
from slimc.graph.shrink import shrink
from slimc.graph.terms import Terms
from slimc.recover import Task
from slimc.rewrite import Rewritten, rewrite
from slimc.samples import Samples
from slimc.trainable import trainable

from . import gates
from .generator import Generator, affordable, generated
from .heads import Heads

Alive = npt.NDArray[np.bool_]
States = dict[str, dict[str, Tensor]]
"""What an optimiser remembers of each parameter, by the parameter's name."""


class Network:
    """A model that is trained and cut in turn.

    analysis: the model as it was given. alive: [variables] which channels are left. module: the user's class (or the
    graph, where that cannot take the sizes) with those channels, to be trained in place.
    optimiser: what the last phase's optimiser remembered; cut along with the weights. heads: auxiliary ones, on the
    module as it is between two cuts. generator: makes weights for other widths, before anything is cut. as_graph: the
    module is the graph although the class takes the sizes.
    """

    def __init__(self, analysis: Analysis, *, as_graph: bool = False) -> None:
        self.analysis, self._as_graph = analysis, as_graph
        self.alive: Alive = np.ones(analysis.types.solution.variables, np.bool_)
        self.optimiser: States = {}
        self.heads: Heads | None = None
        self._head_places: list[list[Any]] = []
        self._head_classes = 0
        self.generator: Generator | None = None
        self.clipped: dict[str, float] = {}
        self.places = gates.trained(analysis.types, gates.places(analysis.types))
        self.gated = False
        self._module: nn.Module | None = None
        self._rewritten: Rewritten | None = None

    # -- what it is now -------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The network as it is now; built when first asked for."""
        if self._module is None:
            self._build(None)
        assert self._module is not None
        return self._module

    @property
    def rewritten(self) -> Rewritten:
        """The graph of the same network; its tensors are the module's after `synchronise`."""
        _ = self.module
        assert self._rewritten is not None
        return self._rewritten

    @property
    def cut_so_far(self) -> Cut:
        """The removals so far, in the whole network."""
        return Cut(self.analysis.types, self.alive)

    @property
    def widths(self) -> npt.NDArray[np.int64]:
        """How many channels each group has left."""
        return np.array([int(self.alive[g.variables].sum()) for g in self.analysis.groups], np.int64)

    @property
    def costs(self) -> Costs:
        """What the network costs now, per sample."""
        return self.analysis.cost(self.widths)

    def typed(self) -> tuple[Types, Grouping]:
        """Types and groups of the network as it is now, over its graph with its present weights."""
        self.synchronise()
        analysis = self.analysis
        return shrink(analysis.types, analysis.grouping, self.cut_so_far, self.graph, self.rewritten.twins)

    @property
    def graph(self) -> GraphModule:
        """The graph of the same network."""
        return self.rewritten.module

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the graph with its present value, by its first name."""
        module, constants = self.module, self.analysis.types.captured.constants
        names = self.analysis.types.tensors
        return {name: attribute(self.graph if name in constants else module, name) for name in names}

    def synchronise(self) -> None:
        """Bring the graph's tensors up to date with the module's."""
        graph = self.graph
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                own = attribute(graph, name)
                if own is not tensor:
                    own.copy_(tensor)

    def axes(self, name: str) -> tuple[Terms, ...] | None:
        """The whole network's axes of a parameter of `module`, a gate or not; None for what the graph does not use."""
        plain, is_gate = gates.plain_name(name)
        if is_gate:
            return next((place.axis,) for place in self.places if place.name == plain)
        return self.analysis.types.tensors.get(self.analysis.types.first(plain))

    def last_layer(self) -> tuple[str, ...]:
        """The parameters of the layer that comes last."""
        for node in reversed(self.analysis.captured.module.graph.nodes):
            own = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
            if any(name in self.analysis.types.tensors for name in own):
                return tuple(own)
        return ()

    # -- what is done to it ---------------------------------------------------------------------------

    def gate(self, *, identity: bool = False) -> None:
        """Put gates on; identity: these start as 1 behind the norms, from now on."""
        if identity:
            self.places = gates.compactors(self.places)
        if not self.gated:
            self.clipped = gates.attach(self.module, self.places)
        self.gated = True

    def merge(self) -> None:
        """Multiply the gates in and take them off."""
        if self.gated:
            gates.detach(self.module, self.places)
        self.gated = False

    def add_heads(self, places: Sequence[Sequence[Any]], classes: int) -> None:
        """Put auxiliary heads on what modules give, in order of depth: [path, axis of channels, channels] for each."""
        self._head_places, self._head_classes = [list(place) for place in places], classes
        self.heads = Heads(self.module, [(path, axis, width) for path, axis, width in places], classes)

    def drop_heads(self) -> None:
        """Take auxiliary heads off; must be done before the next cut."""
        if self.heads is not None:
            self.heads.close()
        self.heads, self._head_places = None, []

    def generate(self, hidden: int = 0) -> None:
        """Put a generator of weights on, with so many hidden units; 0 for as many as are affordable."""
        types = self.analysis.types
        tensors = generated(types, self.analysis.grouping, self.cut_so_far, self.places)
        self.generator = Generator(self.module, tensors, hidden or affordable(types, tensors))

    def settle(self) -> None:
        """Take the generator off, with the weights that it gives now; must be done before the next cut."""
        if self.generator is not None:
            self.generator.close()
        self.generator, self.optimiser = None, {}

    def cut(self, alive: Alive, mend: Callable[[Task], None] | None = None, samples: Samples | None = None) -> None:
        """Remove every channel that is not in `alive`; weights, gates and the optimiser's memory follow.

        mend: fits the smaller network's weights, before gates are put on again, to what the network gave just before.
        """
        if bool((alive & self.alive == self.alive).all()):
            return
        old, gated = self.module, self.gated
        carried = gates.detach(old, self.places) if gated else {}
        mends = mend is not None and samples is not None
        types = self.typed()[0] if mends else None
        whole = self.analysis.types.tensors
        before, twins = self.cut_so_far, self.rewritten.twins
        graph, after = self.graph, Cut(self.analysis.types, alive & self.alive)
        tensors = {name: _slice(tensor, whole[name], before, after) for name, tensor in self.tensors().items()}
        states = {
            name: {key: self._follow(name, value, before, after) for key, value in own.items()}
            for name, own in self.optimiser.items()
        }
        extras = dict(old.named_buffers())
        self.alive = after.alive
        self._build(tensors)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name not in self.analysis.types.tensors and name in extras and extras[name].shape == buffer.shape:
                    buffer.copy_(extras[name])
        self.optimiser = states
        _like(old, self.module)
        if mend is not None and samples is not None and types is not None:
            self.typed()  # the new graph's nodes learn their shapes
            fresh = {before_node: self.rewritten.twins[node] for node, before_node in twins.items()}
            cut, work = Cut(types, self.alive), self.analysis.work
            mend(Task(graph.eval(), self.graph.eval(), fresh, types, cut, samples, work=work))
            self._copy_back()
        if gated:
            kept = {
                place.name: (
                    _slice(carried[place.name][0], (place.axis,), before, after),
                    *(
                        _slice(tensor, whole[name], before, after)
                        for tensor, (name, _) in zip(carried[place.name][1:], place.tensors, strict=True)
                    ),
                )
                for place in self.places
            }
            gates.attach(self.module, self.places, kept)

    def _follow(self, name: str, value: Tensor, before: Cut, after: Cut) -> Tensor:
        """One tensor of an optimiser's state; counters have no axes."""
        axes = self.axes(name)
        if axes is None or value.shape != before.shape(axes):
            return value
        return _slice(value, axes, before, after)

    def _copy_back(self) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                own = attribute(self.graph, name)
                if own is not tensor:
                    tensor.copy_(own)

    def _build(self, tensors: dict[str, Tensor] | None) -> None:
        """The graph and module of the present cut, with these tensors or the original's."""
        analysis, cut = self.analysis, self.cut_so_far
        with torch.random.fork_rng():
            rewritten = rewrite(analysis.types, cut, None if tensors is None else self._named(tensors))
            own = eager.build(analysis.model, analysis.types, cut, rewritten, analysis.captured.example)
        self._rewritten = rewritten
        if own.module is None or self._as_graph:
            self._module = trainable(rewritten.module).train(analysis.modes[""])
        else:
            self._module = own.module
            for path, child in self._module.named_modules():
                child.training = analysis.modes.get(path, child.training)

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters under every name they have."""
        named: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            original = self.analysis.types.weights[name]
            if isinstance(original, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=original.requires_grad)  # noqa: PLW2901
            for alias in self.analysis.types.aliases.get(name, (name,)):
                named[alias] = tensor
        return named

    def refit(self, fit: Callable[[Task], object], samples: Samples) -> None:
        """Run a recovery step that needs no original, on the network as it is."""
        self.synchronise()
        cut, twins = self.cut_so_far, self.rewritten.twins
        types, graph = self.analysis.types, self.graph.eval()
        fit(Task(types.captured.module, graph, twins, types, cut, samples, work=self.analysis.work))
        self._copy_back()

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of the present sizes; what the optimiser remembers of the others is forgotten."""
        gated = self.gated
        self.merge()
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.optimiser = {}
        if gated:
            self.gate()

    def sliced(self, tensors: Mapping[str, Tensor], before: Cut) -> dict[str, Tensor]:
        """Tensors that were kept when `before` was the cut, at what is left now."""
        whole, after = self.analysis.types.tensors, self.cut_so_far
        return {name: _slice(tensor, whole[name], before, after) for name, tensor in tensors.items()}

    # -- as data --------------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Everything that a fresh network of the same analysis needs to go on as this one."""
        return {
            "alive": torch.from_numpy(self.alive.copy()),
            "gated": self.gated,
            "identity": any(place.identity for place in self.places),
            "module": {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()},
            "optimiser": self.optimiser,
            "heads": self._head_places,
            "classes": self._head_classes,
            "generator": 0 if self.generator is None else self.generator.hidden,
        }

    def load(self, state: Mapping[str, object]) -> None:
        """Become the network whose `state()` was saved."""
        alive, module, optimiser = state["alive"], state["module"], state["optimiser"]
        assert isinstance(alive, Tensor)
        assert isinstance(module, dict)
        assert isinstance(optimiser, dict)
        self.alive, self.gated, self._module = alive.numpy(), False, None
        self._build(None)
        if state["identity"]:
            self.places = gates.compactors(self.places)
        if state["gated"]:
            self.gate()
        heads, classes = state["heads"], state["classes"]
        assert isinstance(heads, list)
        assert isinstance(classes, int)
        if heads:
            self.add_heads(heads, classes)
        hidden = state["generator"]
        assert isinstance(hidden, int)
        if hidden:
            self.generate(hidden)
        for name, parameter in self.module.named_parameters():
            # In the memory layout that it had: other kernels would round differently.
            parameter.data = module[name].to(parameter).clone()
        self.module.load_state_dict(module)
        self.optimiser = optimiser


def _slice(tensor: Tensor, axes: tuple[Terms, ...], before: Cut, after: Cut) -> Tensor:
    """What is left of a tensor of one cut in a later one."""
    small = tensor.detach()
    for position, axis in enumerate(axes):
        left = after.kept(axis)[before.kept(axis)]
        if not left.all():
            index = torch.from_numpy(np.flatnonzero(left)).to(small.device)
            small = small.index_select(position, index)
    return small.clone() if small.data_ptr() == tensor.data_ptr() else small


def _like(old: nn.Module, new: nn.Module) -> None:
    """The modes of the modules that are still there; one that is new, as in a graph, has the mode of the whole."""
    modes = {name: child.training for name, child in old.named_modules()}
    for name, child in new.named_modules():
        child.training = modes.get(name, old.training)
