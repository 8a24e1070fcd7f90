"""Losses of recovery training: finite differences, what each reduces to, what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from torch import Tensor

from calib.tuning import losses

few = settings(max_examples=30, deadline=None)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = drawn(2, 5, 7, scale=2.0), drawn(2, 5, 7, seed=1, scale=2.0)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
F_S, F_T = (F.normalize(drawn(6, 4, seed=seed), dim=-1) for seed in (2, 3))


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: losses.cross_entropy(s, torch.tensor([[0, 1, 2, -100, 3], [4, -100, 5, 6, 0]])),
        lambda s: losses.kd(s, TEACHER, MASK, temperature=2.0),
        lambda s: losses.hidden_mse([s, 2 * s], [TEACHER, STUDENT], MASK),
        lambda s: losses.attention_mse([s[:, :, None].transpose(1, 2)], [TEACHER[:, None]], MASK),
        lambda s: losses.contrastive(losses.pooled(s, MASK), losses.pooled(TEACHER, MASK)),
    ],
    ids=["cross-entropy", "kd", "hidden", "attention", "contrastive"],
)
def test_gradients_match_finite_differences(loss) -> None:  # type: ignore[no-untyped-def]
    assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


def test_weighed_losses_match_finite_differences_of_their_weights_held() -> None:
    """The weights have no gradient: the surrogate is the loss with the weights of where it stands."""
    held = losses.dad_weights(STUDENT, TEACHER, MASK, gamma=0.7)
    student = STUDENT.clone().requires_grad_()

    def surrogate(s: Tensor) -> Tensor:
        return losses.masked_mean(held * losses.token_kl(s, TEACHER), MASK)

    assert torch.autograd.gradcheck(surrogate, student)
    (want,) = torch.autograd.grad(surrogate(student), student)
    (got,) = torch.autograd.grad(losses.dad(student, TEACHER, MASK, gamma=0.7), student)
    assert torch.allclose(got, want, atol=1e-14)

    similarity = (F_S @ F_T.T).numpy()
    wrong = np.where(np.eye(6, dtype=bool), -np.inf, similarity / 0.3)
    log_weights = torch.from_numpy(np.where(np.eye(6, dtype=bool), 0.0, np.log(5 * softmax(wrong, 1) + 1e-300)))

    def sample_losses(f: Tensor) -> Tensor:
        scores = f @ F_T.T / 0.1
        return torch.logsumexp(scores + log_weights, 1) - scores.diagonal()

    sample_weights = sample_losses(F_S).div(0.4).softmax(0)
    features = F_S.clone().requires_grad_()

    def weighed(f: Tensor) -> Tensor:
        return (sample_weights * sample_losses(f)).sum()

    assert torch.autograd.gradcheck(weighed, features)
    made = losses.contrastive(features, F_T, 0.1, hardness=0.3, focus=0.4)
    assert float(made.detach()) == pytest.approx(float(weighed(F_S)), rel=1e-12)
    (want,) = torch.autograd.grad(weighed(features), features)
    (got,) = torch.autograd.grad(made, features)
    assert torch.allclose(got, want, atol=1e-12)


def test_kd_is_the_divergence_and_zero_of_equals() -> None:
    p, q = softmax(TEACHER.numpy() / 2, -1), softmax(STUDENT.numpy() / 2, -1)
    want = 4 * (p * np.log(p / q)).sum(-1)[MASK.bool().numpy()].mean()
    assert float(losses.kd(STUDENT, TEACHER, MASK, temperature=2.0)) == pytest.approx(want, rel=1e-12)
    assert float(losses.kd(STUDENT, STUDENT)) == pytest.approx(0, abs=1e-15)


@few
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_dad_without_gamma_is_kd_to_the_bit(seed: int, dtype: torch.dtype, masked: bool) -> None:
    s, t = (drawn(3, 5, 11, seed=seed + i, scale=3.0).to(dtype).requires_grad_() for i in range(2))
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.7 if masked else None
    if mask is not None:
        mask[0, 0] = True
    a, b = losses.dad(s, t, mask, gamma=0.0), losses.kd(s, t, mask)
    assert torch.equal(a, b)
    (grad_a,), (grad_b,) = torch.autograd.grad(a, s), torch.autograd.grad(b, s)
    assert torch.equal(grad_a, grad_b)


def test_dad_weighs_uncertain_tokens_more_and_none_too_much() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    weights = losses.dad_weights(logits, logits, gamma=1.0)
    assert weights[0] > weights[1] > weights[2] and float(weights.mean()) == pytest.approx(1.0)
    half, entropies = losses.dad_weights(logits, logits, gamma=0.5), []
    for row in logits.double().numpy():
        p = softmax(row)
        entropies.append(-(p * np.log(p)).sum() / math.log(3))
    assert np.allclose(half.numpy(), np.array(entropies) / np.mean(entropies), rtol=1e-9)
    one = torch.cat([logits[:1], logits[2:].repeat(40, 1) * 5])
    assert float(losses.dad_weights(one, one).max()) == losses.LARGEST_WEIGHT
    with_padding = losses.dad_weights(torch.cat([logits, logits]), torch.cat([logits, logits]), torch.arange(6) < 3)
    assert torch.equal(with_padding[:3], weights), "padding weighs nothing"


@few
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_contrastive_with_even_weights_is_infonce(seed: int, n: int) -> None:
    s, t = (F.normalize(drawn(n, 5, seed=seed + i).float(), dim=-1) for i in range(2))
    scores = s @ t.T / 0.1
    assert torch.equal(losses.contrastive(s, t), F.cross_entropy(scores, torch.arange(n), reduction="none").mean())
    plain = scores.double().numpy()
    assert float(losses.contrastive(s, t)) == pytest.approx(
        float(np.mean(logsumexp(plain, 1) - np.diag(plain))), abs=1e-5
    )
    assert torch.allclose(losses.contrastive(s, t, hardness=1e7, focus=1e7), losses.contrastive(s, t), atol=1e-5)


@few
@given(st.integers(0, 10**6), st.integers(3, 9))
def test_contrastive_does_not_know_an_order_and_favours_the_hard(seed: int, n: int) -> None:
    s, t = (F.normalize(drawn(n, 5, seed=seed + i), dim=-1) for i in range(2))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    plain = losses.contrastive(s, t)
    for hardness, focus in ((None, None), (0.5, None), (0.5, 0.5)):
        made = losses.contrastive(s, t, hardness=hardness, focus=focus)
        assert float(losses.contrastive(s[order], t[order], hardness=hardness, focus=focus)) == pytest.approx(
            float(made), rel=1e-10
        )
        assert float(made) >= float(plain) - 1e-9, "close wrong pairs and hard samples count more"


def test_a_batch_of_one_warns_and_gives_nothing() -> None:
    student = F_S[:1].clone().requires_grad_()
    with pytest.warns(UserWarning, match="batch of two"):
        loss = losses.contrastive(student, F_T[:1], hardness=0.5, focus=0.5)
    loss.backward()
    assert float(loss.detach()) == 0 and student.grad is not None and not student.grad.any()


def test_equal_features_have_a_finite_bound_above_zero() -> None:
    assert 0 < float(losses.contrastive(F_T, F_T)) < math.log(6)


def test_padding_does_not_enter_a_pooled_state() -> None:
    hidden = drawn(2, 5, 4)
    changed = hidden.clone()
    changed[1, 2:] = 99.0
    assert torch.equal(losses.pooled(hidden, MASK), losses.pooled(changed, MASK))
    assert torch.allclose(losses.pooled(hidden).norm(dim=-1), torch.ones(2, dtype=torch.float64))


def test_hidden_and_attention_terms_are_means_over_real_tokens() -> None:
    s, t = STUDENT.numpy(), TEACHER.numpy()
    rows = ((s - t) ** 2).mean(-1)[MASK.bool().numpy()].mean()
    assert float(losses.hidden_mse([STUDENT, STUDENT], [TEACHER, TEACHER], MASK)) == pytest.approx(2 * rows)
    a, b = drawn(2, 3, 5, 5), drawn(2, 3, 5, 5, seed=9)
    want = ((a - b).numpy() ** 2).mean((1, 3))[MASK.bool().numpy()].mean()
    assert float(losses.attention_mse([a], [b], MASK)) == pytest.approx(want)
