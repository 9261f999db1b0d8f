r"""A masked autoencoder: a perceptron whose outputs for one coordinate see only the coordinates before it.

Germain, Gregor, Murray, Larochelle (2015), *MADE: masked autoencoder for distribution estimation*,
arXiv:1502.03509.

Each hidden unit sees a fixed set of coordinates, so it can be computed as soon as these are known. `MADE.unroll` finds
the coordinates one after another and evaluates each unit once, where whole passes would evaluate every unit as often as
there are coordinates; `MADE.unroll_back` does the same for a gradient, from the last coordinate to the first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import MLP, Activation, check_widths, within_reach

__all__ = ["MADE", "check_order"]

BLOCK = 8
"""How many stages are worked on with one product for all that came before them."""


class _Stage(NamedTuple):
    """What becomes known together: coordinates ``[first, last)`` in turn, and in each hidden layer units likewise."""

    first: int
    last: int
    units: tuple[tuple[int, int], ...]


class _Plan(NamedTuple):
    """Which weights exist, and when everything is known."""

    masks: list[Tensor]  # [units above, units below] a layer, the last of them [input_dim, units]
    levels: list[int]  # how many coordinates in a row have to be found before each one
    stages: list[list[int]]  # how many before each unit of each hidden layer, rising


def _along_order(ranks: Sequence[int], hidden_dims: Sequence[int], context_dim: int) -> _Plan:
    """A unit of degree ``m`` sees the ranks below ``m``."""
    input_dim = len(ranks)
    # A unit of degree 0 sees the context alone; without a context it would see nothing.
    lowest = 0 if context_dim else min(1, input_dim - 1)
    degrees = [torch.tensor(ranks) + 1]
    degrees += [lowest + torch.arange(width) * (input_dim - lowest) // width for width in hidden_dims]
    masks = [later[:, None] >= earlier for earlier, later in pairwise(degrees)]
    masks.append(torch.tensor(ranks)[:, None] >= degrees[-1])
    stages = [[lowest + k * (input_dim - lowest) // width for k in range(width)] for width in hidden_dims]
    return _Plan(masks, list(ranks), stages)


def _along_graph(adjacency: Tensor, hidden_dims: Sequence[int], context_dim: int) -> _Plan:
    """A unit sees what steers one of the coordinates, one of the sets that occur.

    Raises:
        OptionError: the coordinates steer each other in a circle.
    """
    levels = torch.full((len(adjacency),), -1)
    for level in range(len(adjacency)):
        ready = (levels < 0) & ~(adjacency & (levels < 0)).any(-1)
        levels = torch.where(ready, level, levels)
    if bool((levels < 0).any()):
        circle = (levels < 0).nonzero().flatten().tolist()
        raise OptionError(f"adjacency has a circle among the coordinates {circle}: no order of them exists.")
    sets = adjacency.unique(dim=0)
    if len(sets) > 1 and not context_dim:
        sets = sets[sets.any(-1)]  # a unit that sees nothing is of use with a context only
    stage = torch.where(sets, levels + 1, 0).amax(-1)
    sets, stage = sets[stage.argsort(stable=True)], stage.sort(stable=True).values
    units = [torch.arange(width) * len(sets) // width for width in hidden_dims]
    seen = [torch.eye(len(adjacency), dtype=torch.bool), *(sets[index] for index in units), adjacency]
    # below <= above, as sets: nothing is in the one and not in the other.
    masks = [(~above).float() @ below.float().mT == 0 for below, above in pairwise(seen)]
    return _Plan(masks, levels.tolist(), [stage[index].tolist() for index in units])


def check_order(order: Sequence[int] | None, input_dim: int) -> list[int]:
    """The rank of each coordinate; ``None`` is as they come.

    Raises:
        OptionError: it is not a permutation of ``0 .. input_dim - 1``.

    Example:
        >>> check_order(None, 3)
        [0, 1, 2]
    """
    try:
        ranks = list(range(input_dim)) if order is None else [int(rank) for rank in order]
    except (TypeError, ValueError):
        ranks = []
    if sorted(ranks) != list(range(input_dim)):
        raise OptionError(f"order must be a permutation of 0 .. {input_dim - 1}, got {order!r}.")
    return ranks


def _plan(
    input_dim: int,
    order: Sequence[int] | None,
    adjacency: Sequence[Sequence[bool]] | None,
    hidden_dims: Sequence[int],
    context_dim: int,
) -> _Plan:
    if order is not None and adjacency is not None:
        raise OptionError("order and adjacency both say which coordinate is steered by which: give one of them.")
    if adjacency is not None:
        rows = [[bool(entry) for entry in row] for row in adjacency]
        if len(rows) != input_dim or any(len(row) != input_dim for row in rows):
            raise OptionError(f"adjacency must be {input_dim} rows of {input_dim} booleans.")
        return _along_graph(torch.tensor(rows) & ~torch.eye(input_dim, dtype=torch.bool), hidden_dims, context_dim)
    return _along_order(check_order(order, input_dim), hidden_dims, context_dim)


def _works_on_each_number(activation: nn.Module) -> bool:
    """Whether an activation gives the same for a number whatever stands beside it, and every time."""
    probe = torch.linspace(-3, 3, 12, device="cpu").reshape(3, 4)
    try:
        with torch.no_grad():
            whole, part = activation(probe), activation(probe[1:, :3].mT)
            return whole.shape == probe.shape and torch.equal(whole[1:, :3].mT, part)
    except Exception:  # whatever it asks of its input, it is more than one number
        return False


class MADE(MLP):
    r"""``params`` outputs for each of ``input_dim`` coordinates, those of :math:`x_i` from what steers it.

    Coordinate :math:`i` has the rank ``order[i]``; its outputs depend on the coordinates of lower rank and on
    the whole context; with ``adjacency``, on the coordinates named there instead. A hidden unit sees what steers one of
    the coordinates, and each layer has units for all of these sets in turn, as far as its width goes.

    Args:
        input_dim: the number of coordinates.
        params: how many outputs each coordinate gets.
        order: the rank of each coordinate, a permutation of ``0 .. input_dim - 1``; default as they come.
        adjacency: ``adjacency[i][j]`` says whether :math:`x_j` steers coordinate :math:`i`, in place of an order; a
            directed graph without circles, whose diagonal is ignored.
        hidden_dims: the widths of the hidden layers.
        context_dim: the width of the context, 0 for none.
        activation: a name, a module class or a module.
        residual: add each hidden layer's input to its output; all hidden widths must then be equal.
        features: what the network reads of a coordinate, from numbers ``[*shape]`` to ``[*shape, width]``; default the
            number itself.

    Attributes:
        turn: which coordinate comes when.
        passes: how many coordinates in a row have to be found, one after another.
        unrolls: whether `unroll` works: the activation must work on each number alone.

    Raises:
        OptionError: ``order`` is not a permutation, ``adjacency`` is not square or has a circle, both are given, or a
            width is not positive.

    Example:
        >>> MADE(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    turn: Tensor

    def __init__(
        self,
        input_dim: int,
        params: int,
        *,
        order: Sequence[int] | None = None,
        adjacency: Sequence[Sequence[bool]] | None = None,
        hidden_dims: Sequence[int] = (128, 128),
        context_dim: int = 0,
        activation: Activation = "relu",
        residual: bool = False,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        hidden_dims = check_widths(hidden_dims)
        with torch.device("cpu"):  # what exists is computed, wherever the weights are to be
            plan = _plan(input_dim, order, adjacency, hidden_dims, context_dim)
        width = 1 if features is None else features(torch.zeros(1, device="cpu")).shape[-1]
        masks = [*plan.masks[:-1], plan.masks[-1].repeat_interleave(params, 0)]
        masks[0] = masks[0].repeat_interleave(width, 1)
        super().__init__(
            input_dim * width,
            input_dim * params,
            hidden_dims=hidden_dims,
            context_dim=context_dim,
            activation=activation,
            residual=residual,
            masks=masks,
        )
        self.input_dim, self.params, self.features, self.width = input_dim, params, features, width
        turn = sorted(range(input_dim), key=plan.levels.__getitem__)
        self.register_buffer("turn", torch.tensor(turn), persistent=False)
        self.passes = max(plan.levels) + 1
        self.unrolls = _works_on_each_number(self.activation)
        self._levels, self._unit_stages = sorted(plan.levels), plan.stages

    @cached_property
    def _stages(self) -> list[_Stage]:
        """Units are in the order of their stages, so what is known at a stage is a slice from the front."""
        known = [self._levels, *self._unit_stages]
        ends = [[(bisect_left(at, t), bisect_right(at, t)) for at in known] for t in range(self.passes)]
        return [_Stage(*ends_at[0], tuple(ends_at[1:])) for ends_at in ends]

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """The outputs ``[*batch, input_dim, params]`` for ``x`` ``[*batch, input_dim]``."""
        if x is not None and self.features is not None:
            x = self.features(x).flatten(-2)
        return super().forward(x, context).unflatten(-1, (-1, self.params))

    def _read(self, x: Tensor) -> Tensor:
        """What the first layer multiplies, ``[n * width, rows]``, of coordinates ``[n, rows]``."""
        if self.features is not None:
            x = self.features(x).movedim(-1, 1).flatten(0, 1)
        return within_reach(x)

    def tensors(self) -> list[Tensor]:
        """All that the outputs depend on beside the input and the context."""
        parts = [(layer.weight, layer.context_weight, layer.bias) for layer in self.layers]
        tensors = [t for part in parts for t in part if isinstance(t, Tensor)] + list(self.activation.parameters())
        return list({id(t): t for t in tensors}.values())  # a tensor may be tied to another one

    def _columns(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The masked weights, inputs and outputs in turn: those of each layer but the last, then the last's
        ``[input_dim, params, units]``, and its bias.
        """
        weights = [layer.link().masked for layer in self.layers]  # type: ignore[operator]
        weights[0] = weights[0].unflatten(1, (-1, self.width)).index_select(1, self.turn).flatten(1)
        last = weights.pop().unflatten(0, (-1, self.params)).index_select(0, self.turn)
        bias = self.layers[-1].bias.unflatten(0, (-1, self.params)).index_select(0, self.turn)  # type: ignore[operator]
        return weights, last, bias

    def _offset(self, number: int, context: Tensor | None) -> Tensor:
        """What a layer adds to the products with its weights, ``[units, 1]``, or ``[units, rows]`` with a context."""
        layer = self.layers[number]
        if number or context is None:
            return layer.bias.unsqueeze(-1)  # type: ignore[operator]
        return layer(None, within_reach(context)).mT

    @torch.no_grad()
    def unroll(self, find: Callable[[Tensor, Tensor], Tensor], like: Tensor, context: Tensor | None = None) -> Tensor:
        """Coordinates found one after another from outputs that depend on those before; no unit is computed twice.

        Args:
            find: from coordinates ``[n]`` and their outputs ``[rows, n, params]`` to their values ``[rows, n]``.
            like: gives rows, dtype and device, ``[rows, input_dim]``.
            context: ``[rows, context_dim]``.

        Returns:
            ``[rows, input_dim]``, without gradient.
        """
        weights, last, last_bias = self._columns()
        rows, depth, width = len(like), len(weights), self.width
        found = like.new_empty(self.input_dim, rows)
        active = [like.new_empty(self.in_features, rows), *(like.new_empty(len(weight), rows) for weight in weights)]
        before = [torch.empty_like(units) for units in active[1:]] if self.residual else []
        offsets = [self._offset(number, context) for number in range(depth)]
        if not depth and context is not None:
            last_bias = self.layers[0](None, within_reach(context)).unflatten(-1, (-1, self.params))
            last_bias = last_bias.index_select(-2, self.turn)
        for some in range(0, self.passes, BLOCK):
            block = self._stages[some : some + BLOCK]
            # What the units and outputs of a block of stages owe to all earlier ones is one product each.
            begin, end = block[0].first, block[-1].last
            old = (begin * width, *(start for start, _ in block[0].units))
            ends = [stop for _, stop in block[-1].units]
            begun = [
                weights[n][old[n + 1] : ends[n], : old[n]] @ active[n][: old[n]] + offsets[n][old[n + 1] : ends[n]]
                for n in range(depth)
            ]
            outputs = active[-1][: old[-1]].mT @ last[begin:end, :, : old[-1]].flatten(0, 1).mT
            outputs = outputs.unflatten(-1, (-1, self.params)) + last_bias[..., begin:end, :]
            for first, last_one, units in block:
                known = first * width
                for n, (start, stop) in enumerate(units):
                    if stop > start:
                        new = weights[n][start:stop, old[n] : known] @ active[n][old[n] : known]
                        new = new + begun[n][start - old[n + 1] : stop - old[n + 1]]
                        if self.residual:
                            new = new + before[n - 1][start:stop] if n else new
                            before[n][start:stop] = new
                        active[n + 1][start:stop] = self.activation(new)
                    known = stop
                matrix = last[first:last_one, :, old[-1] : known].flatten(0, 1)
                new = (active[-1][old[-1] : known].mT @ matrix.mT).unflatten(-1, (-1, self.params))
                coordinates = self.turn[first:last_one]
                values = find(coordinates, (outputs[:, first - begin : last_one - begin] + new).to(like.dtype)).mT
                found[coordinates] = values
                active[0][first * width : last_one * width] = self._read(values)
        return found.mT.contiguous()

    @torch.no_grad()
    def unroll_back(
        self, x: Tensor, gradient: Tensor, slope: Tensor, by_outputs: Tensor, context: Tensor | None = None
    ) -> Tensor:
        r"""Solves :math:`J^\top v = g` for the Jacobian of :math:`y_i = f(x_i; \theta_i(x))`, last coordinate first.

        Args:
            x: ``[rows, input_dim]``.
            gradient: :math:`g`, ``[rows, input_dim]``.
            slope: :math:`\partial y_i / \partial x_i` at fixed outputs, ``[rows, input_dim]``.
            by_outputs: :math:`\partial y_i / \partial \theta_i`, ``[rows, input_dim, params]``.
            context: ``[rows, context_dim]``.

        Returns:
            :math:`v` ``[rows, input_dim]``, without gradient.
        """
        weights, last, _ = self._columns()
        depth, width = len(weights), self.width
        with torch.enable_grad():
            inputs = x.detach().index_select(-1, self.turn).mT.requires_grad_()
            below = self._read(inputs)
            sums = below.unflatten(0, (-1, width)).sum((0, 2))
            rates = torch.stack([torch.autograd.grad(s, inputs, retain_graph=True)[0] for s in sums], 1)
        slopes, below, hidden = [], below.detach(), None
        for number, weight in enumerate(weights):
            new = weight @ below + self._offset(number, context)
            hidden = new + hidden if self.residual and hidden is not None else new
            with torch.enable_grad():
                point = hidden.detach().requires_grad_()
                below = self.activation(point)
                (rise,) = torch.autograd.grad(below.sum(), point)
            slopes.append(rise)
            below = below.detach()
        found = torch.empty_like(x)
        by_output = x.new_empty(self.input_dim, self.params, len(x))
        by_unit = [torch.empty_like(units) for units in slopes]
        for first, last_one, units in reversed(self._stages):
            coordinates = self.turn[first:last_one]
            g, read = gradient.index_select(-1, coordinates).mT, slice(first * width, last_one * width)
            if depth:
                later = units[0][1]
                into = weights[0][later:, read].mT @ by_unit[0][later:]
            else:
                into = last[last_one:, :, read].flatten(0, 1).mT @ by_output[last_one:].flatten(0, 1)
            into = (rates[first:last_one] * into.unflatten(0, (-1, width))).sum(1)
            v = (g - into) / slope.index_select(-1, coordinates).mT
            found[:, coordinates] = v.mT
            by_output[first:last_one] = by_outputs.index_select(-2, coordinates).permute(1, 2, 0) * v.unsqueeze(1)
            for number in reversed(range(depth)):
                start, stop = units[number]
                if number == depth - 1:
                    above, seen = by_output[first:].flatten(0, 1), last[first:, :, start:stop].flatten(0, 1)
                else:
                    above, seen = (
                        by_unit[number + 1][units[number + 1][0] :],
                        weights[number + 1][units[number + 1][0] :],
                    )
                    seen = seen[:, start:stop]
                new = slopes[number][start:stop] * (seen.mT @ above)
                if self.residual and number < depth - 1:
                    new = new + by_unit[number + 1][start:stop]
                by_unit[number][start:stop] = new
        return found
