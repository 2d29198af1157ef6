"""Finding the blocks of a network by a few forward and backward passes over a few data, and checking what was found."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.network import heads, reach
from debiased_laplace.network.blocks import group_parameters, unflatten
from debiased_laplace.network.conditional import MANY, called_by_need
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.layers import Call, Layout
from debiased_laplace.network.memory import HeldMemory, of_a_datum
from debiased_laplace.network.operations import Trace
from debiased_laplace.network.selected import formed_size, gradients_of_data, memory_of_datum
from debiased_laplace.network.selection import refuse_complex, refuse_scripted
from debiased_laplace.network.tracing import Recorder, find_layouts, leaves
from debiased_laplace.network.uses import use_of

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network

logger = logging.getLogger(__name__)

#: Rounding errors above this are those of half precision.
HALF = 1e-4

#: Relative error of outputs in units of a model's precision, where that is coarse.
ROUNDING = 8


def find_blocks(network: Network, inputs: _data.Inputs, separate_bias: bool) -> None:
    """Set what :class:`.Network` knows of its blocks, calls and sizes.

    Args:
        network: One that knows its parameters alone.
        inputs: Some data; three of them are used.
        separate_bias: Give weights and biases blocks of their own.

    Raises:
        ValueError: If there are no data, or outputs mix data or do not depend on the parameters.
        UnsupportedLayerError: If nothing covers a trainable parameter.
    """
    refuse_scripted(network.shapes, network.snapshot)
    refuse_complex(network.leaves)
    if not _data.count(inputs):
        raise ValueError("Expected at least one datum to find the layers of the model with, got none.")
    _tell_how_it_is_called(network, inputs)
    # Three, to see which dimension counts them, and what the model does for one and for two.
    every, inputs = inputs, _data.at_least(_data.to_device(_data.some(inputs, 3), network.device), 3)
    factors, fewer, recorder = _with_entries(network, inputs)
    network.row_size = factors.outputs.shape[1]
    network.n_outputs = network.row_size if network.sites is None else network.sites.n_outputs
    network.find_sites = None
    network.fewest = 1 if _takes_one(network, _data.take(inputs, slice(0, 1)), factors) else 2
    calls, elsewhere = factors.calls, dict(recorder.elsewhere)
    needed = called_by_need(network, recorder, inputs) and called_by_need(network, recorder, _data.some(every, MANY))
    elsewhere |= dict.fromkeys(needed, "a layer that is not called for all data")
    pairs = [(call.weight, call.bias) for call in calls]
    made_of = [[[] if p is None else recorder.names_in(p) for p in pair] for pair in pairs]
    uses = [
        (use_of(pair[0], network.identities, names[0]), use_of(pair[1], network.identities, names[1]))
        for pair, names in zip(pairs, made_of, strict=True)
    ]
    of_calls = [[name for of_slot in names for name in of_slot] for names in made_of]
    used = leaves(factors.graph_outputs) & network.identities.keys()
    for name in {network.identities[leaf] for leaf in used}.difference(*of_calls):  # inside torch.func.vmap, say
        elsewhere.setdefault(name, "a function that cannot be looked into")
    constant = [len(fewer) == len(calls) and fewer[i].output_shape == call.output_shape for i, call in enumerate(calls)]
    layouts, by_rows = find_layouts(
        factors.graph_outputs, calls, of_calls, constant,
        lambda name: _check_every_datum(network, inputs, factors.outputs, name),
    )  # fmt: skip
    network.by_rows = by_rows or recorder.packs
    for call, names, layout in zip(calls, of_calls, layouts, strict=True):
        if layout is None:
            elsewhere.update(dict.fromkeys(names, f"{type(call).__name__} without a dimension for the data"))
    network.call_types = frozenset(type(call).__name__ for call in calls)
    while True:
        network.apart = frozenset(elsewhere)
        kept = [i for i, names in enumerate(of_calls) if not names or not network.apart.issuperset(names)]
        calls, uses = [calls[i] for i in kept], [uses[i] for i in kept]
        of_calls, layouts = [of_calls[i] for i in kept], [layouts[i] for i in kept]
        factors.calls, network.layouts = calls, [layout or Layout() for layout in layouts]
        network.call_names = [tuple(names) for names in of_calls]
        network.blocks = group_parameters(network.shapes, calls, uses, elsewhere, separate_bias=separate_bias)
        network.is_head = (
            len(calls) == len(network.blocks) == 1
            and not network.blocks[0].arrangement.stacked
            and bool(network.blocks[0].calls)
            and calls[0].output_shape == factors.outputs.shape == (len(factors.outputs), network.blocks[0].outputs)
            and calls[0].edge.node is factors.graph_outputs.grad_fn
        )
        _measure_sizes(network, inputs, factors)
        misread = _check_factors(network, inputs)
        if misread is None:
            network.sites_are_positions = network.sites is not None and _sites_are_positions(network, factors)
            return
        # What no rule reads rightly is differentiated as it is.
        logger.debug("The gradient of %r is not that of its layers: it is made apart.", misread)
        elsewhere[misread] = "a function that is read otherwise"


def _with_entries(network: Network, inputs: _data.Inputs) -> tuple[Factors, list[Call], Recorder]:
    """A forward pass that knows where parameters meet the data, its calls for one datum less, and what was seen.

    What was made of parameters alone and has another shape for fewer data has an entry for each of them. One after the
    other, since what follows from an entry depends on the data.
    """
    while True:
        with HeldMemory() as memory:
            factors, recorder = network.forward(inputs)
        network.note_precision([factors.outputs, *(call.input for call in factors.calls)])
        _checks.finite(
            factors.outputs, "the model's outputs", "Check the inputs and the weights for NaN before fitting."
        )
        if not factors.graph_outputs.requires_grad:
            raise ValueError(
                f"Expected parameters that act on the outputs, got {list(network.shapes)}, on none of which any output "
                "depends. Choose those that do (a head whose outputs are not returned does not), and do not detach the "
                "outputs or compute them under no_grad."
            )
        fewer, of_fewer = _check_independence(network, inputs, factors.outputs)
        network.forward_memory = of_a_datum(memory.held, of_fewer.held, len(factors.outputs))
        shapes = recorder.derivations, [] if fewer is None else fewer.derivations
        differ = [number for number, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1]]
        if not differ or network.entries is None or differ[0] in network.entries:
            return factors, [] if fewer is None else fewer.calls, recorder
        network.entries |= {differ[0]}


def _tell_how_it_is_called(network: Network, inputs: _data.Inputs) -> None:
    """Log what of the user's model, and of a batch, is left out."""
    if network.snapshot.left_out:
        logger.info("The model's forward is used without its %s.", ", ".join(network.snapshot.left_out))
    some = inputs.parts[0] if isinstance(inputs, _data.Assorted) else inputs
    dropped = network.convention.dropped(network.snapshot.module, some)
    if dropped:
        logger.warning(
            "The model's forward has no arguments %s: these entries of the batches are left out. Name them like its "
            "arguments, or use inputs_of=, if it needs them.", ", ".join(map(repr, dropped)),
        )  # fmt: skip


def unreached(network: Network, inputs: _data.Inputs) -> tuple[list[int], list[str], list[int]]:
    """Outputs of variance zero, on which no covered parameter acts (:func:`.reach.unreached`)."""
    if network.is_head and network.free is None:  # every output has a row of the weight
        return [], [], []
    inputs = _data.to_device(_data.some(inputs, 3), network.device)
    snapshot = network.snapshot
    copies = {name: snapshot.parameters[name].detach().requires_grad_() for name in snapshot.trainable}
    copies |= {name: p.detach().requires_grad_() for name, p in network.leaves.items()}
    free = {} if network.free is None else unflatten(network.free, network.shapes)
    with gradients_enabled():
        silent, others, constant = reach.unreached(
            lambda parameters: network.call(parameters, inputs), copies,
            {name: free.get(name) for name in network.shapes},
        )  # fmt: skip
    return _of_all_sites(network, silent), others, _of_all_sites(network, constant)


def _of_all_sites(network: Network, entries: list[int]) -> list[int]:
    """Outputs of which all sites are among some entries of a row."""
    if network.sites is None or not entries:
        return entries
    counts = torch.tensor(entries).remainder(network.n_outputs).bincount(minlength=network.n_outputs)
    return (counts == network.row_size // network.n_outputs).nonzero()[:, 0].tolist()


def last_layer(network: Network, inputs: _data.Inputs) -> list[str]:
    """Names of the parameters that make the outputs."""
    with Trace(network.snapshot.parameters | network.leaves, _data.tensors(inputs)) as trace:
        factors, _ = network.forward(inputs)
    return heads.last_layer(trace, factors.graph_outputs, network.identities)


def close(first: Tensor, second: Tensor, among: Tensor, precision: float) -> bool:
    """Equal but for rounding, which differs between batches of different sizes, and adds up from layer to layer."""
    tolerance = max(0.01, ROUNDING * precision)
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(among.abs().max()))


def _sites_are_positions(network: Network, factors: Factors) -> bool:
    """Whether the outputs at every site are those of the only layer at the position of the same number."""
    if len(factors.calls) != 1 or len(network.blocks) != 1 or not network.blocks[0].calls or network.sites is None:
        return False
    (call,), (block,), returned = factors.calls, network.blocks, factors.returned
    if block.arrangement.stacked or block.groups != 1 or call.edge.node is not returned.grad_fn:
        return False
    numbers = torch.arange(returned.numel(), dtype=torch.float64, device=returned.device).reshape(returned.shape)
    of_layer = call.outputs(numbers, factors.n_run, network.layouts[0])[:, 0]  # [N, O, S]
    by_site = network.sites.by_site(numbers).mT
    same = of_layer.shape == by_site.shape and torch.equal(of_layer, by_site)
    return same and factors.inputs(block).shape[-1] == by_site.shape[-1]


def _measure_sizes(network: Network, inputs: _data.Inputs, factors: Factors) -> None:
    """How much memory a datum needs, for :meth:`.Network.chunk_size`."""
    n = len(factors.outputs)
    network.activations = sum(math.prod(call.output_shape) for call in factors.calls) // n + 1
    network.activations += sum(block.size for block in network.blocks if block.arrangement.stacked)
    network.datum_size = _data.size_of_datum(inputs)
    network.has_sequences = factors.has_sequences
    for block in network.blocks:
        inputs_of_block = factors.inputs(block)
        network.largest_inputs = max(network.largest_inputs, memory_of_datum(inputs_of_block))
        network.largest_formed = max(network.largest_formed, formed_size(inputs_of_block, block.outputs))


def _check_independence(network: Network, inputs: _data.Inputs, outputs: Tensor) -> tuple[Recorder | None, HeldMemory]:
    """The outputs of the first data must not change when the last one is left out; what is seen without it."""
    fewer_inputs, memory = _data.take(inputs, slice(0, len(outputs) - 1)), HeldMemory()
    cause: ValueError | None = None
    recorder: Recorder | None = None
    try:
        with memory:
            factors, recorder = network.forward(fewer_inputs)
        fewer = factors.outputs
    except ValueError as error:  # a normalisation by the statistics of one datum
        fewer, cause = torch.full_like(outputs[:-1], torch.nan), error
    if not close(fewer, outputs[:-1], outputs, network.precision):
        raise _of_no_function(network, inputs, outputs) from cause
    return recorder, memory


def _check_every_datum(network: Network, inputs: _data.Inputs, outputs: Tensor, name: str) -> None:
    """Every datum must have the same outputs alone, but for rounding; a parameter where it seems to be otherwise."""
    alone = [network.outputs(_data.take(inputs, slice(n, n + 1))) for n in range(len(outputs))]
    if not _equal(network, torch.cat(alone), outputs):
        raise _of_no_function(network, inputs, outputs, f", after the layer of {name!r}")


def _equal(network: Network, one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= network.precision**0.5 * other.abs().max())


def _of_no_function(network: Network, inputs: _data.Inputs, outputs: Tensor, where: str = "") -> ValueError:
    """What is wrong with outputs that are no function of their datum."""
    if not _equal(network, network.outputs(inputs), outputs):
        return ValueError(
            "The outputs for the same data differ from one forward pass to the next. A posterior is about a function "
            "of the inputs: take dropout, noise and skipped layers out of the model's evaluation mode (dropout with "
            "training=True is the usual cause)."
        )
    return ValueError(
        f"The output for one datum depends on other data of its batch{where}. A posterior needs outputs that are "
        "independent given the weights; a normalisation by batch statistics (track_running_stats=False) is the usual "
        "cause. Replace it, or give it running statistics."
    )


def _takes_one(network: Network, datum: _data.Inputs, among: Factors) -> bool:
    """Whether the first of several data has the same outputs alone, by way of the same layers."""
    try:
        alone, _ = network.forward(datum)
    except Exception:  # whatever a model fails with where it loses the batch dimension
        return False
    same = len(alone.calls) == len(among.calls) and all(
        len(one.output_shape) == len(several.output_shape) and one.input.ndim == several.input.ndim
        for one, several in zip(alone.calls, among.calls, strict=True)
    )
    return same and close(alone.outputs, among.outputs[:1], among.outputs, network.precision)


def try_one(network: Network, datum: _data.Inputs) -> None:
    """Set ``network.fewest`` by the outputs of one datum alone, without a look at the layers."""
    twice = network.outputs(_data.at_least(datum, 2))
    try:
        same = close(network.outputs(datum), twice[:1], twice, network.precision)
    except Exception:  # whatever a model fails with where it loses the batch dimension
        same = False
    network.fewest = 1 if same else 2


def _check_factors(network: Network, inputs: _data.Inputs) -> str | None:
    """The gradient of every datum's outputs must be what its factors give; a parameter whose layer was misread.

    Raises:
        UnsupportedLayerError: If it is one that no rule reads, made datum by datum.
    """
    names = list(network.shapes)
    copies = {name: p.detach().requires_grad_() for name, p in network.leaves.items()}
    factors, _ = network.forward(inputs)
    with gradients_enabled():
        outputs = network.call(copies, inputs)
    vectors = torch.linspace(1, 2, outputs.shape[1]) * torch.eye(len(outputs))[:, :, None]
    vectors = vectors.to(network.device, network.dtype)
    by_datum = [
        torch.autograd.grad(outputs, list(copies.values()), v.to(outputs), retain_graph=True, materialize_grads=True)
        for v in vectors
    ]
    expected = {
        name: torch.stack(g).detach().to(network.dtype)
        for name, g in zip(names, zip(*by_datum, strict=True), strict=True)
    }
    largest = max(float(g.abs().max()) for g in expected.values() if g.numel())
    lone = {name for block in network.lone_blocks for name in block.parameters}
    formed = {name for block in network.blocks if block.formed for name in block.parameters}
    try:
        wrong = _misread(network, factors, vectors, expected, largest)
    except RuntimeError:  # an operation without batched derivatives
        if network.one_by_one or not formed:
            raise
        wrong = min(formed)
    if wrong in lone | formed and not network.one_by_one:  # batched derivatives of some operations are wrong in torch
        network.one_by_one = True
        factors, _ = network.forward(inputs)
        wrong = _misread(network, factors, vectors, expected, largest)
        network.one_by_one = wrong is None or wrong in lone
    if wrong in lone:
        _check_every_datum(network, inputs, factors.outputs, wrong)
        raise _checks.UnsupportedLayerError(
            f"The gradient of {wrong!r} could not be reconstructed by differentiating the model datum by datum. "
            "Freeze it with requires_grad_(False) to leave it out of the posterior, and please report the "
            "layer: this is an error of this package."
        )
    return wrong


def _misread(
    network: Network, factors: Factors, vectors: Tensor, expected: dict[str, Tensor], largest: float
) -> str | None:
    """The first parameter whose gradient is not what the factors give.

    In half precision two forward passes differ, and a rectifier on its other side changes an entry by itself: there the
    root mean squares of gradients are compared, which a layer that is read otherwise changes as a whole.
    """
    # A model may compute in less than its parameters have.
    norm, relative, absolute = math.inf, max(1e-4, 1e5 * network.precision), 1e-4
    if network.precision > HALF:
        norm, relative, absolute = 2.0, 0.15, 1e-3
    back = [of_chunk for _, of_chunk in factors.backpropagate(vectors, network.vector_chunk)]
    for block, parts in zip(network.blocks, zip(*back, strict=True), strict=True):
        of_datum = torch.cat(parts, 2).diagonal(dim1=0, dim2=2)  # [G, O, S, N]: of the datum that the vector is for
        actual = block.scatter(gradients_of_data(of_datum, factors.inputs(block)))
        for name in (name for name in block.parameters if expected[name].numel()):
            n_entries = max(1, int(((expected[name] != 0) | (actual[name] != 0)).sum()))  # rows that are selected
            size, difference = (
                float(torch.linalg.vector_norm(tensor, norm)) / n_entries ** (1 / norm)
                for tensor in (expected[name], actual[name] - expected[name])
            )
            if not difference <= relative * size + absolute * largest:
                return name
    return None
