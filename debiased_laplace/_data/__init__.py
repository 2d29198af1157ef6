"""Everything that is assumed about a batch: inputs of any nesting, targets, outputs, loaders (``docs/batches.md``).

``nesting`` walks through containers, ``batches`` cuts, joins and moves inputs, ``loaders`` reads what a loader yields,
``shards`` what one of several processes does, ``calling`` gives inputs to a model and finds its outputs, ``rows`` says
what outputs and targets mean. The others use them through the names below.
"""

from debiased_laplace._data.batches import (
    Assorted,
    Inputs,
    at_least,
    chunks,
    columns,
    concatenate,
    copy,
    count,
    map_tensors,
    positions_of_some,
    size_of_datum,
    sizes,
    slices,
    some,
    take,
    tensors,
    to_device,
)
from debiased_laplace._data.calling import USUAL, CallingConvention, logits_of, name_of
from debiased_laplace._data.loaders import (
    Adapters,
    as_targets,
    check_iterable,
    dataset_length,
    each,
    head,
    joined_targets,
    labelled,
    length,
    one_or_several,
    only,
    pairs,
)
from debiased_laplace._data.rows import rows, target_rows
from debiased_laplace._data.shards import Dealt, InTurns, Shard, of_this_process
from debiased_laplace._data.sites import SiteLayout

__all__ = [
    "USUAL",
    "Adapters",
    "Assorted",
    "CallingConvention",
    "Dealt",
    "InTurns",
    "Inputs",
    "Shard",
    "SiteLayout",
    "as_targets",
    "at_least",
    "check_iterable",
    "chunks",
    "columns",
    "concatenate",
    "copy",
    "count",
    "dataset_length",
    "each",
    "head",
    "joined_targets",
    "labelled",
    "length",
    "logits_of",
    "map_tensors",
    "name_of",
    "of_this_process",
    "one_or_several",
    "only",
    "pairs",
    "positions_of_some",
    "rows",
    "size_of_datum",
    "sizes",
    "slices",
    "some",
    "take",
    "target_rows",
    "tensors",
    "to_device",
]
