r"""Recurrent layers (RNN, LSTM, GRU) and their cells, as the linear maps they are.

A step of a layer is a function of :math:`W_{ih} x_t + b_{ih}` and :math:`W_{hh} h_{t-1} + b_{hh}`, and of an LSTM with
projections also of :math:`W_{hr}` times its hidden state. The first is one call of ``F.linear`` for all times. The
others are computed step by step and are one call, too: to their results ``[T, n, G]``, which are zero but for the bias
before the first step, every step adds its own, and the gradient there is that of all steps. So networks have the same
calls whatever the length of the sequences is.

Sequences have the times first, ``[T, n, ...]``, or are packed: ``[rows, ...]``, time after time, the longest sequence
first, of which ``batch_sizes[t]`` have a time t (``torch.nn.utils.rnn``). Equations and the order of the weights are
those of ``torch.nn.RNN``, ``LSTM`` and ``GRU``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.layers.call import Arguments, See, composite, rule
from debiased_laplace.network.layers.linear import LinearCall

_VF = torch._C._VariableFunctions

State = tuple[Tensor, ...]  # the hidden state, and the cell state of an LSTM
Cell = Callable[[Tensor, Tensor, State], State]  # of the two linear maps' results and the state before


def _tanh_cell(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    return (torch.tanh(inputs + recurrent),)


def _relu_cell(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    return (torch.relu(inputs + recurrent),)


def _lstm_cell(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    into, forget, content, out = (inputs + recurrent).chunk(4, -1)
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(into) * torch.tanh(content)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def _gru_cell(inputs: Tensor, recurrent: Tensor, state: State) -> State:
    size = state[0].shape[-1]
    reset, update = torch.sigmoid(inputs[..., : 2 * size] + recurrent[..., : 2 * size]).chunk(2, -1)
    new = torch.tanh(inputs[..., 2 * size :] + reset * recurrent[..., 2 * size :])
    return (new + update * (state[0] - new),)


CELLS: dict[Callable[..., Any], Cell] = {
    _VF.rnn_tanh: _tanh_cell, _VF.rnn_relu: _relu_cell, _VF.lstm: _lstm_cell, _VF.gru: _gru_cell,
    _VF.rnn_tanh_cell: _tanh_cell, _VF.rnn_relu_cell: _relu_cell, _VF.lstm_cell: _lstm_cell, _VF.gru_cell: _gru_cell,
}  # fmt: skip


_LAYERS = (_VF.rnn_tanh, _VF.rnn_relu, _VF.lstm, _VF.gru)


def is_of_packed_sequences(function: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether a call packs sequences, or is one of a recurrent layer that is given packed ones."""
    # Those have the arguments data, batch_sizes, initial states, weights, ...; others have no second one.
    is_given = function in _LAYERS and len(arguments) > 3 and isinstance(arguments[3], (list, tuple))
    return is_given or function is _VF._pack_padded_sequence


def steps_of_linear(results: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(states, weight, bias)`` by what has its gradients: ``results``, to which every step was added."""
    return results


@rule(steps_of_linear)
def _steps_of_linear(results: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> Arguments:
    return Arguments(LinearCall, states, weight, bias)


class _Times:
    """The leading dimensions of sequences: their times, or packed rows."""

    def __init__(self, sizes: list[int] | None) -> None:
        self.sizes = sizes

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """What the sequences have at every time."""
        return tensor.unbind(0) if self.sizes is None else tensor.split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        return torch.stack(list(parts)) if self.sizes is None else torch.cat(list(parts))


class _Stepwise:
    """``F.linear`` of states that are known one step after the other.

    Args:
        like: Sequences of the same lengths.
        weight: ``[G, H]``.
        bias: ``[G]``.
        times: Where the times of sequences are.
    """

    def __init__(self, like: Tensor, weight: Tensor, bias: Tensor | None, times: _Times) -> None:
        self._weight, self._bias, self._times = weight, bias, times
        # That of states that are zero: a part of the graph whichever of the two has a gradient, and no view.
        zeros = like.new_zeros(*like.shape[:-1], 1)
        self._results = zeros * weight[:, 0] if bias is None else torch.addcmul(bias, zeros, weight[:, 0])
        self._of_times = times.split(self._results)
        self._transposed = weight.mT
        self._states: list[Tensor | None] = [None] * len(self._of_times)

    def __call__(self, time: int, state: Tensor) -> Tensor:
        """The result for the states ``[n, H]`` at one time."""
        self._states[time] = state.detach()
        return torch.addmm(self._of_times[time], state, self._transposed)

    def show(self, see: See) -> None:
        """Let it be seen as one call."""
        states = self._times.join([state for state in self._states if state is not None])
        see(steps_of_linear, self._results, states, self._weight, self._bias)


def _direction(
    see: See, cell: Cell, inputs: Tensor, state: State, weights: Sequence[Tensor | None], times: _Times, backward: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: hidden states at all times, and the last state of every sequence."""
    of_inputs, of_states, input_bias, bias, projection = weights
    assert of_inputs is not None and of_states is not None
    projected = times.split(see(F.linear, inputs, of_inputs, input_bias))
    recurrent = _Stepwise(inputs, of_states, bias, times)
    reduced = None if projection is None else _Stepwise(inputs, projection, None, times)
    hidden: list[Tensor] = [inputs] * len(projected)
    for time in reversed(range(len(projected))) if backward else range(len(projected)):
        size = len(projected[time])
        before = tuple(part[:size] for part in state)
        new = cell(projected[time], recurrent(time, before[0]), before)
        if reduced is not None:
            new = (reduced(time, new[0]), *new[1:])
        hidden[time] = new[0]
        # Sequences that end before this time keep their state: the last one, or going backward the first.
        state = tuple(
            part if size == len(old) else torch.cat([part, old[size:]]) for part, old in zip(new, state, strict=True)
        )
    for linear in (recurrent, reduced):
        if linear is not None:
            linear.show(see)
    return times.join(hidden), state


def _layers(
    see: See, cell: Cell, inputs: Tensor, initial: State, weights: Sequence[Tensor], times: _Times, bias: bool,
    n_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers: the last one's hidden states at all times, and the last states ``[layers * directions, n, H]``."""
    directions = 2 if bidirectional else 1
    n_weights = len(weights) // (n_layers * directions)
    states = list(zip(*(see(torch.unbind, part) for part in initial), strict=True))
    last: list[State] = []
    for layer in range(n_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            given = list(weights[place * n_weights : (place + 1) * n_weights])
            both = given[2:4] if bias else [None, None]
            projection = given[-1] if n_weights in (3, 5) else None
            output, state = _direction(
                see, cell, inputs, states[place], [*given[:2], *both, projection], times, direction == 1
            )
            outputs.append(output)
            last.append(state)
        inputs = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if train and dropout and layer + 1 < n_layers:
            inputs = F.dropout(inputs, dropout)
    return inputs, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _layer(function: Callable[..., Any], see: See, *arguments: Any, **keywords: Any) -> Any:
    if keywords:  # no module gives any
        return NotImplemented
    if is_of_packed_sequences(function, arguments):
        inputs, batch_sizes, initial, weights, *settings = arguments
        times, batch_first = _Times(batch_sizes.tolist()), False
    else:
        inputs, initial, weights, *settings, batch_first = arguments
        times = _Times(None)
    initial = (initial,) if isinstance(initial, Tensor) else tuple(initial)
    inputs = inputs.transpose(0, 1) if batch_first else inputs
    outputs, *last = _layers(see, CELLS[function], inputs, initial, weights, times, *settings)
    return outputs.transpose(0, 1) if batch_first else outputs, *last


def _cell(
    function: Callable[..., Any], see: See, inputs: Tensor, state: Tensor | State, of_inputs: Tensor,
    of_states: Tensor, input_bias: Tensor | None = None, bias: Tensor | None = None,
) -> Any:  # fmt: skip
    before = (state,) if isinstance(state, Tensor) else tuple(state)
    projected = see(F.linear, inputs, of_inputs, input_bias)
    new = CELLS[function](projected, see(F.linear, before[0], of_states, bias), before)
    return new[0] if isinstance(state, Tensor) else new


@composite(_VF._pack_padded_sequence)
def _pack(see: See, inputs: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    longest = inputs.shape[1 if batch_first else 0]
    is_valid = lengths.is_cpu and len(lengths) and longest >= lengths[0] and lengths[-1] > 0
    if not is_valid or bool((lengths.diff() > 0).any()):
        return NotImplemented  # it says what is wrong
    batch_sizes = (lengths > torch.arange(int(lengths[0]))[:, None]).sum(1)
    times, sequences = _places(batch_sizes, inputs.device)
    return inputs[sequences, times] if batch_first else inputs[times, sequences], batch_sizes


@composite(_VF._pad_packed_sequence)
def _pad(
    see: See, rows: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    n, n_times = int(batch_sizes[0]), max(len(batch_sizes), total_length)
    times, sequences = _places(batch_sizes, rows.device)
    shape = (n, n_times) if batch_first else (n_times, n)
    padded = torch.full((*shape, *rows.shape[1:]), padding_value, dtype=rows.dtype, device=rows.device)
    lengths = (batch_sizes > torch.arange(n)[:, None]).sum(1)
    return padded.index_put((sequences, times) if batch_first else (times, sequences), rows), lengths


def _places(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The time and the sequence of every packed row."""
    sequences = torch.cat([torch.arange(size) for size in batch_sizes.tolist()])
    return torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes).to(device), sequences.to(device)


for _function in CELLS:
    composite(_function)(partial(_layer if _function in _LAYERS else _cell, _function))
