"""The fit, and what it is about, under laplace-torch's names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.curvature.basis import DenseBasis, IdentityBasis
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.settings import default_sampler
from debiased_laplace.laplace_torch import noise
from debiased_laplace.laplace_torch.settings import STRUCTURES, SettingsLayer, embed, restrict
from debiased_laplace.network.gradients import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.sampling.samplers import Sampler
from debiased_laplace.sampling.splits import Split

logger = logging.getLogger("debiased_laplace.laplace_torch")


class FittingLayer(SettingsLayer):
    """The layer of :class:`~debiased_laplace.DebiasedLaplace` that fits."""

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        budget: int | None = 1024,
        n_data: int | None = None,
        split: Split | None = None,
        sampler: Sampler | None = None,
        structure: Structure | None = None,
        estimator: str = "projected",
        mc_samples: int | str | None = "auto",
        curvature: str | None = None,
        generator: torch.Generator | int | None = None,
        chunk_size: int | None = None,
        checkpoint: str | Path | None = None,
        max_batches: int | None = None,
    ) -> None:
        """Fit the posterior at the model's parameters; the loader is read once.

        Args:
            train_loader: Any iterable of batches ``(inputs, targets)`` or dictionaries: a DataLoader, a list,
                a generator.
            override: Fit anew. False adds these data to those of the earlier fit, as if both had been given at once:
                everything is measured again on the data drawn in both, at the model's present parameters.
            progress_bar: Show tqdm bars.
            budget: Data to draw from the loader for curvature, directions and measurement together; ``None`` for all,
                the full-data fit.
            n_data: Size of the training set that the loader stands for, if its data are not it. Of a larger one they
                are taken for a random part, and none of them is kept for certain.
            split: ``CrossFit()`` by default, for others no datum along directions that it chose (``Single()`` for
                ``"diag"`` and with all data and no ``n_data``, where there is no bias); ``TwoBatch()`` is the source
                paper's, ``Single()`` the usual, biased practice.
            sampler: Instead of a draw of ``budget`` data by importance, ``PrioritySampler(budget)``, with one forward
                pass over the whole loader; ``UniformSampler(budget)`` is the usual one, needs no forward pass, and is
                the default for the empirical Fisher and for HesScale.
            structure: The structure of ``hessian_structure`` with other settings, such as ``LowRank(rank=50)``.
            estimator: ``"projected"`` (equation 2) or ``"factored"`` (classical K-FAC).
            mc_samples: Random vectors for each datum; None is exact; ``"auto"`` is what the backend says, or else exact
                up to 32 outputs and one vector above.
            curvature: ``"ggn"`` or ``"empirical_fisher"``; by default what the backend says, or else the former.
            generator: A CPU generator or a seed; ``seed`` by default.
            chunk_size: Data at a time; bounded by memory by default.
            checkpoint: File that keeps the state of a long fit, to go on from there when it is called again with the
                same data.
            max_batches: End the pass over the data after so many batches, of a stream without an end.

        Raises:
            ValueError: For an empty loader, targets that do not fit, or a prior precision of the wrong length.
            UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
            NonFiniteError: If outputs or gradients are not finite; it names the layer.
        """
        if sampler is not None and budget != 1024:
            raise ValueError("Expected either a budget or a sampler, got both. Give the budget to the sampler.")
        _checks.whole(n_data, "n_data", otherwise="None for those that are seen")
        previous = None if override else self.fitted
        if previous is not None:
            noise.check_profile(self.sigma_noise, self._noise_profile, self.n_outputs)
        if mc_samples == "auto":
            mc_samples = self._backend_settings.get("mc_samples", "auto")
        curvature = curvature or self._backend_settings.get("curvature", "ggn")
        structure = self._structure(structure)
        # As laplace-torch has it: the diagonal is that of the reduced features, other curvature that of the model.
        reduction = self.feature_reduction if self.hessian_structure == "diag" else None
        sampler = sampler or default_sampler(budget, structure, curvature)
        dataset_size = _data.dataset_length(train_loader)
        fitted = fit(
            Snapshot(self.model, self._trainable), train_loader,
            noise.with_noise(self.output_likelihood, self.sigma_noise), structure=structure, indices=self._indices,
            parameters=None if self._indices is not None else self._names or "last_layer",
            sampler=sampler, split=split, estimator=estimator, mc_samples=mc_samples,
            curvature=curvature, separate_bias=self._separates_bias, feature_reduction=reduction,
            generator=self.seed if generator is None else generator, chunk_size=chunk_size,
            targets_key=self.dict_key_y, progress_bar=progress_bar, previous=previous, checkpoint=checkpoint,
            max_batches=max_batches, n_data=n_data,
        )  # fmt: skip
        added = fitted.n_seen - (0 if previous is None else previous.n_seen)
        if self.feature_reduction is not None and reduction is None:
            few = None if fitted.sample is None else fitted.sample.data.inputs
            fitted = replace(fitted, network=fitted.network.reduced(self.feature_reduction, few))
        self._adopt(fitted, noise.profile(self.sigma_noise))
        if n_data is None and dataset_size is not None and dataset_size != added:
            logger.warning(
                "The loader gave %d data, its dataset says that it has %d: the posterior is that of %d data. "
                "Set n_data if the training set has another size.",
                added, dataset_size, added,
            )  # fmt: skip
        self._check_reduction()

    def _check_reduction(self) -> None:
        """Warn the caller of the caller if outputs were not those of the reduced features."""
        network = self.network
        if network.reduction_error > torch.finfo(network.dtype).eps ** 0.5:
            warnings.warn(
                f"The model's outputs are not its last layer of features reduced by {self.feature_reduction!r}: they "
                f"differ by {network.reduction_error:.2g} of the largest. Variances are those of the reduced features, "
                "as in laplace-torch. Leave feature_reduction out for those of the model itself (padded sequences "
                "are the usual cause).",
                stacklevel=3,
            )
            network.reduction_error = 0.0  # once for a fit, and once for a prediction

    def _structure(self, structure: Structure | None) -> Structure:
        kind = STRUCTURES[self.hessian_structure]
        if structure is None:
            return kind()
        if not isinstance(structure, kind):
            raise ValueError(
                f"Expected a structure {kind.__name__}(...) with hessian_structure={self.hessian_structure!r}, got "
                f"{structure!r}. Choose another hessian_structure."
            )
        return structure

    def _adopt(self, fitted: Fit, profile: Tensor | None) -> None:
        """Take over a fit, if the settings go with it; otherwise nothing changes."""
        network = fitted.network
        self._core_prior(self.prior_precision, fitted)
        n_chosen = network.n_params if network.free is None else int(network.free.sum())
        if self.prior_mean.ndim == 1 and len(self.prior_mean) not in (1, n_chosen):
            raise ValueError(
                f"Expected a prior mean for each of the {n_chosen} parameters, got {len(self.prior_mean)}."
            )
        self.fitted = fitted
        self._noise_profile = profile
        self._posterior = self._draws = None
        self._told_what_is_left_out = False
        self._choose(list(network.shapes))
        self.mean = restrict(fitted.posterior.mean, network.free)
        if self.subset_of_weights == "subnetwork":
            self.mean = self.assemble_full_samples(self.mean[None])[0]
        self.n_data = fitted.posterior.n_data
        self.n_outputs = network.n_outputs
        self.loss = torch.tensor(fitted.mean_loss * self.n_data, device=self._device, dtype=self._float_dtype)

    @property
    def posterior(self) -> Posterior:
        """The posterior with the current prior precision, prior mean, noise and temperature."""
        fitted = self._require_fit()
        settings = _Settings(fitted, self.temperature, (self.prior_precision, self.prior_mean, self.sigma_noise))
        kept = self._posterior  # another thread may replace it
        if kept is not None and kept[0] == settings:
            return kept[1]
        several = self.prior_mean.ndim == 1 and len(self.prior_mean) > 1
        posterior = replace(
            fitted.posterior,
            prior_precision=self._core_prior(self.prior_precision, fitted).double(),
            prior_mean=embed(self.prior_mean, fitted.network.free) if several else self.prior_mean,
            temperature=self.temperature,
            noise_variance=noise.level(self.sigma_noise).square(),
        )
        self._posterior = (settings, posterior) if settings.constant else None
        return posterior

    @property
    def network(self) -> Network:
        """The model with its curvature blocks."""
        return self._require_fit().network

    def _of_the_model_of_the_fit(self, *, thorough: bool = False, stacklevel: int = 3) -> None:
        """Tell the caller's caller if the model is no longer that of the fit, which this object goes on with.

        Raises:
            ModelChangedError: If it was moved to another dtype or device.
        """
        if self.fitted is None:
            return
        self.fitted.check_model(thorough=thorough, stacklevel=stacklevel + 1)

    def _require_fit(self) -> Fit:
        if self.fitted is None:
            raise _checks.NotFittedError(
                "Expected a fitted posterior. Call fit(train_loader) or load_state_dict first."
            )
        return self.fitted

    def _check_H_init(self) -> None:
        self._require_fit()

    def coverage(self) -> str:
        """A table of what curvature every trainable parameter got."""
        fitted = self._require_fit()
        network, basis = fitted.network, fitted.posterior.basis
        rows, total = [("block", "parameters", "curvature", "size", "")], 0
        for part, members in zip(basis.parts, basis.members, strict=True):
            blocks = [network.blocks[index] for index in members]
            first, kind = blocks[0], blocks[0].kind
            shape = f"{first.inputs} x {first.outputs}" if kind == "kronecker" else f"dense {first.size}"
            if first.groups > 1:
                shape = f"{first.groups} groups of {shape}"
            if isinstance(part, IdentityBasis):
                kind, shape = "prior alone" if self.hessian_structure == "isotropic" else "diagonal", ""
            elif isinstance(part, DenseBasis):
                kind = "full" if part.complete else "low rank"
                shape = f"dense {part.n_params}" if part.complete else f"{part.rank} directions"
            names = ", ".join(name for block in blocks for name in block.parameters)
            masks = [network.free_entries(block) for block in blocks]
            sizes = [b.size if own is None else int(own.sum()) for b, own in zip(blocks, masks, strict=True)]
            total += sum(sizes)
            rows.append((", ".join(block.name for block in blocks), names, kind, str(sum(sizes)), shape))
        left_out = [name for name in network.snapshot.parameters if name not in network.shapes]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows
        ]
        lines.append(f"{total} of {self._n_chosen} trainable parameters covered by {len(basis.parts)} blocks.")
        if self.subset_of_weights == "last_layer":
            lines.append(f"The last layer: {', '.join(network.shapes)}.")
        if left_out:
            what = "Frozen and left out" if self.subset_of_weights == "all" else "Left out"
            lines.append(f"{what}: {', '.join(left_out)}.")
        return "\n".join(lines)

    # -- subnetworks ---------------------------------------------------------------------------

    @property
    def n_params_subnet(self) -> int:
        """Number of parameters that the posterior is about, of a subnetwork."""
        self._only_for_subnetworks("n_params_subnet")
        return int(self._n_chosen or 0)

    @property
    def mean_subnet(self) -> Tensor:
        """Their mean."""
        self._only_for_subnetworks("mean_subnet")
        fitted = self._require_fit()
        return restrict(fitted.posterior.mean, fitted.network.free)

    def assemble_full_samples(self, subnet_samples: Tensor) -> Tensor:
        """Samples of a subnetwork's parameters as samples of all parameters, the others at their trained values.

        Args:
            subnet_samples: ``[S, d]``.

        Returns:
            ``[S, D]``.
        """
        self._only_for_subnetworks("assemble_full_samples")
        trained = torch.cat([p.detach().flatten() for p in self._all_of_the_fit().values()])
        samples = trained.to(subnet_samples.dtype).repeat(len(subnet_samples), 1)
        samples[:, self._places()] = subnet_samples
        return samples

    def _places(self) -> Tensor:
        """Where in the vector of all trainable parameters the posterior's are: ``[D]``, boolean."""
        every = self._all_of_the_fit()
        if self._indices is None:
            masks = [torch.full((p.numel(),), name in (self._names or ())) for name, p in every.items()]
            return torch.cat(masks).to(self._device)
        places = torch.zeros(sum(p.numel() for p in every.values()), dtype=torch.bool)
        places[self._indices] = True
        return places.to(self._device)

    def _all_of_the_fit(self) -> dict[str, Tensor]:
        """All trainable parameters, at the fit if there was one."""
        if self.fitted is None:
            return dict(self._every(self.model))
        parameters = self.fitted.network.snapshot.parameters
        return {name: parameters[name] for name in self._trainable or ()}

    def _only_for_subnetworks(self, name: str) -> None:
        if self.subset_of_weights != "subnetwork":
            raise AttributeError(f'{name} is there for subset_of_weights="subnetwork", not {self.subset_of_weights!r}.')

    def _of_the_posterior(self, value: Tensor) -> Tensor:
        """Of all parameters those that the posterior is about."""
        if self.subset_of_weights != "subnetwork" or value.shape[-1] != self.n_params:
            return value
        return value[..., self._places().to(value.device)]


class _Settings:
    """What a posterior is made from; equal only as long as nothing was replaced or changed in place."""

    def __init__(self, fitted: Fit, temperature: float, tensors: tuple[Tensor, ...]) -> None:
        self.objects = (fitted, *tensors)
        #: Gradients need a new graph every time; inference tensors do not say whether they were changed.
        self.constant = not any(t.requires_grad or t.is_inference() for t in tensors)
        self.values = (temperature, *(t._version for t in tensors)) if self.constant else ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Settings)
            and self.constant
            and other.constant
            and self.values == other.values
            and all(a is b for a, b in zip(self.objects, other.objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]
