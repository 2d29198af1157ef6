"""The prior alone as posterior: what every curvature is compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from debiased_laplace import DebiasedLaplace, Gaussian, Isotropic
from debiased_laplace.fitting.fit import fit
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.testing import dense_jacobian
from tests.networks import ZOO
from tests.tolerances import assert_equal


@pytest.mark.parametrize("name", sorted(ZOO))
def test_covariances_are_j_jt_over_delta_and_nothing_is_back_propagated(name, monkeypatch):
    case, value = ZOO[name], 0.3
    model, inputs = case.model(), case.inputs(4)
    with monkeypatch.context() as patched:
        patched.setattr(CurvatureData, "__iter__", lambda _: 1 / 0)
        fitted = fit(
            model, [(inputs, torch.ones(4, case.n_outputs).double())], Gaussian(), structure=Isotropic(),
            prior_precision=value,
        )  # fmt: skip
    assert not fitted.posterior.curvatures.any()
    covariances = functional_moments(fitted.network, fitted.posterior, inputs[:2])[1]
    jacobians = dense_jacobian(model, inputs[:2])
    assert_equal(covariances, jacobians @ jacobians.mT / value)


def test_the_data_and_their_number_have_no_part_in_it(tmp_path):
    case = ZOO["mlp"]
    model, found = case.model(), []
    for n in (3, 9):
        la = DebiasedLaplace(model, "classification", hessian_structure="isotropic", prior_precision=2.0)
        la.fit([(case.inputs(n, seed=n), torch.arange(n) % 2)])
        la.save(tmp_path / "posterior.safetensors")
        found.append(DebiasedLaplace.load(tmp_path / "posterior.safetensors", model)(case.inputs(5)))
        assert_equal(la.posterior_precision, torch.full((la.n_params,), 2.0, dtype=torch.float64))
        assert la.coverage().splitlines()[1].split()[-3:-1] == ["prior", "alone"]
    assert torch.equal(*found)


def test_its_prior_precision_is_tuned_as_that_of_all_others():
    case = ZOO["mlp"]
    la = DebiasedLaplace(case.model(), "classification", hessian_structure="isotropic")
    batch = case.inputs(40), torch.arange(40) % 2
    la.fit([batch], budget=1)
    arguments = {"val_loader": [batch], "grid_size": 7, "log_prior_prec_min": -1, "log_prior_prec_max": 5}
    with pytest.warns(UserWarning, match="all from 1 to the end of the grid are equally good"):
        la.optimize_prior_precision(method="gridsearch", link_approx="mean_field", tune_temperature=True, **arguments)
    prior = replace(la.posterior, n_data=10**6)
    both = functional_moments(la.network, [prior, la.posterior], batch[0])[1]
    assert_equal(both[0], both[1])
