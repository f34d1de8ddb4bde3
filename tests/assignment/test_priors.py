# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of the assignment, against the distributions that they come from."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import (
    FixedAtoms,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    StructureError,
    fuse,
)
from pyro_fusion.assignment import AssignmentPrior
from pyro_fusion.assignment.priors import assignment_priors, check_penalty
from pyro_fusion.testing import check_assignment_prior
from tests.device import DEVICE, elsewhere

PRIORS = [
    IndianBuffetPrior(),
    IndianBuffetPrior(0.2),
    IndianBuffetPrior(None),
    GroupNormPrior(),
    GroupNormPrior(3.0),
]
PRIORS += [GroupNormPrior(ranked=True), FixedAtoms(4)]


@pytest.mark.parametrize("prior", [*PRIORS, GroupNormPrior("auto")], ids=str)
def test_contract(prior):
    check_assignment_prior(prior)


class TestIndianBuffet:
    @pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
    def test_is_the_limit_of_beta_bernoulli(self, alpha):
        # Marginal of one column of a beta-Bernoulli with K atoms, Griffiths & Ghahramani eq. 10:
        # (α/K) Γ(m + α/K) Γ(S - m + 1) / Γ(S + 1 + α/K); times K as K -> ∞ is exp(-φ).
        num_parties, k = 5, 1e9
        for m in range(1, num_parties + 1):
            a = alpha / k
            log_p = (
                math.log(alpha)
                + math.lgamma(m + a)
                + math.lgamma(num_parties - m + 1)
                - math.lgamma(num_parties + 1 + a)
            )
            phi = IndianBuffetPrior(alpha).penalty(num_parties)[m]
            assert float(phi) == pytest.approx(-log_p, abs=1e-7)

    def test_left_ordered_forms_of_one_party_add_up_to_one(self):
        # One party has K ~ Poisson(α) atoms: with 1/K! for their order the probabilities sum to 1.
        prior = IndianBuffetPrior(1.7)
        total = sum(
            math.exp(-prior.constant(1) - k * float(prior.penalty(1)[1])) / math.factorial(k)
            for k in range(60)
        )
        assert total == pytest.approx(1.0, abs=1e-12)

    def test_learned_alpha_is_the_mode(self):
        prior = IndianBuffetPrior(None, concentration=2.0, rate=0.5)
        best = prior.update(7, 4).mass
        harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4

        def density(alpha):  # Gamma(2, 0.5) times the Poisson(alpha H) of the number of atoms
            return (2 - 1 + 7) * math.log(alpha) - alpha * (0.5 + harmonic)

        assert density(best) > max(density(best * 0.999), density(best * 1.001))

    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
    def test_bad_alpha(self, alpha):
        with pytest.raises(ParameterError, match="alpha must be positive"):
            IndianBuffetPrior(alpha)

    def test_alpha_may_be_a_tensor(self):
        alpha = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        prior, number = IndianBuffetPrior(alpha), IndianBuffetPrior(1.7)
        torch.testing.assert_close(prior.penalty(4), number.penalty(4), rtol=0, atol=1e-15)
        assert prior.constant(4).item() == pytest.approx(number.constant(4), rel=1e-15)
        # Of an assignment of six parties: log density K log α - α H_S but for constants.
        popularity = torch.tensor([1, 2, 6])
        (prior.penalty(6)[popularity].sum() + prior.constant(6)).backward()
        harmonic = sum(1 / s for s in range(1, 7))
        assert float(alpha.grad) == pytest.approx(harmonic - 3 / 1.7)

    def test_a_tensor_of_any_dtype_and_of_axes_of_size_one(self):
        for alpha in (torch.tensor(2.0), torch.tensor([[2.0]]), torch.tensor(2)):
            prior = IndianBuffetPrior(alpha)
            assert prior.mass == 2.0
            assert isinstance(prior.mass, float)
            assert prior.penalty(3).dtype == torch.float64
            assert prior.constant(3).shape == ()
            assert prior == IndianBuffetPrior(2.0)
            assert hash(prior) == hash(IndianBuffetPrior(2.0))
            assert prior != IndianBuffetPrior(2.5)
            assert repr(prior).startswith("IndianBuffetPrior(alpha=tensor(2")
            assert prior.update(9, 9) is prior

    def test_fuse_takes_the_value_of_a_tensor(self):
        alpha = torch.tensor(0.5, requires_grad=True)
        prior = IndianBuffetPrior(alpha, 2.0, 3.0).calibrated(lambda: math.nan)
        assert prior == IndianBuffetPrior(0.5, 2.0, 3.0)
        assert type(prior.alpha) is float

    @pytest.mark.parametrize("alpha", [torch.tensor(-1.0), torch.tensor(math.nan)])
    def test_bad_tensor(self, alpha):
        with pytest.raises(ParameterError, match="alpha must be positive"):
            IndianBuffetPrior(alpha)
        with (
            pyro.validation_enabled(False),
            pytest.raises(ParameterError, match="must be positive"),
        ):
            IndianBuffetPrior(alpha)

    def test_a_tensor_elsewhere_is_checked_when_it_is_read(self):
        with elsewhere() as reads:
            alpha = torch.tensor(-1.0).to(DEVICE)
            reads.clear()
            prior = IndianBuffetPrior(alpha)
            assert reads == []
            with pytest.raises(ParameterError, match="alpha must be positive"):
                prior.calibrated(lambda: math.nan)

    def test_a_tensor_of_several_alphas(self):
        """Of as many particles."""
        alpha = torch.tensor([[0.5], [2.0]])
        prior = IndianBuffetPrior(alpha)
        assert prior.penalty(4).shape == (2, 1, 5) and prior.constant(4).shape == (2, 1)
        for a, row, constant in zip(alpha, prior.penalty(4), prior.constant(4), strict=True):
            one = IndianBuffetPrior(float(a))
            torch.testing.assert_close(row[0], one.penalty(4))
            assert float(constant) == pytest.approx(one.constant(4))
        with pytest.raises(ParameterError, match=r"a number, got a tensor of shape \(2, 1\)"):
            prior.calibrated(lambda: math.nan)

    def test_bad_hyperprior(self):
        with pytest.raises(ParameterError, match="concentration >= 1"):
            IndianBuffetPrior(None, concentration=0.5)


def test_group_norm_is_the_norm_of_integral_columns():
    p = torch.zeros(5, 3, dtype=torch.float64)  # parties by components, one atom
    for m in range(4):
        if m:
            p[m, m - 1] = 1
        assert float(GroupNormPrior(2.5).penalty(5)[m]) == pytest.approx(2.5 * float(p.norm()))


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_bad_scale(scale):
    with pytest.raises(ParameterError, match="scale must be non-negative"):
        GroupNormPrior(scale)


@pytest.mark.parametrize("num_atoms", [0, -2, 2.5, True])
def test_bad_num_atoms(num_atoms):
    with pytest.raises(ParameterError, match="num_atoms"):
        FixedAtoms(num_atoms)


class TestCalibration:
    def test_the_papers_scale_is_half_the_standard_deviation(self):
        assert GroupNormPrior("auto").calibrated(lambda: 7.0) == GroupNormPrior(3.5)
        assert GroupNormPrior("auto", ranked=True).calibrated(lambda: 7.0) == GroupNormPrior(
            3.5, ranked=True
        )

    @pytest.mark.parametrize("prior", PRIORS, ids=str)
    def test_what_is_given_stays(self, prior):
        def fail():
            raise AssertionError("not needed")

        assert prior.calibrated(fail) is prior

    def test_an_unknown_scale_is_an_error_that_says_where_it_comes_from(self):
        with pytest.raises(ParameterError, match="`fuse` finds it"):
            GroupNormPrior("auto").penalty(3)
        with pytest.raises(ParameterError, match="non-negative and finite, or 'auto', got 'half'"):
            GroupNormPrior("half")

    def test_rank_weights_are_those_of_the_paper(self):
        weights = GroupNormPrior(ranked=True).rank_weights(6, 3)
        assert weights.tolist() == pytest.approx([max(0, rank - 3) ** 0.5 for rank in range(1, 7)])
        for prior in (GroupNormPrior(), IndianBuffetPrior(), FixedAtoms(3)):
            assert prior.rank_weights(4, 2).tolist() == [1.0] * 4


class TestOneForEachLabel:
    def test_given_and_default(self):
        given = {"b": FixedAtoms(3)}
        assert assignment_priors(given, ["a", "b"], GroupNormPrior()) == {
            "a": GroupNormPrior(),
            "b": FixedAtoms(3),
        }
        default = IndianBuffetPrior()
        assert assignment_priors(given, ["a", "b"], default)["a"] is default
        assert assignment_priors(None, ["a"], default) == {"a": default}
        all_alike = assignment_priors(GroupNormPrior(2.0), ["a", "b"], default)
        assert all_alike["b"] == GroupNormPrior(2.0)

    def test_errors(self):
        with pytest.raises(StructureError, match=r"labels \['c'\]; the labels are \['a', 'b'\]"):
            assignment_priors({"c": GroupNormPrior()}, ["a", "b"], GroupNormPrior())
        for wrong in ("buffet", {"a": 3}, 0):
            with pytest.raises(ParameterError, match="prior must be"):
                assignment_priors(wrong, ["a"], GroupNormPrior())


class Own(AssignmentPrior):
    def __init__(self, phi):
        self.phi = phi

    def penalty(self, num_parties):
        return self.phi


class TestOfYourOwn:
    def test_a_right_penalty(self):
        check_penalty(Own(torch.tensor([0.0, 1.0, 1.5]).double()), 2)

    @pytest.mark.parametrize(
        ("phi", "got"),
        [
            (torch.tensor([0.0, 1.0]).double(), r"torch.float64 \[2\]: \[0, 1\]"),
            (torch.tensor([0.0, 1.0, 1.5]), r"torch.float32 \[3\]"),
            (torch.tensor([1.0, 2.0, 2.5]).double(), r"\[1, 2, 2.5\]"),
            (torch.tensor([0.0, math.nan, 1.5]).double(), r"\[0, nan, 1.5\]"),
            (torch.tensor([0.0, math.inf, 1.5]).double(), r"\[0, inf, 1.5\]"),
            ([0.0, 1.0, 1.5], r"\[0.0, 1.0, 1.5\]"),
        ],
    )
    def test_a_wrong_penalty(self, phi, got):
        parties = [
            Posterior({"x": dist.Normal(torch.tensor([0.0, 4.0 + s]), 1.0)}, {"x": "component"})
            for s in range(2)
        ]
        message = rf"^Own\(phi=.*\).penalty\(2\) must be .* torch.float64 \[3\], got .*{got}"
        for use in (fuse, FusionModel):
            with pytest.raises(ParameterError, match=f"(?s){message}.*check_assignment_prior"):
                use(parties, assignment_prior=Own(phi))

    def test_its_settings_are_shown(self):
        assert repr(Own(2)) == str(Own(2)) == "Own(phi=2)"
        assert repr(FixedAtoms(3)) == "FixedAtoms(num_atoms=3)"

    def test_a_class_is_none(self):
        with pytest.raises(ParameterError, match="instance of an AssignmentPrior of your own, got"):
            assignment_priors(Own, ["a"], GroupNormPrior())


def test_tables_have_what_is_in_use():
    assert str(GroupNormPrior()) == "GroupNormPrior(scale=1.707)"
    assert str(GroupNormPrior("auto", ranked=True)) == "GroupNormPrior(scale=auto, ranked=True)"
    assert str(IndianBuffetPrior(2.0)) == "IndianBuffetPrior(alpha=2)"
    # The mode of Gamma(1 + 3, 1 + 1.5).
    assert str(IndianBuffetPrior().update(3, 2)) == "IndianBuffetPrior(alpha=1.2, learned)"
    assert str(IndianBuffetPrior(torch.tensor(0.5))) == "IndianBuffetPrior(alpha=0.5)"
    assert "tensor" in str(IndianBuffetPrior(torch.tensor([0.5, 1.0])))
