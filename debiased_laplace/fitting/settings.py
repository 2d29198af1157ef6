"""What a fit can be told, in one frozen object, and what it takes where nothing is said."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data, _store
from debiased_laplace.curvature.structures import STRUCTURES, Kronecker, Structure
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.memory import memory_of_chunks
from debiased_laplace.likelihoods import Likelihood, site_layout
from debiased_laplace.network.gradients import CURVATURE_VECTORS
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import BySensitivity, match_parameters
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.sampling.samplers import PrioritySampler, Sampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, Split, TwoBatch

ESTIMATORS = ("projected", "factored")

#: Settings that are objects, what they have, and an example.
PIECES = (
    ("structure", "eigenbasis", "Kronecker()"),
    ("sampler", "draw", "PrioritySampler(1024)"),
    ("split", "rounds", "CrossFit()"),
)

#: Data that a fit keeps by default.
BUDGET = 1024


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Attributes:
        structure: Gives the directions; K-FAC by default.
        parameters: Which trainable parameters the posterior is about: all, ``"last_layer"``, names and patterns, or
            those of the largest curvature (:mod:`debiased_laplace.fitting.choice`).
        dense: Whether outputs may be dense, ``[N, ..., C]`` or ``[N, C, ...]``.
        indices: Instead, single entries of the vector of all trainable parameters, ``[n]`` (not for K-FAC).
        sampler: Which data to keep of the stream; 1,024 by default, by importance (for ``"ggn"``: what a datum adds to
            another curvature does not follow from the outputs alone, and the draw is uniform).
        split: Which of them choose directions and which measure curvatures; ``CrossFit()`` by default, ``Single()`` for
            a structure whose directions do not depend on data, and with ``UniformSampler(None)``, all data, unless
            ``n_data`` says that they may be a part of the training set.
        estimator: ``"projected"``, equation (2), or ``"factored"``, from the structure's own statistics of the second
            data (classical K-FAC; the same thing for the other structures).
        mc_samples: Random vectors for each datum; ``None`` for the exact loss Hessian; ``"auto"`` is exact
            up to 32 outputs and one vector above.
        curvature: ``"ggn"``, or ``"empirical_fisher"``.
        n_data: Size of the training set, if the stream is not it; the number of data seen by default. Of a larger one
            the stream is taken for a random part, all of whose data stand for others too. With an earlier fit to add
            to, of the training set that is added.
        separate_bias: Give biases blocks of their own.
        feature_reduction: Of a last layer, :meth:`~debiased_laplace.network.network.Network.reduced`.
        chunk_size: Data at a time; bounded by memory by default.
        memory_budget: Bytes that the fit may take besides the model and the data drawn
            (:mod:`debiased_laplace.fitting.memory`); bounds the data at a time also of predictions. None for chunks of
            some hundred megabytes.
        targets_key: Where dictionary-like batches have their targets.
        outputs_of: A function of what the model returns that gives its outputs, if they are neither that, nor its
            ``logits``, nor the first of a tuple.
        max_batches: End the pass over the data after so many, of a stream without an end.
        distributed: Whether the processes of an initialised group of ``torch.distributed`` fit together, each with its
            shard of the data.
        prior_precision: One number, one for each part of the basis, or one for each parameter.
        prior_mean: One number, or one for each parameter ``[D]``.
        temperature: Of the likelihood, in the posterior.
        noise_variance: Of the observations of a regression, in squared units of the targets.

    Raises:
        TypeError: If a structure, a sampler or a split is something else.
        ValueError: If a setting has no meaning, whatever the model and the data.
    """

    structure: Structure = field(default_factory=Kronecker)
    parameters: str | Sequence[str] | BySensitivity | None = None
    dense: bool = True
    indices: Tensor | None = None
    sampler: Sampler | None = None
    split: Split | None = None
    estimator: str = "projected"
    mc_samples: int | str | None = "auto"
    curvature: str = "ggn"
    n_data: int | None = None
    separate_bias: bool = False
    feature_reduction: str | None = None
    chunk_size: int | None = None
    memory_budget: int | None = None
    targets_key: str = "labels"
    outputs_of: Callable[[Any], Any] | None = None
    max_batches: int | None = None
    distributed: bool = True
    prior_precision: Any = 1.0
    prior_mean: float | Tensor = 0.0
    temperature: float = 1.0
    noise_variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.structure is None:
            object.__setattr__(self, "structure", Kronecker())
        for name, needed, example in PIECES:
            piece = getattr(self, name)
            if piece is not None and (isinstance(piece, type) or not hasattr(piece, needed)):
                raise TypeError(f"Expected {name} to be an object such as {example}, got {piece!r}.")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"Expected an estimator out of {list(ESTIMATORS)}, got {self.estimator!r}.")
        if self.curvature not in CURVATURE_VECTORS:
            raise ValueError(f"Expected a curvature out of {list(CURVATURE_VECTORS)}, got {self.curvature!r}.")
        _checks.chunk_size(self.chunk_size)
        _checks.whole(self.memory_budget, "memory_budget", otherwise="None to choose it")
        _checks.function(self.outputs_of, "outputs_of")
        _checks.whole(self.mc_samples, "mc_samples", otherwise="None (exact) or 'auto'")
        _checks.whole(self.n_data, "n_data", otherwise="None for those that are seen")
        _checks.whole(self.max_batches, "max_batches", otherwise="None for all")
        _checks.prior_precisions(self.prior_precision)
        _checks.positive(self.temperature, "temperature")
        _checks.positive(self.noise_variance, "noise variance")
        _checks.finite(torch.as_tensor(self.prior_mean), "the prior mean", "Give other numbers.")

    def completed(self, previous: Fit | None = None) -> FitSettings:
        """With a sampler and a split where none was given, for data that are added to those of an earlier fit.

        Raises:
            ValueError: If the data of the earlier fit are in another number of folds.
        """
        sampler = self.sampler or default_sampler(BUDGET, self.structure, self.curvature)
        split = self.split
        if split is None:  # with all data there is nothing to overstate, unless they are a part of the training set
            in_one = previous is not None and previous.sample is not None and previous.sample.n_folds == 1
            part = sampler != UniformSampler(None) or (self.n_data is not None and not in_one)
            split = CrossFit() if self.structure.data_dependent and part else Single()
        if previous is not None and previous.sample is not None and previous.sample.n_folds != split.folds:
            raise ValueError(
                f"Expected the split of the earlier fit, with {previous.sample.n_folds} folds, got one with "
                f"{split.folds}."
            )
        return replace(self, sampler=sampler, split=split, n_data=None if self.n_data is None else int(self.n_data))

    def check_parameters(self, model: Snapshot) -> None:
        """Raise a ``ValueError`` for names that the model does not have."""
        if self.parameters is None or self.parameters == "last_layer" or isinstance(self.parameters, BySensitivity):
            return
        match_parameters(model, self.parameters)

    def discover(
        self, model: Snapshot, inputs: _data.Inputs, targets: _data.Inputs, likelihood: Likelihood
    ) -> Network:  # fmt: skip
        """The network of the model, from some data; their targets and the likelihood tell sites of dense outputs."""

        def sites(outputs: torch.Size) -> _data.SiteLayout:
            of_one = _data.take(targets, _data.positions_of_some(inputs, 1))
            return site_layout(likelihood, outputs, (outputs[0], *of_one.shape[1:]))

        assert not isinstance(self.parameters, BySensitivity)  # which needs the network of all parameters
        network = Network.discover(
            model, inputs, parameters=self.parameters, indices=self.indices, separate_bias=self.separate_bias,
            feature_reduction=self.feature_reduction, find_sites=sites if self.dense else None,
            convention=_data.CallingConvention(self.targets_key, self.outputs_of),
        )  # fmt: skip
        return self.within_budget(network)

    def within_budget(self, network: Network) -> Network:
        """The network, told how much memory chunks of data may take; a ``ValueError`` if there is not enough."""
        if self.memory_budget is not None:
            assert self.split is not None
            network.memory_of_chunks = memory_of_chunks(network, self.structure, self.split, self.memory_budget)
        return network

    def in_words(self, likelihood: Any, seed: int, previous: Fit | None) -> dict[str, Any]:
        """What is kept with a fit: everything that its curvature depends on."""
        words = {
            "structure": repr(self.structure), "parameters": repr(self.parameters), "sampler": repr(self.sampler),
            "split": repr(self.split), "indices": None if self.indices is None else self.indices.tolist(),
            "estimator": self.estimator, "mc_samples": repr(self.mc_samples), "curvature": self.curvature,
            "likelihood": type(likelihood).__name__, "separate_bias": self.separate_bias, "seed": seed,
            "chunk_size": repr(self.chunk_size), "adds_to": None if previous is None else previous.n_seen,
        }  # fmt: skip
        if self.feature_reduction is not None:
            words["feature_reduction"] = self.feature_reduction
        if self.outputs_of is not None:
            words["outputs_of"] = _data.name_of(self.outputs_of)
        return words

    def identity(
        self, likelihood: Any, generator: torch.Generator, previous: Fit | None, model: Snapshot
    ) -> dict[str, Any]:
        """What a checkpoint compares: everything that the fit depends on besides its data."""
        of_posterior = ("n_data", "prior_precision", "prior_mean", "temperature", "noise_variance")
        kept: dict[str, Any] = self.in_words(likelihood, generator.initial_seed(), previous)
        kept["posterior"] = {name: _in_words(getattr(self, name)) for name in of_posterior}
        kept["weights"] = _store.fingerprint(model.state())
        kept["likelihood_settings"] = {name: _in_words(value) for name, value in vars(likelihood).items()}
        kept["targets_key"], kept["generator"] = self.targets_key, _in_words(generator.get_state())
        if previous is not None:
            drawn = {"directions": previous.direction_indices, "curvatures": previous.curvature_indices}
            kept["previous"] = _store.fingerprint(drawn)
        return kept


def default_sampler(budget: int | None, structure: Structure, curvature: str) -> Sampler:
    """By importance where the outputs tell it: what a datum adds to the GGN is small if its loss Hessian is."""
    if budget is None or curvature != "ggn" or not structure.projects:
        return UniformSampler(budget)
    return PrioritySampler(budget)


def _in_words(value: Any) -> str:
    """A number, a tensor or a function, for the settings of a checkpoint."""
    if callable(value):
        return _data.name_of(value)
    return _store.fingerprint({"": value})[""] if isinstance(value, Tensor) else repr(value)


def brief(words: str) -> str:
    """A structure or a split as :meth:`FitSettings.in_words` has it, without what is its default; others as they are.

    Example:
        >>> brief("CrossFit(folds=8, average='rank')")
        'CrossFit(folds=8)'
    """
    kinds = {kind.__name__: kind for kind in (*STRUCTURES.values(), CrossFit, TwoBatch, Single)}
    name = words.partition("(")[0]
    if name not in kinds:  # of somebody's own, which may look like anything
        return words
    default, given = (ast.parse(text, mode="eval").body for text in (repr(kinds[name]()), words))
    assert isinstance(default, ast.Call) and isinstance(given, ast.Call)
    known = {of.arg: ast.dump(of.value) for of in default.keywords}
    return f"{name}({', '.join(ast.unparse(of) for of in given.keywords if ast.dump(of.value) != known.get(of.arg))})"
