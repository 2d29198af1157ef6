"""What is known of a network once its blocks are found, in objects that can be stored, and back, from every version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from debiased_laplace.network.blocks import Block
from debiased_laplace.network.layers import Layout

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network

#: Classes of calls that networks of the first versions recorded, which do not say it.
FIRST_CALL_TYPES = ("LinearCall", "ConvolutionCall", "NormalisationCall")


def description_of(network: Network) -> dict[str, Any]:
    """Of a network whose blocks are found."""
    return {
        "shapes": {name: tuple(shape) for name, shape in network.shapes.items()},
        "blocks": [
            {**vars(block), "shapes": tuple(tuple(shape) for shape in block.shapes)} for block in network.blocks
        ],
        "call_types": sorted(network.call_types or ()),
        "layouts": [layout.batch_dimension for layout in network.layouts],
        "sizes": (network.n_outputs, network.activations, network.largest_inputs, network.largest_formed),
        "is_head": network.is_head,
        "datum_size": network.datum_size,
        "forward_memory": network.forward_memory,
        "one_by_one": network.one_by_one,
        "by_rows": network.by_rows,
        "entries": None if network.entries is None else sorted(network.entries),
        "apart": sorted(network.apart),
        "call_names": network.call_names,
        "fewest": network.fewest,
        "free": network.free,
        "feature_reduction": network.feature_reduction,
        "convention": network.convention.description(),
        "sites": network.sites,
        "row_size": network.row_size,
        "sites_are_positions": network.sites_are_positions,
        "precision": network.precision,
    }


def set_description(network: Network, description: dict[str, Any]) -> None:
    """Set what a description says; keys that an earlier version did not write have what was the case then."""
    network.blocks = [
        Block(**{**Block.upgraded(block), "shapes": tuple(torch.Size(shape) for shape in block["shapes"])})
        for block in description["blocks"]
    ]
    network.layouts = [Layout(dim) for dim in description["layouts"]]
    network.call_types = frozenset(description.get("call_types", FIRST_CALL_TYPES))
    network.n_outputs, network.activations, network.largest_inputs, network.largest_formed = description["sizes"]
    network.is_head, network.datum_size = description["is_head"], description.get("datum_size", 0)
    network.forward_memory = description.get("forward_memory", 0)
    network.one_by_one, network.by_rows = description.get("one_by_one", False), description.get("by_rows", False)
    entries = description.get("entries")
    network.entries = None if entries is None else frozenset(entries)
    network.apart = frozenset(description.get("apart", ()))
    names = description.get("call_names")
    network.call_names = None if names is None else [tuple(of_call) for of_call in names]
    network.free, network.feature_reduction = description["free"], description.get("feature_reduction")
    network.fewest, network.sites = description.get("fewest", 1), description.get("sites")
    network.row_size = description.get("row_size", network.n_outputs)
    network.sites_are_positions = description.get("sites_are_positions", False)
    network.precision = description.get("precision", network.precision)
