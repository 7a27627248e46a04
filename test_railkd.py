# SPDX-License-Identifier: MIT
"""Tests of railkd.py: no network, no GPU, no download. Each docstring names the mistake that the test would catch."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import railkd as R

torch.set_num_threads(1)                                 # tiny models only; it also keeps the sums in one order
os.environ.setdefault("OMP_NUM_THREADS", "1")            # the same for what the tests start
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared" / "hub"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the GLUE clones in ../shared/hub")
B, M, N, D_S, D_T = 6, 3, 7, 10, 14                      # batch, slots, teacher blocks, widths


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_numpy(linear, x):
    y = x @ linear.weight.detach().double().numpy().T
    return y if linear.bias is None else y + linear.bias.detach().double().numpy()


def pooled(k=M, d_s=D_S, d_t=D_T, seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, M, d_s, generator=g), torch.randn(batch, k, d_t, generator=g)


# ----------------------------------------------------------------------------------------------- pooling and draw

def test_mean_pool_is_the_mean_of_the_tokens():
    """Catches padding averaged in, a sum for a mean, a mean over the wrong axis."""
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
    for b in range(3):
        tokens = [hidden[b, i].numpy() for i in range(5) if mask[b, i]]
        assert np.allclose(R.mean_pool(hidden, mask)[b], sum(tokens) / len(tokens), atol=1e-6)


def test_padding_never_matters():
    """Catches multiplying by the mask, which keeps NaN, in the value and in the gradient."""
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    dirty = hidden.masked_fill(~mask.bool()[..., None], math.nan).requires_grad_()
    result = R.mean_pool(dirty, mask)
    assert torch.equal(result, R.mean_pool(hidden, mask)) and torch.equal(result[1], torch.zeros(3))
    result.sum().backward()
    assert dirty.grad.isfinite().all() and dirty.grad[~mask.bool()].abs().sum() == 0


def test_pooling_is_in_32_bits():
    """Catches a sum of many half-precision values, which overflows at 65,504."""
    hidden = torch.full((1, 100, 2), 1000.0, dtype=torch.float16)
    result = R.mean_pool(hidden, torch.ones(1, 100))
    assert result.dtype == torch.float32 and torch.allclose(result, torch.full((1, 2), 1000.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert R.mean_pool(hidden.bfloat16(), torch.ones(1, 100)).dtype == torch.float32


def test_first_token_is_the_first_that_is_no_padding():
    """Catches hidden[:, 0] where the padding is on the left."""
    hidden = torch.randn(2, 3, 4)
    result = R.first_token(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert torch.allclose(result, torch.stack([hidden[0, 0], hidden[1, 1]]))


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4), (2, 3, 1))])
def test_pooling_names_both_shapes(shapes):
    with pytest.raises(ValueError) as error:
        R.mean_pool(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    assert all(str([*shape]) in str(error.value) for shape in shapes)


def test_draw_covers_every_layer_and_every_pair_equally():
    """Catches a biased draw, layer 0 or the last layer drawn, an unsorted draw, drawing with replacement."""
    draws = [R.sample_layers(N, M, seed, epoch) for seed in range(40) for epoch in range(100)]
    assert all(draw == sorted(set(draw)) and len(draw) == M and {*draw} <= {*range(1, N)} for draw in draws)
    for size in (1, 2, 3):                               # layers, pairs, whole subsets
        chance = math.comb(N - 1 - size, M - size) / math.comb(N - 1, M)
        slack = 4.5 * math.sqrt(chance * (1 - chance) / len(draws))
        for subset in itertools.combinations(range(1, N), size):
            assert abs(sum({*subset} <= {*draw} for draw in draws) / len(draws) - chance) < slack


def test_draw_depends_on_its_arguments_alone():
    """Catches a draw from a global generator, an epoch or a seed that is ignored."""
    random.seed(1), torch.manual_seed(1), np.random.seed(1)
    first, states = R.sample_layers(12, 5, 3, 4), (random.getstate(), torch.get_rng_state())
    random.seed(2), torch.manual_seed(2), np.random.seed(2)
    assert R.sample_layers(12, 5, 3, 4) == first
    random.setstate(states[0]), torch.set_rng_state(states[1])
    R.sample_layers(12, 5, 3, 4), R.select_layers("permuted", 12, 5, 3, 4)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert len({tuple(R.sample_layers(12, 5, 3, e)) for e in range(20)}) > 10
    assert len({tuple(R.sample_layers(12, 5, s, 4)) for s in range(20)}) > 10


@pytest.mark.parametrize("num_layers, k", [(6, 6), (6, 0), (1, 1)])
def test_impossible_draw_names_both_numbers(num_layers, k):
    with pytest.raises(ValueError, match=rf"k = {k}\b.*num_layers = {num_layers}\b"):
        R.sample_layers(num_layers, k, 0, 0)
    with pytest.raises(ValueError):
        R.select_layers("skip", num_layers, k)


def test_selections_are_the_published_ones():
    """Catches an off-by-one layer; the paper's own table for BERT-12 and RoBERTa-24."""
    expected = {"skip": [2, 4, 6, 8, 10], "last": [7, 8, 9, 10, 11], "reverse": [10, 8, 6, 4, 2], "middle": [6] * 5,
                "all": [*range(1, 12)], "random": R.sample_layers(12, 5, 3, 1)}
    for name, layers in expected.items():
        assert R.select_layers(name, 12, 5, 3, 1) == layers
    assert R.select_layers("skip", 24, 5) == [4, 8, 12, 16, 20]
    assert R.select_layers("final", 12, 1, 3, 1) == [12]
    orders = [R.select_layers("permuted", 12, 5, seed, epoch) for seed in range(9) for epoch in (0, 1, 7)]
    assert all(sorted(order) == expected["skip"] for order in orders) and len({*map(tuple, orders)}) > 3
    assert all(orders[i] == orders[i + 1] == orders[i + 2] for i in range(0, 27, 3))       # never redrawn
    with pytest.raises(ValueError, match="unknown selection"):
        R.select_layers("best", 12, 5)


# ------------------------------------------------------------------------------------------- losses against numpy

def test_kd_loss_against_numpy():
    """Catches T^2 left out, T after the softmax, the mean over classes, student and teacher swapped."""
    s, t, temperature = np.random.RandomState(0).randn(2, 5, 3).tolist() + [3.0]
    p, q = (np.exp(np.array(x) / temperature) for x in (t, s))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = temperature ** 2 * (p * np.log(p / q)).sum() / 5
    assert np.isclose(R.kd_loss(torch.tensor(s), torch.tensor(t), temperature), expected, atol=1e-6)
    assert np.isclose(R.kd_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [0.0]]), temperature), (9 + 4) / 2)


def test_kd_loss_pulls_the_student_alone():
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    R.kd_loss(s, t, 2.0).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    assert R.kd_loss(s.bfloat16(), t.bfloat16(), 2.0).dtype == torch.float32
    for bad in [(s, t[:, :2], 2.0), (s, t, 0.0), (s[0], t[0], 2.0)]:
        with pytest.raises(ValueError):
            R.kd_loss(*bad)


@pytest.mark.parametrize("classes", [4, 1])
def test_annealed_logits(classes):
    """Catches phi upside down or off by one, KL where the squared error stands, a teacher with a gradient."""
    s, t = (torch.randn(B, classes, requires_grad=True) for _ in "st")
    for temperature, phi in ((1.0, 1.0), (4.0, 4 / 7), (7.0, 1 / 7)):
        expected = np.mean((s.detach().numpy() - phi * t.detach().numpy()) ** 2)
        assert R.kd_loss(s, t, temperature, max_temperature=7.0).item() == pytest.approx(expected, rel=1e-5)
    R.kd_loss(s, t, 3.0, 7.0).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_mixup_is_near_both_texts():
    """Catches the shares swapped, a batch that is not reversed, clean states with a gradient, a missing normalise."""
    mixed, clean = (torch.randn(B, 2, D_S, requires_grad=True) for _ in "mc")
    loss, (m, c), expected = R.mixup_loss(mixed, clean, 0.7), (unit(x.detach().double().numpy()) for x in (mixed, clean)), 0.0
    for b in range(B):
        for i in range(2):
            expected += (0.7 * ((m[b, i] - c[b, i]) ** 2).sum() + 0.3 * ((m[b, i] - c[B - 1 - b, i]) ** 2).sum()) / B / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert clean.grad is None and mixed.grad.abs().sum() > 0


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layerwise_is_equation_2(shared, bias):
    """Catches a missing normalise, the mean over slots or widths, alpha ignored, slots mixed up."""
    alpha = [0.5, 1.0, 2.0]
    distance = R.LayerwiseDistance(D_S, D_T, M, proj_dim=8, shared=shared, bias=bias, alpha=alpha, start="random")
    s, t = pooled()
    maps_s, maps_t = ([x] * M if shared else x for x in (distance.proj_s, distance.proj_t))
    expected = 0.0
    for b in range(B):
        for i in range(M):
            z_s, z_t = (to_numpy(maps[i], x[b, i].double().numpy()) for maps, x in ((maps_s, s), (maps_t, t)))
            expected += alpha[i] * sum((z_t / np.linalg.norm(z_t) - z_s / np.linalg.norm(z_s)) ** 2) / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


def test_concat_is_equation_3():
    """Catches normalising each slot, concatenating over the batch, a sum of m terms."""
    distance = R.ConcatDistance(D_S, D_T, M, proj_dim=8, start="random")
    s, t = pooled()
    z_s, z_t = (unit(to_numpy(linear, x.reshape(B, -1).double().numpy()))
                for linear, x in ((distance.proj_s, s), (distance.proj_t, t)))
    assert np.isclose(distance(s, t).item(), ((z_s - z_t) ** 2).sum() / B, atol=1e-5)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_direct_is_pkd(d_s):
    """Catches the author code's element mean, a map where the widths are equal."""
    distance = R.DirectDistance(d_s, D_T, M, start="random")
    s, t = pooled(d_s=d_s)
    z = s.double().numpy()
    if d_s == D_T:
        assert distance.proj_s is None and not [*distance.parameters()]
    else:
        z = np.stack([to_numpy(distance.proj_s[i], z[:, i]) for i in range(M)], 1)
    assert np.isclose(distance(s, t).item(), ((unit(z) - unit(t.double().numpy())) ** 2).sum() / B, atol=1e-5)


def test_group_is_ckd():
    """Catches groups that are not contiguous or whose sizes differ by more than one."""
    distance = R.GroupDistance(D_S, D_T, M, num_targets=8, start="random")
    s, t = pooled(k=8)
    expected = 0.0
    for i, layers in enumerate(np.array_split(np.arange(8), M)):
        target = unit(np.concatenate([t[:, layer].double().numpy() for layer in layers], -1))
        expected += ((unit(to_numpy(distance.proj_s[i], s[:, i].double().numpy())) - target) ** 2).sum() / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_attention_is_alp_kd(d_s):
    """Catches a softmax over slots instead of teacher layers, scaled products, normalised vectors."""
    distance = R.AttentionDistance(d_s, D_T, M, num_targets=6, start="random")
    s, t = pooled(k=6, d_s=d_s)
    z, t64 = s.double().numpy(), t.double().numpy()
    if d_s != D_T:
        z = np.stack([to_numpy(distance.proj_s[i], z[:, i]) for i in range(M)], 1)
    total, weights = 0.0, np.zeros((B, M, 6))
    for b, i in itertools.product(range(B), range(M)):
        e = np.exp([z[b, i] @ t64[b, k] for k in range(6)])
        weights[b, i] = e / e.sum()
        total += ((z[b, i] - sum(weights[b, i, k] * t64[b, k] for k in range(6))) ** 2).sum()
    assert np.isclose(distance(s, t).item(), total / (B * M * D_T), rtol=1e-4)
    assert np.allclose(distance.weights, weights, atol=1e-4)


def contrastive(rows=12, **options):
    torch.manual_seed(0)
    return R.ContrastiveDistance(D_S, D_T, M, rows, proj_dim=8, start="random", **options)


def test_contrastive_is_info_nce():
    """Catches a wrong anchor, no temperature, the positive missing below the line, the student's bank not used."""
    distance = contrastive(num_negatives=5).eval()
    distance.bank_labels[7] = 1                          # the one row of another label: all five negatives are it
    s, t = pooled()
    z_s, z_t = (unit(to_numpy(linear, x.reshape(B, -1).double().numpy()))
                for linear, x in ((distance.proj_s, s), (distance.proj_t, t)))
    positive, negative = (z_s * z_t).sum(1) / 0.07, z_t @ distance.bank[7].double().numpy() / 0.07
    expected = -np.mean(positive - np.log(np.exp(positive) + 5 * np.exp(negative)))
    loss = distance(s, t, index=torch.arange(B), labels=torch.zeros(B, dtype=torch.long))
    assert np.isclose(loss.item(), expected, atol=1e-4)


def test_contrastive_draws_the_right_negatives(monkeypatch):
    """Catches negatives of the own label, the own row, unseen rows; labels registered after the draw."""
    distance, seen = contrastive(), []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n, replacement: seen.append(p.clone()) or multinomial(p, n, replacement))
    s, t = pooled()
    index, labels = torch.tensor([3, 1, 4, 0, 5, 9]), torch.tensor([0, 1, 0, 1, 2, 2])
    distance(s, t, index=index, labels=labels)
    for b in range(B):                                   # the first batch: its own labels are known at once
        assert {*seen[-1][b].nonzero()[:, 0].tolist()} == {index[i].item() for i in range(B) if labels[i] != labels[b]}
    for same in (torch.zeros(B, dtype=torch.long), torch.rand(B), None):     # one label, regression, no labels
        fresh = contrastive()
        fresh(s, t, index=index, labels=same)
        assert all({*seen[-1][b].nonzero()[:, 0].tolist()} == {*range(12)} - {index[b].item()} for b in range(B))
    with pytest.raises(ValueError, match="index"):
        distance(s, t)


def test_memory_bank_is_updated_in_training_alone():
    """Catches an update in eval mode, one without momentum or without normalising, one of the wrong rows."""
    distance = contrastive()
    s, t = pooled()
    index, before = torch.tensor([3, 1, 4, 0, 5, 9]), distance.bank.clone()
    distance.eval()(s, t, index=index, labels=torch.ones(B, dtype=torch.long))
    assert torch.equal(distance.bank, before) and (distance.bank_labels == -1).all()
    distance.train()(s, t, index=index, labels=torch.ones(B, dtype=torch.long))
    z = unit(to_numpy(distance.proj_s, s.reshape(B, -1).double().numpy()))
    assert np.allclose(distance.bank[index], unit(0.5 * before[index].numpy() + 0.5 * z), atol=1e-5)
    others = [row for row in range(12) if row not in index]
    assert torch.equal(distance.bank[others], before[others]) and (distance.bank_labels[others] == -1).all()


def test_maps_are_there_where_the_width_is_the_projection_s():
    """Catches a map left out because nothing changes its width, and one for both sides where one is due."""
    for name in ("layerwise", "concat"):
        assert all(R.DISTANCES[name](8, 8, 1, proj_dim=8).get_submodule(f"proj_{x}") is not None for x in "st")
    for name in ("direct", "group", "attention"):
        assert R.DISTANCES[name](8, 8, 2).proj_s is None and R.DISTANCES[name](8, 9, 2).proj_t is None
        assert len(R.DISTANCES[name](8, 9, 2).proj_s) == 2


@pytest.mark.parametrize("make, top", [(lambda: R.LayerwiseDistance(D_T, D_T, M, shared=False), 4 * M),
                                       (lambda: R.ConcatDistance(D_T, D_T, M), 4), (lambda: R.DirectDistance(D_T, D_T, M), 4 * M)])
def test_range(make, top):
    """Equal vectors give 0, opposite ones the top of the documented range; scale does not matter."""
    torch.manual_seed(0)
    distance = make()
    distance.start, distance._ready = "random", True
    if distance.proj_t is not None:
        distance.proj_s.load_state_dict(distance.proj_t.state_dict())
        for name, p in distance.named_parameters():
            p.data.mul_("bias" not in name)
    _, t = pooled()
    assert distance(3 * t, t).item() == pytest.approx(0, abs=1e-5)
    assert distance(-3 * t, t).item() == pytest.approx(top, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the ridge start

def numpy_ridge(x, y):
    x0, y0 = x - x.mean(0), y - y.mean(0)
    weight = np.linalg.solve(x0.T @ x0 + 0.1 * np.trace(x0.T @ x0) / x.shape[1] * np.eye(x.shape[1]), x0.T @ y0).T
    return weight, y.mean(0) - weight @ x.mean(0)


def test_chances_are_those_of_the_draw():
    """Catches an off-by-one in the hypergeometric formula: compared with counting all subsets."""
    loss = R.IntermediateLoss("rail-l", M + 1, N, D_S, D_T)
    subsets, counts = [*itertools.combinations(range(1, N), M)], np.zeros((M, N - 1))
    for subset in subsets:
        for i, layer in enumerate(subset):
            counts[i, layer - 1] += 1 / len(subsets)
    assert np.allclose(loss.chances(), counts, atol=1e-6)
    assert R.IntermediateLoss("pkd-skip", 6, 12, 4, 4).chances().argmax(1).tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("shared", [True, False])
def test_ridge_start_against_numpy(shared):
    """Catches uncentred features, a penalty that depends on their scale, targets that are not normalised."""
    loss = R.IntermediateLoss("rail-l", M + 1, N, D_S, D_T, shared=shared, proj_dim=8)
    hidden_s = tuple(torch.randn(40, 5, D_S) for _ in range(M + 2))
    hidden_t = tuple(torch.randn(40, 4, D_T) for _ in range(N + 1))
    mask_s, mask_t = torch.ones(40, 5), torch.ones(40, 4)
    mask_s[:20, 3:] = 0
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loss.fit([(tuple(h[:25] for h in hidden_s), mask_s[:25], tuple(h[:25] for h in hidden_t), mask_t[:25]),
              (tuple(h[25:] for h in hidden_s), mask_s[25:], tuple(h[25:] for h in hidden_t), mask_t[25:])])
    assert torch.equal(torch.get_rng_state(), state)
    x = [R.mean_pool(hidden_s[i], mask_s).double().numpy() for i in range(1, M + 1)]
    h = [R.mean_pool(hidden_t[i], mask_t).double().numpy() for i in range(1, N)]
    maps_t, chances = loss.distance.proj_t, loss.chances().double().numpy()
    y = [sum(chances[i, j] * unit(to_numpy(maps_t if shared else maps_t[i], h[j])) for j in range(N - 1))
         for i in range(M)]
    pairs = [(loss.distance.proj_s, np.concatenate(x), np.concatenate(y))] if shared else \
        zip(loss.distance.proj_s, x, y)
    for linear, x_i, y_i in pairs:
        weight, bias = numpy_ridge(x_i, y_i)
        assert np.allclose(linear.weight.detach(), weight, atol=1e-5)
        assert np.allclose(linear.bias.detach(), bias, atol=1e-5)


def test_ridge_start_of_the_others():
    """Fixed layers: the target is the unit vector itself; groups and concatenations are fitted as such."""
    s, t = pooled(k=M, batch=30)
    direct, concat = R.DirectDistance(D_S, D_T, M), R.ConcatDistance(D_S, D_T, M, proj_dim=8)
    group = R.GroupDistance(D_S, D_T, M, num_targets=5)
    t5 = torch.randn(30, 5, D_T)
    for distance, target in ((direct, t), (concat, t), (group, t5)):
        distance.fit(s, target)
        distance(s, target)
    s, t, t5 = (x.double().numpy() for x in (s, t, t5))
    expected = [(direct.proj_s[1], s[:, 1], unit(t[:, 1])), (group.proj_s[0], s[:, 0], unit(t5[:, :2].reshape(30, -1))),
                (concat.proj_s, s.reshape(30, -1), unit(to_numpy(concat.proj_t, t.reshape(30, -1))))]
    for linear, x, y in expected:
        weight, bias = numpy_ridge(x, y)
        assert np.allclose(linear.weight.detach(), weight, atol=1e-5) and np.allclose(linear.bias.detach(), bias, atol=1e-5)


@pytest.mark.parametrize("name", R.DISTANCES)
def test_ridge_must_be_fitted_and_random_must_not(name):
    """Catches a silent start from random maps; the flag travels in the state dict."""
    options = {"num_examples": 40} if name == "contrastive" else {}
    s, t = pooled(batch=40)
    more = {"index": torch.arange(40), "labels": torch.zeros(40, dtype=torch.long)}
    distance = R.DISTANCES[name](D_S, D_T, M, **options)
    with pytest.raises(RuntimeError, match="fit"):
        distance(s, t, **more)
    loose = R.DISTANCES[name](D_S, D_T, M, start="random", **options)
    assert loose(s, t, **more).dtype == torch.float32
    before = loose(s, t, **more).item()
    distance.proj_s.load_state_dict(loose.proj_s.state_dict())
    distance.fit(s, t)
    assert name in ("contrastive", "attention") or distance(s, t, **more).item() < 0.8 * before
    copy = R.DISTANCES[name](D_S, D_T, M, **options)
    copy.load_state_dict(distance.state_dict())
    assert copy.fitted and torch.isfinite(copy(s, t, **more))
    for bad in ({"start": "ridgid"}, {"teacher_proj": "thawed"}, {"alpha": [1.0] * (M + 1)}, {"alpha": 2.0}):
        with pytest.raises(ValueError):
            R.DISTANCES[name](D_S, D_T, M, **options, **bad)


def test_fit_can_be_without_bias():
    s, t = pooled(batch=30)
    distance = R.LayerwiseDistance(D_S, D_T, M, bias=False, shared=False)
    distance.fit(s, t)
    x, y = s[:, 0].double().numpy(), unit(to_numpy(distance.proj_t[0], t[:, 0].double().numpy()))
    weight = np.linalg.solve(x.T @ x + 0.1 * np.trace(x.T @ x) / D_S * np.eye(D_S), x.T @ y).T
    assert np.allclose(distance.proj_s[0].weight.detach(), weight, atol=1e-5)


# ------------------------------------------------------------------------------------- the loss object on models

def tiny(kind, layers, width, **more):
    """A tiny random model of the kind: (model, vocabulary size)."""
    import transformers as T
    common = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * width)
    config = {
        "bert": lambda: T.BertConfig(vocab_size=60, **common), "mpnet": lambda: T.MPNetConfig(vocab_size=60, **common),
        "roberta": lambda: T.RobertaConfig(vocab_size=60, **common),
        "distilbert": lambda: T.DistilBertConfig(vocab_size=60, dim=width, n_layers=layers, n_heads=2, hidden_dim=2 * width),
        "gpt2": lambda: T.GPT2Config(vocab_size=60, n_embd=width, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0),
        "vit": lambda: T.ViTConfig(image_size=16, patch_size=4, num_channels=1, **common)}[kind]()
    torch.manual_seed(layers)
    return T.AutoModel.from_config(config).eval()


def states(model, length, batch=4, pad=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (batch, length + pad), generator=g)
    mask = torch.ones(batch, length + pad, dtype=torch.long)
    if pad:
        ids[:, length:], mask[:, length:] = 1, 0
    if model.config.model_type == "vit":
        return model(torch.randn(batch, 1, 16, 16, generator=g), output_hidden_states=True).hidden_states, None
    return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states, mask


@pytest.mark.parametrize("kind_t, kind_s", [("bert", "distilbert"), ("roberta", "bert"), ("mpnet", "roberta"),
                                            ("gpt2", "gpt2"), ("vit", "vit")])
def test_loss_works_on_every_architecture(kind_t, kind_s):
    teacher, student = tiny(kind_t, 6, 16), tiny(kind_s, 4, 12)
    loss = R.IntermediateLoss("rail-c", 4, 6, 12, 16, proj_dim=8)
    batch = (*states(student, 5), *states(teacher, 7))
    with pytest.raises(RuntimeError, match="set_epoch"):
        loss(*batch)
    loss.fit([batch])
    loss.set_epoch(1)
    value = loss(*batch)
    assert value.ndim == 0 and 0 < value < 4
    value.backward()
    assert student.get_input_embeddings() is None or any(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("method", [m for m in R.METHODS if R.METHODS[m][1]])
@pytest.mark.parametrize("widths", [(12, 16), (16, 16)])
def test_gradients_reach_all_they_should(method, widths):
    """Catches a detached student, a teacher that learns, a projection in a plain list or left out."""
    torch.manual_seed(0)
    options = {"num_examples": 8} if method == "codir" else {}
    loss = R.IntermediateLoss(method, 4, 6, *widths, **options)
    assert loss.layers_s == ([4] if method == "cr-ild" else [1, 2, 3])
    hidden_s = tuple(torch.randn(4, 5, widths[0], requires_grad=True) for _ in range(5))
    hidden_t = tuple(torch.randn(4, 7, widths[1], requires_grad=True) for _ in range(7))
    batch = (hidden_s, torch.ones(4, 5), hidden_t, torch.ones(4, 7))
    loss.fit([batch])
    loss.set_epoch(1)
    loss(*batch, index=torch.arange(4), labels=torch.tensor([0, 1, 0, 1])).backward()
    reached = [i for i, h in enumerate(hidden_s) if h.grad is not None and h.grad.abs().sum() > 0]
    assert reached == loss.layers_s
    assert all(h.grad is None for h in hidden_t)
    for name, p in loss.named_parameters():
        frozen = "proj_t" in name and method != "codir"
        assert p.requires_grad != frozen and (frozen or p.grad.abs().sum() > 0), name
    trained = R.IntermediateLoss("rail-l", 4, 6, *widths, teacher_proj="trained", start="random")
    trained.set_epoch(1)
    trained(*batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in trained.parameters())


@pytest.mark.parametrize("method", ["rail-l", "rail-c", "pkd-skip", "alp-kd", "ckd"])
def test_the_whole_loss_does_not_see_padding(method):
    """Catches a vector that depends on its batch mates."""
    teacher, student = tiny("bert", 6, 16), tiny("roberta", 4, 12)
    loss = R.IntermediateLoss(method, 4, 6, 12, 16, start="random")
    loss.set_epoch(2)
    plain = loss(*states(student, 5), *states(teacher, 7))
    ids = torch.randint(5, 60, (4, 5), generator=torch.Generator().manual_seed(0))
    padded_s = student(torch.cat([ids, torch.ones(4, 3).long()], 1), attention_mask=torch.tensor([[1] * 5 + [0] * 3] * 4),
                       output_hidden_states=True).hidden_states
    assert torch.allclose(plain, loss(padded_s, torch.tensor([[1] * 5 + [0] * 3] * 4), *states(teacher, 7)), atol=1e-5)


def test_pairing_is_what_is_computed():
    """Catches an off-by-one layer on either side: only the drawn teacher layers matter, each against its slot."""
    loss = R.IntermediateLoss("rail-l", 4, 9, 12, 12, start="random", seed=7)
    loss.set_epoch(3)
    assert loss.layers_t == R.sample_layers(9, 3, 7, 3)
    hidden_s, hidden_t = ([torch.randn(4, 5, 12) for _ in range(n + 1)] for n in (4, 9))
    mask = torch.ones(4, 5)
    before = loss(hidden_s, mask, hidden_t, mask)
    for layer in range(10):
        changed = [*hidden_t]
        changed[layer] = torch.randn(4, 5, 12)
        assert (loss(hidden_s, mask, changed, mask) != before) == (layer in loss.layers_t)
    vectors = [torch.stack([R.mean_pool(h[i], mask) for i in layers], 1)
               for h, layers in ((hidden_s, loss.layers_s), (hidden_t, loss.layers_t))]
    assert torch.equal(loss.distance(*vectors), before)
    with pytest.raises(ValueError, match=r"\[0\] is the embedding output"):
        loss(hidden_s[1:], mask, hidden_t, mask)
    with pytest.raises(ValueError, match=r"\[0\] is the embedding output"):
        loss(hidden_s, mask, hidden_t[:-1], mask)
    with pytest.raises(ValueError):
        loss([h[..., :5] for h in hidden_s], mask, hidden_t, mask)


def test_values_stay_in_32_bits_under_autocast():
    """Catches F.normalize of 16-bit values."""
    s, t = pooled()
    for name in ("layerwise", "concat", "direct", "group", "attention"):
        distance = R.DISTANCES[name](D_S, D_T, M, start="random")
        expected = distance(s, t)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(distance(s, t), expected)
            assert distance(s.bfloat16(), t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("select, distance", [*itertools.product(R.SELECTIONS, R.DISTANCES)])
def test_any_selection_goes_with_any_distance(select, distance):
    """Catches a method known by name; layerwise and direct need one layer for each slot and say so."""
    options = {"num_examples": 8} if distance == "contrastive" else {}
    make = lambda: R.IntermediateLoss("kd", 4, 9, 12, 16, select=select, distance=distance, start="random", **options)
    if select == "all" and distance in ("layerwise", "direct"):
        with pytest.raises(ValueError, match="slots|width"):
            make()
        return
    loss = make()
    loss.set_epoch(0)
    hidden_s, hidden_t = ([torch.randn(4, 5, d) for _ in range(n + 1)] for n, d in ((4, 12), (9, 16)))
    assert torch.isfinite(loss(hidden_s, None, hidden_t, None, index=torch.arange(4)))


def test_names_are_checked():
    for bad in (("rail", {}), ("none", {}), ("kd", {"select": "random"}), ("rail-c", {"distance": "far"})):
        with pytest.raises(ValueError):
            R.IntermediateLoss(bad[0], 4, 9, 12, 16, **bad[1])
    with pytest.raises(ValueError, match="cannot draw"):
        R.IntermediateLoss("rail-c", 6, 5, 12, 16)       # a student deeper than its teacher


def test_collapse_is_seen():
    """Catches a spread that does not fall, a cosine that counts an example against itself."""
    alike, apart = torch.ones(50, 8) + 1e-3 * torch.randn(50, 8), torch.randn(50, 8)

    def watch(states, mapped=None):
        student = Namespace(map=lambda split, rows, pool, layers: (None, states[rows][:, None]), blocks=2, encode=id)
        data = Namespace(dev=["validation"], watched=torch.arange(len(states)))
        distance = Namespace(proj_s=1, project=lambda pooled_s, pooled_t: (mapped, mapped[:1]))
        ild = mapped and Namespace(pool_tokens=None, layers_s=[1], layers_t=[1], distance=distance)
        return R.watch(student, {"validation": lambda rows, layers: (None, None)}, ild, data)[0]
    u = unit(apart.double().numpy())
    expected = np.mean([u[i] @ u[j] for i in range(50) for j in range(50) if i != j])
    assert watch(apart)["cosine_s"] == pytest.approx(expected, abs=1e-6) and watch(alike)["cosine_s"] > 0.99
    assert watch(apart[:1])["cosine_s"] is None and watch(apart)["spread_s"] is None
    spread = math.sqrt(1 - np.linalg.norm(u.mean(0)) ** 2)
    low, high = watch(apart, [alike])["spread_s"], watch(apart, [apart, alike])
    assert low < 0.01 < 0.9 < spread and high["spread_t"] == pytest.approx(spread, abs=1e-6)
    assert high["spread_s"] == pytest.approx((spread + low) / 2, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- the run

def write_table(path, rows):
    import pandas
    table = pandas.DataFrame(rows)
    {".csv": lambda: table.to_csv(path, index=False), ".tsv": lambda: table.to_csv(path, sep="\t", index=False),
     ".jsonl": lambda: table.to_json(path, orient="records", lines=True),
     ".json": lambda: table.to_json(path, orient="records", lines=True),
     ".parquet": lambda: table.to_parquet(path)}[path.suffix]()
    return str(path)


def rows_of(size, labels=("bad", "good"), seed=0):
    table = R.toy_data(seed, size)
    return {"text": table["text"], "label": [labels[label == "good"] for label in table["label"]]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained checkpoints for the toy language: a teacher of 4 blocks x 16, a student of 3 x 12, as on the hub."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM
    folder = tmp_path_factory.mktemp("models")
    teacher = Path(R.toy_model(folder / "teacher", 4, 16))
    words = (teacher / "vocab.txt").read_text().split("\n")
    reverse = words[:5] + words[:4:-1]                   # another tokenizer: the same words, other ids
    torch.manual_seed(0)
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(words), dim=12, n_layers=3, n_heads=2, hidden_dim=24)
                          ).save_pretrained(folder / "student")
    (folder / "student" / "vocab.txt").write_text("\n".join(reverse))
    return ["--teacher", str(teacher), "--student", str(folder / "student"), "--device", "cpu"]


def command(tmp_path, models, *more):
    files = ["--train-file", write_table(tmp_path / "train.csv", rows_of(120)), "--validation-file",
             write_table(tmp_path / "dev.csv", rows_of(50, seed=1))]
    return [*files, *models, "--output-dir", str(tmp_path / "runs"), "--epochs", "2", "--teacher-epochs", "1", *more]


@pytest.fixture(scope="module")
def beside(tmp_path_factory, models):
    """Whole commands that run beside the tests from their first request on: the toy task, a process that dies, a hub cache,
    a full disk."""
    folder = tmp_path_factory.mktemp("beside")
    for name, layers in (("bert-base-uncased", 4), ("distilbert-base-uncased", 3)):
        cached = folder / "newcomer" / "hf" / "hub" / f"models--{name}"
        R.toy_model(cached / "snapshots" / "abc", layers, 16)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
    root = make_glue(folder / "newcomer" / "data", "sst2", ("negative", "positive"), ("train", "validation"))
    (folder / "full").mkdir()
    full = command(folder / "full", models, "--method", "none", "--epochs", "1")
    earlier = Path(R.main(full)["model"]).parent
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    limited = """if 1:
        import resource, signal, sys
        sys.path.insert(0, sys.argv[1])
        import railkd
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for size in (3000, 20_000):                     # in a model's file, in a checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                railkd.main(sys.argv[2:])
            except SystemExit as stop:
                print("exit", stop.code, file=sys.stderr)"""
    (folder / "dying.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport railkd as R\n"
                                     "load = R.load_data\ndef die(*args):\n    if R.RANK: raise SystemError('rank 1 dies')\n"
                                     "    return load(*args)\nR.load_data = die\nR.main(sys.argv[1:])\n")
    with ThreadPoolExecutor(1) as pool:
        yield folder, {
            "toy": pool.submit(python, str(HERE / "railkd.py"), "--task", "toy", "--max-train-examples", "200", "--epochs", "1",
                               "--teacher-epochs", "1", "--output-dir", str(folder)),
            "dying": pool.submit(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(folder / "dying.py"),
                                 *command(folder, models)),
            "hub": pool.submit(python, str(HERE / "railkd.py"), "--task", "sst2", "--data-root", root, "--epochs", "1", "--teacher-epochs",
                               "1", cwd=folder / "newcomer", HF_HOME=str(folder / "newcomer" / "hf"), HF_HUB_OFFLINE="1"),
            "full": pool.submit(python, "-c", limited, str(HERE), *full, "--seed", "1"), "before": before}


@pytest.fixture(scope="module")
def one_teacher(tmp_path_factory):
    return tmp_path_factory.mktemp("one_teacher")


@pytest.mark.parametrize("method", R.METHODS)
def test_every_method_runs(one_teacher, models, method, beside):
    tmp_path = one_teacher                               # fine-tuned by the first of them
    results = R.main(command(tmp_path, models, "--method", method, "--epochs", "4"))     # seed 42: the fourth draw differs
    assert {"task", "method", "seed", "metric", "best_score", "best_epoch", "last_score", "teacher_score", "config",
            "versions", "device", "params_s", "params_t", "history"} <= {*results}
    folder = tmp_path / "runs" / "own" / f"{method}-seed42"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == results["history"]
    row = results["history"][0]
    assert {"epoch", "layers_t", "loss", "ce", "kd", "ild", "spread_s", "spread_t", "cosine_s", "seconds",
            "examples_per_s", "metrics"} <= {*row}
    has_kd, has_ild = method != "none", R.METHODS[method][1] is not None
    assert (row["kd"] is not None, row["ild"] is not None) == (has_kd, has_ild)
    for row in results["history"]:
        weights = results["config"]["stages"][row["stage"] - 1]
        terms = [row[x] or 0 for x in ("ce", "kd", "ild", "mix")]
        assert row["loss"] == pytest.approx(sum(w * x for w, x in zip(weights, terms)), rel=1e-4, abs=1e-6)
    assert results["config"]["weights"] == list(weights[:3])
    assert (results["teacher_score"] is None) == (method == "none")
    if has_ild:
        slots = 1 if method == "cr-ild" else 2
        drawn = [R.select_layers(R.METHODS[method][0], 4, slots, 42, epoch) for epoch in (1, 2, 3, 4)]
        assert [row["layers_t"] for row in results["history"]] == drawn and row["spread_s"] > 0


def test_results_come_back_and_the_model_answers(tmp_path, models, capsys):
    """A second call trains nothing; other settings are refused; the student answers through a pipeline."""
    from transformers import pipeline
    args = command(tmp_path, models)
    first = R.main(args)
    assert R.main(args) == json.loads(json.dumps(first))
    assert first["model"] in capsys.readouterr().out
    path = Path(first["model"]).parent / "results.json"
    path.write_text(json.dumps({**first, "collapsed": True, "floor": 1.0}))
    R.main(args)
    verdicts = [line for line in capsys.readouterr().out.splitlines() if "has learned nothing" in line]
    assert ["all alike" in line for line in verdicts] == [False, True]      # the teacher, the student
    with pytest.raises(SystemExit) as stop:
        R.main([*args, "--lr", "0.001"])
    assert stop.value.code == 2 and "lr" in capsys.readouterr().err
    again = R.main([*args, "--lr", "0.001", "--overwrite"])
    assert again["config"]["lr"] == 0.001
    assert len([*(tmp_path / "runs" / "own").glob("teacher-*")]) == 1     # the teacher was fine-tuned once
    answer = pipeline("text-classification", model=again["model"])("the noun1 is word3")
    assert answer[0]["label"] in ("bad", "good")


@pytest.mark.parametrize("method", ["rail-c", "kd"])
def test_same_seed_same_numbers(tmp_path, models, method):
    """Catches anything drawn from an unseeded generator, a phase that depends on the one before (the first run makes the
    teacher, the second one loads it), a teacher that moves with the seed."""
    drop = lambda r: [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_s")} for row in r["history"]]
    args = command(tmp_path, models, "--method", method, "--lr", "0.003")
    one, two, other = R.main(args), R.main([*args, "--overwrite"]), R.main([*args, "--seed", "1"])
    assert drop(one) == drop(two) and drop(one) != drop(other)
    assert one["teacher_score"] == other["teacher_score"]


def bits(results):
    """All that must not depend on an interruption: the history without timings, the student's weights."""
    from safetensors.torch import load_file
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_s")} for row in results["history"]]
    return rows, results["best_epoch"], {k: v.tolist() for k, v in load_file(Path(results["model"]) / "model.safetensors").items()}


class Killed(BaseException):
    """As good as SIGKILL: nobody catches it."""


def kill_at(monkeypatch, phase, epoch, step, name="stepped"):
    """The run dies right after a step of the teacher's or the student's training (or before a checkpoint is renamed)."""
    original = getattr(R.Position, name)

    def dying(self, *args):
        original(self, *args)
        if ((self.path.parent.name == "teacher") == (phase == "teacher")) and (self.epoch, self.step) == (epoch, step):
            raise Killed
    monkeypatch.setattr(R.Position, name, dying)
    return lambda: monkeypatch.setattr(R.Position, name, original)


@pytest.mark.parametrize("phase, method, epoch, step, minutes", [
    ("teacher", "rail-c", 2, 4, "0"), ("student", "rail-c", 2, 2, "0"),
    ("student", "codir", 2, 2, "0"), ("student", "codir", 3, 3, "9"),
    ("student", "cr-ild", 1, 2, "0"), ("student", "pro-kd", 1, 3, "0"), ("student", "pro-kd", 2, 2, "0")])
def test_killed_and_started_again_gives_the_same_bits(tmp_path, models, monkeypatch, method, phase, epoch, step, minutes):
    """Catches a random state, a memory bank, a schedule, a best score, a sum of losses that is lost."""
    args = command(tmp_path, models, "--method", method, "--teacher-epochs", "2", "--epochs", "3", "--lr", "0.003",
                   "--checkpoint-minutes", minutes)
    whole = R.main(args)
    again = [*args, "--output-dir", str(tmp_path / "again")]
    mend = kill_at(monkeypatch, phase, epoch, step)
    with pytest.raises(Killed):
        R.main(again)
    mend()
    torch.manual_seed(99), random.seed(99)               # another process has other random states
    assert len([*tmp_path.rglob("checkpoint.pt")]) == 1
    assert bits(R.main(again)) == bits(whole) and not [*tmp_path.rglob("checkpoint*")]


def test_a_run_killed_while_it_writes_goes_on(tmp_path, models, monkeypatch):
    """Killed when a checkpoint, then when the model is half written. Catches a file that is written in place."""
    args = command(tmp_path, models, "--epochs", "3", "--lr", "0.003", "--checkpoint-minutes", "0")
    whole, again = R.main(args), [*args, "--output-dir", str(tmp_path / "again")]
    for owner, name, calls in (torch, "save", 9), (R, "save", 0):

        def dying(*parts, original=getattr(owner, name), left=iter(range(calls, -1, -1))):
            if next(left) > 0:
                return original(*parts)
            if owner is torch:
                parts[1].write(b"half a checkpoint")
            else:
                parts[0].tokenizer.save_pretrained(parts[1].with_suffix(".partial"))
            raise Killed
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, dying)
            R.main(again)
        assert next((tmp_path / "again").rglob("checkpoint.pt"))
    assert bits(R.main(again)) == bits(whole)
    assert not [*(tmp_path / "again").rglob("checkpoint*")] and not [*(tmp_path / "again").rglob("*.partial")]


LONG = ["--epochs", "12", "--patience", "12", "--teacher-epochs", "8", "--lr", "0.003"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, models):
    return bits(R.main(command(tmp_path_factory.mktemp("undisturbed"), models, *LONG)))


def test_runs_stopped_by_a_signal_go_on(tmp_path, models, undisturbed, capfd):
    """Real processes, stopped at whatever they do after the first epoch of a phase."""
    def stopped(which, phase):
        args = command(tmp_path, models, *LONG, "--output-dir", str(tmp_path / f"{which} {phase}"))
        run = subprocess.Popen([sys.executable, str(HERE / "railkd.py"), *args], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
        for line in run.stdout:
            if line.startswith("epoch 1 ") and ("layers_t" in line) == (phase == "student"):
                break
        run.send_signal(getattr(signal, f"SIG{which}"))
        return which, args, run.communicate()[1], run.returncode
    with ThreadPoolExecutor() as pool:
        runs = [*pool.map(stopped, ("KILL", "KILL", "TERM"), ("teacher", "student", "student"))]
    assert not [*tmp_path.rglob("results.json")] and len([*tmp_path.rglob("checkpoint.pt")]) == 3
    for which, args, error, code in runs:
        expected = "" if which == "KILL" else "railkd.py: stopped; the same command goes on from here\n"
        assert code == {"KILL": -9, "TERM": 143}[which] and error == expected
        resumed = R.main(args)
        assert "resumed in epoch" in capfd.readouterr().out and bits(resumed) == undisturbed


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_the_end_of_a_step(tmp_path, models, monkeypatch, capsys, number, code):
    """Catches a stop in the middle of a step, a position that is off by one, a second signal that is not obeyed."""
    args, original, steps = command(tmp_path, models, "--method", "none"), R.Objective.forward, []

    def forward(self, rows):
        steps.append(rows)
        if len(steps) == 6:                                                 # the second step of the second epoch
            R.on_signal(number, "frame")
        return original(self, rows)
    monkeypatch.setattr(R.Objective, "forward", forward)
    monkeypatch.setitem(R.SIGNAL, "came", 0)
    monkeypatch.setitem(R.SIGNAL, "wait", False)
    before = signal.signal(number, R.on_signal)
    try:
        with pytest.raises(SystemExit) as stop:
            R.main(args)
        assert signal.getsignal(number) == signal.SIG_DFL           # the second one ends it at once
    finally:
        signal.signal(number, before)
    assert stop.value.code == code and "goes on from here" in capsys.readouterr().err
    content = torch.load(next(tmp_path.rglob("checkpoint.pt")), weights_only=True)
    assert content["position"][:2] == [2, 2] and content["schedule"]["last_epoch"] == 6 == len(steps)
    monkeypatch.setitem(R.SIGNAL, "came", 0)
    monkeypatch.setitem(R.SIGNAL, "wait", False)
    R.main(args)
    assert "resumed in epoch 2 after step 2" in capsys.readouterr().out and len(steps) == 8


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_during_the_last_checkpoint_of_an_epoch(tmp_path, models, monkeypatch, capsys, epoch):
    """Catches work that is lost between two phases, a signal in the last epoch that nobody hears."""
    args, original, left = command(tmp_path, models, "--method", "none"), torch.save, [epoch]

    def save(*parts):
        left[0] -= 1
        if not left[0]:
            R.on_signal(signal.SIGTERM, "frame")
        return original(*parts)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setitem(R.SIGNAL, "came", 0)
    monkeypatch.setitem(R.SIGNAL, "wait", False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            R.main(args)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143 and not [*tmp_path.rglob("checkpoint.partial")] and not [*tmp_path.rglob("results.json")]
    R.SIGNAL.update(came=0, wait=False)
    R.main(args)
    assert f"resumed in epoch {epoch} after step 4" in capsys.readouterr().out


def test_checkpoints_come_by_the_clock(tmp_path, models, monkeypatch):
    saved, original = [], R.Position.save
    monkeypatch.setattr(R.Position, "save", lambda self: saved.append((self.epoch, self.step)) or original(self))
    R.main(command(tmp_path, models, "--method", "none"))
    assert saved == [(1, 4), (2, 4)]                                        # ten minutes are not over: once an epoch
    saved.clear()
    R.main(command(tmp_path, models, "--method", "none", "--overwrite", "--checkpoint-minutes", "0"))
    assert saved == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (2, 4)]


def test_every_process_gets_its_own_state_back(tmp_path, monkeypatch):
    """Catches random states and sums of losses that all come from the first process."""
    args, model = R.parse(["--task", "toy"])[1], torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {"objective": model, "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", enabled=False),
             "schedule": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)}
    states = [torch.Generator().manual_seed(rank).get_state() for rank in range(2)]
    at = R.Position(tmp_path, args, **parts)
    at.stepped(torch.ones(4), 32)
    monkeypatch.setattr(R, "gather", lambda *values: [values] if len(values) == 1 else [
        (states[rank], values[1], [rank + x for x in values[2]]) for rank in range(2)])
    at.save()
    for rank in range(2):
        monkeypatch.setattr(R, "RANK", rank)
        at = R.Position(tmp_path, args, **parts)
        assert at.sums == [32.0 + rank] * 4 and at.step == 1 and torch.equal(torch.get_rng_state(), states[rank])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, models, monkeypatch, capsys):
    """Named with epoch, step, its terms and the learning rate of that step; seen after 50 steps at the latest."""
    args = command(tmp_path, models, "--method", "kd", "--batch-size", "1", "--lr", "0.001", "--warmup", "0.5")
    original, calls = R.kd_loss, []

    def broken(*parts):
        calls.append(1)
        return original(*parts) * (float("nan") if len(calls) == 127 else 1)      # 120 steps an epoch
    monkeypatch.setattr(R, "kd_loss", broken)
    with pytest.raises(SystemExit) as stop:
        R.main(args)
    error, folder = capsys.readouterr().err, tmp_path / "runs" / "own" / "kd-seed42"
    assert stop.value.code == 2 and error.count("\n") == 1 and len(calls) == 170
    assert "epoch 2, step 7, lr 0.00095: loss, ce, kd, ild, mix [nan, 0." in error and ", nan, 0.0, 0.0]: lower --lr" in error
    assert (folder / "model" / "model.safetensors").exists() and not (folder / "results.json").exists()
    calls.clear()
    monkeypatch.setattr(R.Position, "save", R.Position.check)               # before every checkpoint as well
    monkeypatch.setattr(R, "kd_loss", lambda *parts: broken(*parts) * (float("inf") if len(calls) == 3 else 1))
    with pytest.raises(SystemExit):
        R.main([*args, "--checkpoint-minutes", "0", "--output-dir", str(tmp_path / "other")])
    assert len(calls) == 3 and "epoch 1, step 3" in capsys.readouterr().err


def test_steps_that_fp16_leaves_out_are_counted(tmp_path, models, monkeypatch, capsys):
    """Scaling skips a step whose gradient overflows; only 50 in a row without a finite loss stop the run."""
    args = command(tmp_path, models, "--method", "none", "--amp", "fp16", "--batch-size", "2", "--epochs", "1")
    original, bad = R.Objective.forward, [3, 4]
    monkeypatch.setattr(R.Objective, "forward", lambda self, rows: original(self, rows) * (
        float("inf") if bad.append(0) or len(bad) - 2 in bad[:2] else 1))
    results = R.main(args)
    assert results["history"][0]["skipped"] >= 2 and math.isfinite(results["history"][0]["loss"])
    assert "skipped" in capsys.readouterr().out
    monkeypatch.setattr(R.Objective, "forward", lambda self, rows: original(self, rows) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        R.main([*args, "--output-dir", str(tmp_path / "never")])
    assert stop.value.code == 2 and "epoch 1, step 51" in capsys.readouterr().err


def test_a_checkpoint_of_another_command_is_refused(tmp_path, models, monkeypatch, capsys):
    args = command(tmp_path, models, "--checkpoint-minutes", "0")
    mend = kill_at(monkeypatch, "student", 1, 2)
    with pytest.raises(Killed):
        R.main(args)
    mend()
    path = next(tmp_path.rglob("checkpoint.pt"))
    for wrong, message in (["--lr", "0.5"], "other lr: pass the same"), ([], "damaged: delete it"):
        if not wrong:
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(SystemExit) as stop:
            R.main([*args, *wrong])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and str(path) in error and error.count("\n") == 1
    path.unlink()
    assert R.main(args)["best_score"] >= 0


def side_and_data(tmp_path, models, *more):
    args = R.parse(command(tmp_path, models, *more))[1]
    R.set_up(args)
    data = R.load_data(args)
    return args, data


def test_teacher_is_left_as_it_was(tmp_path, models, monkeypatch):
    """Catches a teacher in train mode, in the optimizer, or changed by a single bit."""
    kept = {}
    prepare, make, make_loss = R.prepare_teacher, torch.optim.AdamW, R.make_loss

    def spy(*args):
        result = prepare(*args)
        kept["teacher"], kept["before"] = result[0].model, {k: v.clone() for k, v in result[0].model.state_dict().items()}
        return result

    def spy_loss(student, *more):
        kept["modules"] = [student.model, make_loss(student, *more)]
        return kept["modules"][1]

    def spy_optimizer(*args, **options):
        kept["optimizer"] = make(*args, **options)
        return kept["optimizer"]
    monkeypatch.setattr(R, "make_loss", spy_loss)
    monkeypatch.setattr(R, "prepare_teacher", spy)
    monkeypatch.setattr(torch.optim, "AdamW", spy_optimizer)
    R.main(command(tmp_path, models))
    assert not kept["teacher"].training and not any(p.requires_grad for p in kept["teacher"].parameters())
    assert all(torch.equal(v, kept["before"][k]) for k, v in kept["teacher"].state_dict().items())
    groups = kept["optimizer"].param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    trainable = [p for module in kept["modules"] for p in module.parameters() if p.requires_grad]
    assert sorted(ids) == sorted({id(p) for p in trainable}) and len(kept["modules"]) == 2
    assert not {id(p) for p in kept["teacher"].parameters()} & {*ids}
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and all(p.ndim < 2 for p in groups[1]["params"])
    assert groups[0]["weight_decay"] > 0 == groups[1]["weight_decay"]
    assert "proj_s.weight" in dict(kept["modules"][1].distance.named_parameters())


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradients_are_clipped_to_norm_1(tmp_path, models, monkeypatch, amp):
    """Over model and maps together, after fp16's scale is taken away. The weights make the gradients large."""
    norms, step = [], torch.optim.AdamW.step

    def spy(self, *args, **options):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = getattr(self, "grad_scale", None)                               # of a scaler that has still to unscale
        norms.append(math.sqrt(sum(grad.square().sum().item() for grad in grads)) / (1 if scale is None else scale.item()))
        return step(self, *args, **options)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    R.main(command(tmp_path, models, "--epochs", "3", "--teacher-epochs", "1", "--weights", "50,50,50", "--amp", amp))
    norms = [norm for norm in norms if math.isfinite(norm)]                  # fp16 leaves out those that are not
    assert len(norms) >= 10 and max(norms) < 1.01 and min(norms[-4:]) > 0.9


def test_dropout_is_on_in_the_student_s_training_alone(tmp_path, models, monkeypatch):
    modes, run = {3: [], 4: []}, R.Side.__call__
    monkeypatch.setattr(R.Side, "__call__", lambda self, split, rows: modes[self.blocks].append(
        (self.model.training, torch.is_grad_enabled())) or run(self, split, rows))
    R.main(command(tmp_path, models, "--epochs", "1", "--teacher-epochs", "1"))
    for blocks in (3, 4):                                # the student and the teacher, which is trained before
        assert modes[blocks].count((True, True)) == 4 and {*modes[blocks]} == {(True, True), (False, False)}
    R.main(command(tmp_path, models, "--epochs", "1", "--teacher-epochs", "1", "--seed", "1", "--teacher-cache", "off"))
    assert modes[3].count((True, True)) == 8 and modes[4].count((True, True)) == 4


def test_accumulation_equals_the_large_batch(tmp_path, models):
    """Catches a step on the first batch, a mean of means where the last group is smaller (120 = 3 x 36 + 12)."""
    from transformers import AutoModelForMaskedLM
    weights, calm = [], tmp_path / "calm"
    shutil.copytree(models[3], calm)
    AutoModelForMaskedLM.from_pretrained(models[3], dropout=0.0, attention_dropout=0.0,
                                         seq_classif_dropout=0.0).save_pretrained(calm)
    models = [*models[:3], str(calm), *models[4:]]
    for batch, accumulation in ((36, 1), (9, 4), (12, 3)):
        args, data = side_and_data(tmp_path, models, "--method", "none", "--batch-size", str(batch), "--amp", "off",
                                   "--grad-accumulation", str(accumulation), "--lr", "0.01", "--epochs", "1")
        torch.manual_seed(0)
        student = R.Side("student", args.student, data, args)
        history = R.train(student, data, args, tmp_path / f"{batch}")
        weights.append((torch.cat([p.detach().flatten() for p in student.model.parameters()]), history[0]["loss"]))
    assert all(torch.allclose(weights[0][0], w, atol=2e-4) for w, _ in weights[1:])
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-4)
    args.lr, args.batch_size, args.grad_accumulation = 0.0, 36, 1           # what it reports is the mean over the examples
    history, labels = R.train(student, data, args, tmp_path / "still"), data.labels["train"]
    expected = torch.nn.functional.cross_entropy(student.map("train")[0], labels)
    assert history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def calm_models(tmp_path, models):
    """A teacher that is sure of what it says, a student without dropout."""
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
    sure, calm = tmp_path / "sure", tmp_path / "calm"
    if not calm.exists():
        shutil.copytree(models[1], sure)
        torch.manual_seed(0)
        teacher = AutoModelForSequenceClassification.from_pretrained(sure)
        teacher.classifier.weight.data *= 200
        teacher.save_pretrained(sure)
        shutil.copytree(models[3], calm)
        AutoModelForMaskedLM.from_pretrained(models[3], dropout=0.0, attention_dropout=0.0,
                                             seq_classif_dropout=0.0).save_pretrained(calm)
    return ["--teacher", str(sure), "--student", str(calm), "--device", "cpu", "--teacher-labels", "bad,good", "--amp", "off"]


def losses(tmp_path, models, *more):
    """The losses of every step of a run without dropout in 32 bits."""
    seen, forward = [], R.Objective.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(R.Objective, "forward", lambda self, rows: seen.append(forward(self, rows)) or seen[-1])
        R.main(command(tmp_path, calm_models(tmp_path, models), "--overwrite", "--batch-size", "16", *more))
    return torch.stack(seen).detach()


@pytest.mark.parametrize("method, same", [("rail-c", True), ("rail-l", False), ("rail-c", False), ("pkd-skip", False), ("alp-kd", False),
                                          ("kd", False)])               # same: one tokenizer for both
def test_cache_gives_what_the_teacher_says(tmp_path, models, method, same):
    """Catches rows by batch, a row of another example, an off-by-one layer, the wrong pooling, a stale part."""
    if same:
        shutil.copytree(models[3], tmp_path / "same")
        shutil.copy(Path(models[1]) / "vocab.txt", tmp_path / "same")
        models = [*models[:3], str(tmp_path / "same")]
    steps = losses(tmp_path, models, "--method", method, "--teacher-cache", "off")
    for part in (8192, 50):                                                 # one part, three parts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(R.Table, "PART", part)
            cached = losses(tmp_path, models, "--method", method, "--teacher-cache", str(tmp_path / f"parts of {part}"))
        assert torch.allclose(cached, steps, atol=1e-3, rtol=1e-3) and (cached[:, 1] > 1e-2).all()
        assert len([*(tmp_path / f"parts of {part}").rglob("*.pt")]) == (2 if part == 8192 else 4)


def test_the_memory_bank_gets_the_rows_of_the_batch(tmp_path, models, monkeypatch):
    seen, forward = [], R.ContrastiveDistance.forward
    monkeypatch.setattr(R.ContrastiveDistance, "forward", lambda self, s, t, index=None, labels=None: seen.append(
        (index, labels)) or forward(self, s, t, index, labels))
    R.main(command(tmp_path, models, "--method", "codir", "--epochs", "1"))
    index, labels = (torch.cat(x) for x in zip(*seen))
    assert sorted(index.tolist()) == list(range(120))
    assert [["bad", "good"][x] for x in labels[index.argsort()].tolist()] == rows_of(120)["label"]


def test_temperature_and_weights_reach_the_loss(tmp_path, models):
    """What the epoch reports, without dropout and at lr 0, against the same terms over all examples at once."""
    args, data = side_and_data(tmp_path, models, *calm_models(tmp_path, models), "--method", "kd", "--temperature", "3",
                               "--lr", "0", "--epochs", "1", "--weights", "0.2,0.7,0")
    torch.manual_seed(0)
    student, teacher = (R.Side(role, vars(args)[role], data, args) for role in ("student", "teacher"))
    row, = R.train(student, data, args, tmp_path / "kd", {"train": [R.Table(teacher, "train", R.mean_pool, tmp_path / "cache")]})
    logits_s, logits_t = student.map("train")[0], teacher.map("train")[0]
    assert row["ce"] == pytest.approx(torch.nn.functional.cross_entropy(logits_s, data.labels["train"]).item(), abs=1e-5)
    assert row["kd"] == pytest.approx(R.kd_loss(logits_s, logits_t, 3.0).item(), rel=1e-4) and row["ild"] is None
    assert row["loss"] == pytest.approx(0.2 * row["ce"] + 0.7 * row["kd"], abs=1e-5)


def table_of(tmp_path, models, *more, pool=R.mean_pool):
    from transformers import AutoModelForSequenceClassification
    args, data = side_and_data(tmp_path, models, "--amp", "off", *more)
    with_head = tmp_path / "with head" / Path(args.teacher).name
    if not with_head.exists():
        shutil.copytree(args.teacher, with_head)
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(args.teacher).save_pretrained(with_head)
    teacher = R.Side("teacher", str(with_head), data, args)
    return teacher, lambda: R.Table(teacher, "train", pool, tmp_path / "cache")


def test_cache_is_read_not_made_again(tmp_path, models, monkeypatch):
    """Catches a teacher that runs again, and parts that are half-written."""
    teacher, make = table_of(tmp_path, models)
    monkeypatch.setattr(R.Table, "PART", 50)
    first = make()
    folder = next((tmp_path / "cache").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == ["0.pt", "100.pt", "50.pt"]
    (folder / "50.pt").rename(folder / "50.123-456")                        # as a killed run leaves it
    (folder / "100.9-9").write_bytes(b"half")
    calls, run = [], R.Side.map
    monkeypatch.setattr(R.Side, "map", lambda self, split, rows, *more: calls.append(rows[0].item()) or run(self, split, rows, *more))
    again, rows = make(), torch.arange(120)
    assert calls == [50] and torch.equal(first(rows, ())[0], again(rows, ())[0])
    rows = torch.tensor([99, 3, 50])
    assert all(torch.equal(x, y) for x, y in zip(first(rows, [3, 1]), again(rows, [3, 1])))
    live = R.Table(teacher, "train", R.mean_pool, "off")
    with torch.no_grad():                                                   # layer l is the output of block l
        logits, hidden, mask = teacher("train", rows)
    for table in (first, live):
        assert torch.allclose(table(rows, [3, 1])[1].float(), torch.stack([R.mean_pool(hidden[3], mask), R.mean_pool(hidden[1], mask)], 1), atol=2e-3)
        assert torch.allclose(table(rows, [3, 1])[0], logits, atol=1e-5)
    assert first(rows, [])[1].shape == (3, 0, 16) and first(rows, [2])[0].dtype == torch.float32
    assert first.parts[0]["pooled"].shape == (4, 50, 16) and first.parts[0]["pooled"].dtype == torch.float16


def test_a_changed_teacher_text_length_or_pooling_has_a_cache_of_its_own(tmp_path, models):
    teacher, make = table_of(tmp_path, models)
    make(), make()
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    R.Table(teacher, "train", R.first_token, tmp_path / "cache")
    teacher.args.max_length = 8
    make()
    teacher.texts["train"][0][5] += " not"
    make()
    teacher.model.classifier.bias.data += 1e-3
    teacher.model.save_pretrained(tmp_path / "changed")
    shutil.copy(Path(models[1]) / "vocab.txt", tmp_path / "changed")
    changed = R.Side("teacher", str(tmp_path / "changed"), Namespace(texts=teacher.texts, names=["bad", "good"]), teacher.args)
    assert changed.content != teacher.content
    R.Table(changed, "train", R.mean_pool, tmp_path / "cache")
    words = (Path(models[1]) / "vocab.txt").read_text().split("\n")
    other = tmp_path / "other"                                              # the same weights, another tokenizer
    shutil.copytree(models[1], other)
    (other / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]))
    assert table_of(tmp_path, ["--teacher", str(other), *models[2:]])[0].content != table_of(tmp_path, models)[0].content
    assert len([*(tmp_path / "cache").iterdir()]) == 5
    contents = {changed.content}
    for i, setting in enumerate(({"model_max_length": 8}, {"truncation_side": "left"}, {"padding_side": "left"})):
        again = shutil.copytree(models[1], tmp_path / f"again{i}")
        path = Path(again, "tokenizer_config.json")
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | setting))
        contents.add(R.Side("teacher", str(shutil.copytree(tmp_path / "changed", again, dirs_exist_ok=True)), Namespace(
            texts=teacher.texts, names=["bad", "good"]), teacher.args).content)
    assert len(contents) == 4                                               # the same weights and words, read otherwise


def test_two_processes_do_what_one_does(tmp_path, models):
    """torchrun, gloo: 16 steps on 113 examples, so the last group has 1 and a process without rows; 51 to evaluate. The
    tolerance: sums in another order differ in the last bits, which AdamW's first steps turn into parts of lr = 1e-3."""
    from safetensors.torch import load_file
    files = ["--train-file", write_table(tmp_path / "train.csv", rows_of(113)), "--validation-file",
             write_table(tmp_path / "dev.csv", rows_of(51, seed=1))]
    shared = [*files, *calm_models(tmp_path, models), "--method", "rail-c", "--epochs", "2", "--lr", "0.001", "--seed", "3"]
    one = R.main([*shared, "--batch-size", "16", "--output-dir", str(tmp_path / "one")])
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "railkd.py"), *shared, "--batch-size", "8",
                  "--output-dir", str(tmp_path / "two"))
    assert done.returncode == 0 and done.stdout.count("epoch 2") == 1, done.stderr
    two = json.loads(next((tmp_path / "two").rglob("results.json")).read_text())
    for a, b in zip(one["history"], two["history"]):
        assert a["layers_t"] == b["layers_t"] and a["metrics"] == pytest.approx(b["metrics"], abs=1e-6)
        assert [a[x] for x in ("loss", "ce", "kd", "ild")] == pytest.approx([b[x] for x in ("loss", "ce", "kd", "ild")], rel=1e-4)
    w, v = (load_file(Path(results["model"]) / "model.safetensors") for results in (one, two))
    assert all(torch.allclose(w[k], v[k], atol=2e-4) for k in w) and one["best_score"] == two["best_score"]


def test_memory_bank_of_several_processes(monkeypatch):
    """Every process enters the rows of all of them, vectors and labels."""
    one, two = contrastive(), contrastive()
    two.load_state_dict(one.state_dict())
    s, t = pooled(batch=4)
    index, labels = torch.tensor([2, 5, 7, 9]), torch.tensor([0, 1, 0, 1])
    one(s, t, index=index, labels=labels)
    parts = []
    monkeypatch.setattr(R, "gather", lambda *values: parts.append(values) or [values])
    two(s[2:], t[2:], index=index[2:], labels=labels[2:])                   # what the other process has
    other = parts.pop()
    two.bank.copy_(one.bank), two.bank_labels.fill_(-1)
    before = two.bank.clone()
    monkeypatch.setattr(R, "gather", lambda *values: [values, other])
    two(s[:2], t[:2], index=index[:2], labels=labels[:2])
    assert two.bank_labels.tolist() == one.bank_labels.tolist()
    changed = (two.bank != before).any(1).nonzero().flatten().tolist()
    assert changed == index.tolist() and torch.allclose(two.bank[9], unit_t(before[9] + other[1][1]), atol=1e-6)


def unit_t(x):
    return torch.nn.functional.normalize(x, dim=-1)


def test_a_process_that_dies_ends_the_run(beside):
    """Catches a run that hangs; the error is shown."""
    done = beside[1]["dying"].result()
    assert done.returncode != 0 and "rank 1 dies" in done.stderr and not [*(beside[0] / "runs").rglob("results.json")]


def test_two_runs_at_once_do_no_harm(tmp_path, models):
    """Both fine-tune the teacher and fill the cache at the same time; catches a folder that two write to."""
    runs = [subprocess.Popen([sys.executable, str(HERE / "railkd.py"), *command(tmp_path, models), "--seed", str(seed)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 2
    assert len([*tmp_path.rglob("results.json")]) == 2 and len([*(tmp_path / "runs" / "own").glob("teacher-*")]) == 1
    scores = {json.loads(path.read_text())["teacher_score"] for path in tmp_path.rglob("results.json")}
    assert len(scores) == 1 and not [path for path in (tmp_path / "runs" / "teacher-cache").rglob("*.*") if path.suffix != ".pt"]


def test_another_run_was_faster_with_the_teacher(tmp_path, models, monkeypatch):
    """The other's folder appears in the moment between the last look and the renaming."""
    rename = Path.rename
    other = Path(next(Path(R.main(command(tmp_path, models, "--epochs", "1", "--output-dir", str(tmp_path / "other")))["model"]).parents[1].glob("teacher-*")))

    def late(self, target):
        if self.name == "teacher":
            shutil.copytree(other, target)
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", late)
    results = R.main(command(tmp_path, models, "--epochs", "1"))
    assert results["teacher_score"] and not Path(results["model"]).with_name("teacher").exists()


def test_too_little_disk_turns_the_cache_off(tmp_path, models, monkeypatch, capsys):
    whole = R.main(command(tmp_path, models, "--teacher-cache", "off", "--epochs", "1"))
    size = 120 * (3 * 16 * 2 + 2 * 4) / 1e6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=0))
    results = R.main(command(tmp_path, models, "--overwrite", "--epochs", "1"))
    out = capsys.readouterr().out
    assert f"cache    train: {size:.1f} MB for" in out and out.count("WARNING: too little disk") == 2
    assert not [*tmp_path.rglob("teacher-cache/*/*")] and bits(results) == bits(whole)


def test_a_damaged_cache_is_named(tmp_path, models, capsys):
    R.main(command(tmp_path, models, "--epochs", "1"))
    part = max((tmp_path / "runs" / "teacher-cache").rglob("0.pt"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, models, "--seed", "1"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{part} is damaged: delete it" in error and error.count("\n") == 1


def test_a_warm_cache_needs_no_teacher(tmp_path, models, monkeypatch):
    args = command(tmp_path, models)
    R.main(args)
    run = R.Side.__call__
    monkeypatch.setattr(R.Side, "__call__", lambda self, split, rows: run(self, split, rows) if self.blocks == 3 or
                        split == "validation" else pytest.fail("the teacher ran on training data"))
    R.main([*args, "--seed", "1"])
    R.main([*args, "--method", "ckd"])


def test_batches_are_whole_and_grouped():
    """Catches a dropped last batch, an order that never changes, batches of mixed length."""
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0))
    one, same, other = (R.batches(lengths, 16, 1, epoch) for epoch in (1, 1, 2))
    assert sorted(torch.cat(one).tolist()) == [*range(1003)] and sorted(map(len, one)) == [11] + [16] * 62
    assert all(torch.equal(a, b) for a, b in zip(one, same)) and not torch.equal(torch.cat(one), torch.cat(other))
    padding = sum((lengths[rows].max() - lengths[rows]).sum() for rows in one) / lengths.sum()
    assert padding < 0.1
    firsts = lengths[torch.stack([rows[0] for rows in one])].float()
    assert (firsts[1:] < firsts[:-1]).any() and (firsts[1:] > firsts[:-1]).any()


def test_map_gives_rows_in_their_order(tmp_path, models):
    """Catches predictions that stay sorted by length, or padding that changes them."""
    args, data = side_and_data(tmp_path, models, "--amp", "off")
    student = R.Side("student", args.student, data, args)
    rows = torch.tensor([7, 3, 40, 11])
    together, pooled = student.map("validation", rows, R.mean_pool, [1, 2])
    assert pooled.shape == (4, 2, 12)
    for i, row in enumerate(rows):
        alone = student.map("validation", row[None], R.mean_pool, [1, 2])
        assert torch.allclose(together[i], alone[0][0], atol=1e-5) and torch.allclose(pooled[i], alone[1][0], atol=1e-5)
    assert torch.allclose(student.map("validation")[0][rows], together, atol=1e-5)


@pytest.mark.parametrize("task, expected", [
    ("cola", {"matthews": 0.3333}), ("mrpc", {"f1": 0.6667, "accuracy": 0.6667}), ("sst2", {"accuracy": 0.6667})])
def test_metrics_of_classification(task, expected):
    """By hand: labels 1 1 1 0 0 0, predictions 1 1 0 0 0 1."""
    labels, guess = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    logits = torch.nn.functional.one_hot(guess).float()
    assert {name: round(R.measure(name, logits, labels), 4) for name in R.TASKS[task]} == expected


def test_metrics_of_regression():
    labels, guess = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([[0.0], [2.0], [1.0], [9.0]])
    x, y = guess[:, 0].double().numpy(), labels.double().numpy()
    pearson = ((x - x.mean()) * (y - y.mean())).sum() / math.sqrt(((x - x.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum())
    assert R.measure("pearson", guess, labels) == pytest.approx(pearson, abs=1e-6)
    assert R.measure("spearman", guess, labels) == pytest.approx(0.8, abs=1e-6)        # 1 - 6 * 2 / (4 * 15)
    assert R.measure("pearson", torch.ones(4, 1), labels) == 0.0
    assert [R.TASKS[task][0] for task in ("stsb", "qnli", "rte", "wnli", "mnli", "qqp")] == [
        "pearson", "accuracy", "accuracy", "accuracy", "accuracy", "f1"]


@pytest.mark.parametrize("suffix, labels", [(".csv", ("schlecht, sehr", "gut")), (".tsv", (0, 1)), (".jsonl", ("0", "1")),
                                            (".json", ("no", "yes")), (".parquet", (3, 5))])
def test_own_files(tmp_path, models, suffix, labels):
    """Label names end in the student's config, in their own order, whatever the file is."""
    from transformers import AutoConfig
    files = ["--train-file", write_table(tmp_path / f"train{suffix}", rows_of(60, labels)),
             "--validation-file", write_table(tmp_path / f"dev{suffix}", rows_of(30, labels, 1))]
    results = R.main([*files, *models, "--method", "none", "--epochs", "1", "--output-dir", str(tmp_path / "runs"),
                      "--task", "mine"])
    config = AutoConfig.from_pretrained(results["model"])
    assert config.id2label == dict(enumerate(map(str, sorted(labels)))) and results["task"] == "mine"


def test_labels_and_names_of_own_files(tmp_path):
    """Catches int labels of one file that are not the words of the other, 10 before 2, a task name from a file name."""
    train = write_table(tmp_path / "mrpc.csv", {"text": list("abcd"), "label": [10, 2, 10, 2]})
    dev = write_table(tmp_path / "dev.jsonl", {"text": list("ab"), "label": ["2", "10"]})
    args = R.parse(["--train-file", train, "--validation-file", dev])[1]
    data = R.load_data(args)
    assert args.task == "own" and data.metrics == ["accuracy"] and data.names == ["2", "10"]
    assert data.labels["train"].tolist() == [1, 0, 1, 0] and data.labels["validation"].tolist() == [0, 1]
    train = write_table(tmp_path / "a.csv", {"text": list("ab"), "label": [1.5, 2.0]})
    dev = write_table(tmp_path / "b.csv", {"text": list("ab"), "label": [1, 2]})
    data = R.load_data(R.parse(["--train-file", train, "--validation-file", dev])[1])
    assert data.names is None and data.labels["validation"].dtype == torch.float32
    for words in ("01", "02", "+1"), ("true", "false"), ("1e3", "x"), ("NA", "None"), ("a b", "ü"):     # as they are
        train = write_table(tmp_path / "c.csv", {"text": ["t"] * len(words), "label": [*words]})
        data = R.load_data(R.parse(["--train-file", train, "--validation-file", train])[1])
        assert {*data.names} == {*words} and [data.names[i] for i in data.labels["validation"]] == [*words]
    mixed = write_table(tmp_path / "mixed.jsonl", {"text": list("abc"), "label": [1, "a", 10]})
    try:
        assert R.load_data(R.parse(["--train-file", mixed, "--validation-file", mixed])[1]).names == ["1", "10", "a"]
    except R.UserError as error:                                            # older releases of datasets do not read it
        assert "changed from number to string" in str(error)
    with pytest.raises(R.UserError, match="no validation data"):
        R.load_data(R.parse(["--task", "mnli", "--data-root", make_glue(tmp_path / "hub", splits=("train",))])[1])


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, models, capsys):
    """Catches a run on [UNK] alone, which transformers allows."""
    shutil.copytree(models[3], tmp_path / "bare")
    (tmp_path / "bare" / "vocab.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, [*models[:3], str(tmp_path / "bare"), *models[4:]], "--method", "none"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "cannot load the student" in error and error.count("\n") == 1


def test_own_regression_with_two_text_columns(tmp_path, models):
    rng = random.Random(0)
    rows = lambda n: {"first": R.toy_data(0, n)["text"], "second": R.toy_data(1, n)["text"],
                      "label": [round(rng.random() * 5, 3) for _ in range(n)]}
    files = ["--train-file", write_table(tmp_path / "a.csv", rows(60)), "--validation-file",
             write_table(tmp_path / "b.csv", rows(30))]
    results = R.main([*files, *models, "--epochs", "1", "--teacher-epochs", "1", "--output-dir", str(tmp_path / "runs")])
    assert results["metric"] == "pearson" and {*results["history"][0]["metrics"]} == {"pearson", "spearman"}
    assert "num_labels" not in results and results["history"][0]["kd"] >= 0


def make_glue(root, task="mnli", names=("entailment", "neutral", "contradiction"), splits=None, size=60):
    """A local clone in the hub's layout; the labels follow from the first word of the text."""
    from datasets import ClassLabel, Dataset, Features, Value
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=list(names)),
                         "idx": Value("int32")})
    for i, split in enumerate(splits or ("train", "validation_matched", "validation_mismatched")):
        label = [(j + i) % len(names) for j in range(size)]
        Dataset.from_dict({"premise": [f"word{10 * x} is word{x}" for x in label], "hypothesis": ["the noun1"] * size,
                           "label": label, "idx": [*range(size)]}, features=features).to_parquet(
            root / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet")
    return str(root)


def test_mnli_keeps_its_dev_sets_apart(tmp_path, models):
    for splits in (None, ("train", "validation_matched"), ("train", "validation_mismatched")):
        root = tmp_path / str(splits)
        results = R.main(["--task", "mnli", "--data-root", make_glue(root, splits=splits), *models, "--method", "none",
                          "--epochs", "1", "--output-dir", str(root / "runs")])
        expected = ["accuracy", "accuracy_mismatched"] if splits is None else ["accuracy" + splits[1][10:].replace("_matched", "")]
        assert [*results["history"][0]["metrics"]] == expected and results["metric"] == expected[0]
        assert results["best_score"] == results["history"][0]["metrics"][expected[0]]


def test_labels_that_are_not_the_task_s(tmp_path, models, capsys):
    """Catches floats or three classes for CoLA, two for MNLI, a class that train lacks, names in another order in dev."""
    from datasets import ClassLabel, Dataset, Features, Value

    def write(folder, split, labels, kind):
        features = Features({"sentence": Value("string"), "label": kind})
        Dataset.from_dict({"sentence": [f"word{i}" for i in range(len(labels))], "label": labels}, features=features).to_parquet(
            folder / f"{split}-0.parquet")
    abc = ClassLabel(names=["a", "b", "c"])
    for i, (task, labels, kind, words) in enumerate((
            ("cola", [0.0, 0.5, 1.0], Value("float32"), "labels numbers are not those of cola"),
            ("cola", [0, 1, 2], abc, "labels ['a', 'b', 'c'] are not those of cola"),
            ("stsb", [0, 1, 2], abc, "are not those of stsb"), ("mnli", [0, 1, 0], ClassLabel(names=["a", "b"]), "those of mnli"),
            ("mnli", [0, 1, 0], abc, "train: no label but a, b; known: ['a', 'b', 'c']"))):
        folder = tmp_path / f"{i}" / "nyu-mll" / "glue" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            write(folder, split, labels, kind)
        refused(["--task", task, "--data-root", str(tmp_path / f"{i}"), *models, "--output-dir", str(tmp_path / "runs")], words,
                tmp_path / "runs", capsys)
    write(tmp_path, "train", [0, 1, 2], abc)
    write(tmp_path, "dev", [0, 1, 2], ClassLabel(names=["c", "b", "a"]))
    data = R.load_data(R.parse(["--train-file", str(tmp_path / "train-0.parquet"), "--validation-file", str(tmp_path / "dev-0.parquet")])[1])
    assert data.labels["validation"].tolist() == [2, 1, 0] and data.names == ["a", "b", "c"]


@pytest.mark.parametrize("order", [*itertools.permutations(["entailment", "neutral", "contradiction"])])
def test_label_order_is_found(order):
    """Catches the inverse permutation, which swaps cannot tell; --teacher-labels then gives the task's order."""
    glue, rng = ["entailment", "neutral", "contradiction"], np.random.RandomState(0)
    labels = torch.tensor(rng.randint(0, 3, 300))
    answers = torch.tensor([order.index(glue[x]) if rng.rand() < 0.9 else rng.randint(3) for x in labels])
    if list(order) == glue:
        assert R.check_order(answers, labels, glue) is None
        return
    with pytest.raises(R.UserError, match=f"--teacher-labels {','.join(order)} "):
        R.check_order(answers, labels, glue)
    right = [order.index(name) for name in glue]         # what --teacher-labels sets: logits[:, right]
    logits = torch.nn.functional.one_hot(answers, 3)[:, right]
    assert R.check_order(logits.argmax(1), labels, glue) is None


def test_teacher_with_its_labels_in_another_order_is_refused(tmp_path, models, capsys):
    """Catches distilling against the labels, and the inverse order: the whole way, with a head of three turned by one."""
    from transformers import AutoModelForSequenceClassification
    root = make_glue(tmp_path / "hub", splits=("train", "validation_matched"), size=90)
    common = ["--task", "mnli", "--data-root", root, "--device", "cpu"]
    made = R.main([*common, "--student", models[1], "--teacher", models[1], "--method", "none", "--epochs", "40",
                   "--patience", "40", "--lr", "0.003", "--output-dir", str(tmp_path / "t")])
    assert made["best_score"] > 0.9
    teacher = AutoModelForSequenceClassification.from_pretrained(made["model"])
    head = teacher.classifier
    head.weight.data, head.bias.data = head.weight.data.roll(-1, 0), head.bias.data.roll(-1, 0)
    teacher.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    teacher.save_pretrained(made["model"])
    args = [*common, "--teacher", made["model"], *models[2:4], "--epochs", "1", "--output-dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        R.main(args)
    own = "neutral,contradiction,entailment"             # what its answers 0, 1, 2 mean
    assert stop.value.code == 2 and f"--teacher-labels {own}" in capsys.readouterr().err
    assert R.main([*args, "--teacher-labels", own])["teacher_score"] == made["best_score"]
    root = make_glue(tmp_path / "hub", "sst2", ("negative", "positive"), ("train", "validation"))
    with pytest.raises(SystemExit) as stop:              # three labels are not two
        R.main(["--task", "sst2", "--data-root", root, *args[4:]])
    assert stop.value.code == 2 and "has 3 labels, the task has 2" in capsys.readouterr().err


def test_subset_of_the_training_data_does_not_depend_on_the_seed(tmp_path, models):
    texts = [side_and_data(tmp_path, models, "--max-train-examples", "20", "--seed", seed)[1].texts["train"][0]
             for seed in ("1", "2")]
    assert texts[0] == texts[1] and len(texts[0]) == 20 and texts[0] != rows_of(120)["text"][:20]


def test_a_run_that_learns_nothing_says_so_at_its_end(tmp_path, models, capsys):
    R.main(command(tmp_path, models, "--teacher-lr", "0", "--lr", "0", "--epochs", "1"))
    out = capsys.readouterr().out
    assert "WARNING: the teacher is no better" in out.split("training 1 epochs")[0]       # before the first step
    for side in ("teacher", "student"):
        assert f"WARNING: the {side} has learned nothing: majority baseline 0.5" in out.split("all epochs: about")[-1]
    R.main(command(tmp_path, models, "--teacher-lr", "0", "--lr", "0", "--epochs", "1"))
    assert capsys.readouterr().out.count("WARNING") == 2                                  # the stored results again


def test_warning_where_the_student_collapses(tmp_path, models, capsys, monkeypatch):
    values = iter([0.5, 0.94, 0.96])
    monkeypatch.setattr(R, "watch", lambda *args: ({"cosine_s": next(values, 0.0)}, 1.0))
    monkeypatch.setattr(R, "evaluate", lambda *args: {"accuracy": 0.1})
    assert R.main(command(tmp_path, models, "--method", "none"))["history"][1]["collapsed"]
    out = capsys.readouterr().out
    assert out.count("WARNING: the student collapses") == 1
    assert "WARNING: the student has learned nothing: majority baseline 0.5" in out


def test_early_stopping_keeps_the_best(tmp_path, models, monkeypatch):
    """Catches the last model kept for the best, patience off by one."""
    scores, saved = iter([0.1, 0.5, 0.5, 0.4, 0.3, 0.9, 0.9]), []
    monkeypatch.setattr(R, "evaluate", lambda predict, data: {"accuracy": next(scores)})
    monkeypatch.setattr(R, "save", lambda side, folder: saved.append(folder))
    results = R.main(command(tmp_path, models, "--method", "none", "--epochs", "9", "--patience", "3"))
    assert (results["best_epoch"], results["best_score"], results["last_score"]) == (2, 0.5, 0.3) and len(saved) == 2


# ---------------------------------------------------------------------------------------------- CR-ILD and Pro-KD

@pytest.mark.parametrize("method, more, rows", [                        # stage, CE, KD, ILD, MIX, mixing, temperature, teacher
    ("none", [], [(1, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0)] * 3 + [(1, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 1)] * 3),
    ("kd", ["--temperature", "3"], [(1, 0.5, 0.5, 0.0, 0.0, 0.0, 3.0, 0)] * 3 + [(1, 0.5, 0.5, 0.0, 0.0, 0.0, 3.0, 1)] * 3),
    ("rail-c", ["--weights", "2,1,4"], [(1, 2.0, 1.0, 4.0, 0.0, 0.0, 2.0, 0)] * 3 + [(1, 2.0, 1.0, 4.0, 0.0, 0.0, 2.0, 1)] * 3),
    ("cr-ild", [], [(1, 0.0, 0.0, 1.0, 0.1, 1 / 3, 2.0, 0), (1, 0.0, 0.0, 1.0, 0.1, 2 / 3, 2.0, 0), (1, 0.0, 0.0, 1.0, 0.1, 1.0, 2.0, 1)]
     + [(2, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, 1)] * 3),
    ("pro-kd", ["--first-stage", "4"], [(1, 0.0, 1.0, 0.0, 0.0, 0.0, 7.0, 0), (1, 0.0, 1.0, 0.0, 0.0, 0.0, 5.0, 0),
                                        (1, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 1), (1, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1)]
     + [(2, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1)] * 2),
    ("pro-kd", ["--max-temperature", "3", "--weights", "0.5,0.5,0"], [
        (1, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0), (1, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, 0), (1, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1)]
     + [(2, 0.5, 0.5, 0.0, 0.0, 0.0, 1.0, 1)] * 3)])
def test_schedule_epoch_by_epoch(method, more, rows):
    """With two checkpoints of the teacher. Catches a stage, a temperature, a checkpoint or a weight off by one epoch."""
    args = R.parse(["--task", "rte", "--method", method, "--epochs", "6", *more])[1]
    args.device = torch.device("cpu")
    objective = R.Objective(Namespace(model=torch.nn.Linear(1, 1)), None, [0, 1], None, args)
    for epoch, expected in enumerate(rows, 1):
        stage = objective.set_epoch(epoch)
        seen = (stage, *objective.weights, objective.mixing, objective.temperature, objective.table)
        assert seen == pytest.approx(expected, abs=1e-6), epoch


def test_mixed_inputs(tmp_path, models):
    """Catches an unmixed text, the shares swapped, a mask of one text alone, token types that get lost."""
    args, data = side_and_data(tmp_path, models, "--amp", "off")
    for path in models[1], models[3]:
        side, rows = R.Side("student", path, data, args), torch.tensor([3, 8, 21])
        side.model.eval()
        inputs = side.tokenizer.pad(side.encode("train")[0][rows.tolist()], return_tensors="pt")
        words = side.model.get_input_embeddings()(inputs["input_ids"])
        more = {k: inputs[k] for k in inputs if k == "token_type_ids" and k in side.takes}
        expected = side.model(inputs_embeds=torch.stack([0.7 * words[i] + 0.3 * words[2 - i] for i in range(3)]), **more,
                              attention_mask=inputs["attention_mask"].maximum(inputs["attention_mask"].flip(0)))
        logits, hidden, mask = side("train", rows, 0.7)
        assert torch.allclose(logits, expected.logits, atol=1e-6) and len(hidden) == side.blocks + 1
        assert (mask.sum(1) == inputs["attention_mask"].sum(1).maximum(inputs["attention_mask"].sum(1).flip(0))).all()
        assert torch.equal(side("train", rows)[0], side("train", rows, 1.0)[0]) == bool((mask == inputs["attention_mask"]).all())


def test_consistency_is_applied(tmp_path, models, monkeypatch):
    """CR-ILD's published command never did: the term is not zero, it grows with the epoch, its gradient reaches the student."""
    args, data = side_and_data(tmp_path, calm_models(tmp_path, models), "--method", "cr-ild", "--epochs", "8")
    student, teacher = (R.Side(role, vars(args)[role], data, args) for role in ("student", "teacher"))
    ild = R.make_loss(student, teacher, args)
    ild.fit([(*student("train", torch.arange(30))[1:], *teacher("train", torch.arange(30))[1:])])
    objective = R.Objective(student, data.labels["train"], [R.Table(teacher, "train", R.mean_pool, "off")], ild, args)
    seen, shares, call = [], [], R.Side.__call__
    monkeypatch.setattr(R.Side, "__call__", lambda self, split, rows, share=None: shares.append(share) or call(self, split, rows, share))
    for epoch in (1, 4, 5):
        objective.set_epoch(epoch)
        torch.manual_seed(0)
        loss, ce, kd, inter, mix = objective(torch.arange(16))
        assert loss.item() == pytest.approx((inter + 0.1 * mix if epoch < 5 else kd).item(), rel=1e-6)
        student.model.zero_grad()
        loss.backward()                                                 # the head, untrained, has no moments yet
        assert (student.model.classifier.weight.grad is None) == (epoch < 5)
        seen.append(mix.item())
        if epoch == 4:
            torch.manual_seed(0)
            share = 0.5 + abs(torch.rand(()).item() - 0.5)
            both = [ild.pool("s", *student("train", torch.arange(16), x)[1:]) for x in (share, None)]
            assert mix.item() == pytest.approx(R.mixup_loss(*both, share).item(), rel=1e-5)
            student.model.zero_grad()
            objective.weights = (0.0, 0.0, 0.0, 1.0)
            objective(torch.arange(16))[0].backward()
            assert student.model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert 0 < seen[0] == pytest.approx(seen[1] / 4) and seen[2] == 0
    objective.set_epoch(1)
    shares.clear()
    for _ in range(60):
        objective(torch.arange(2))
    shares = [share for share in shares if share is not None]          # max(b, 1 - b), b uniform: between 1/2 and 1
    assert len(shares) == 60 and 0.5 <= min(shares) < 0.55 and 0.95 < max(shares) <= 1


def test_pro_kd_follows_the_teacher(tmp_path, models, monkeypatch, capsys):
    """Each checkpoint in training order, then labels alone from the best of the first stage; the last stage selects and stops."""
    from safetensors.torch import load_file
    args = command(tmp_path, models, "--method", "pro-kd", "--teacher-epochs", "3", "--epochs", "9", "--first-stage", "4",
                   "--patience", "1")
    scores = iter([0.1, 0.2, 0.15, 0.9, 0.5, 0.6, 0.4, 0.4, 0.3, 0.2])     # 3 of the teacher's epochs, the teacher, the student
    kept, read, set_epoch, batches = {}, [], R.Objective.set_epoch, R.batches

    def spy(self, epoch):
        kept["model"], stage = self.model, set_epoch(self, epoch)
        if self.table:
            read.append((stage, Path(self.table.teacher.title.split(" (")[0]).name, round(self.temperature, 3)))
        return stage

    def spy_batches(lengths, size, seed, epoch):
        if epoch == 5:
            best = load_file(tmp_path / "runs" / "own" / "pro-kd-seed42" / "model" / "model.safetensors")
            kept["same"] = [torch.equal(best[name], value) for name, value in kept["model"].state_dict().items()]
        return batches(lengths, size, seed, epoch)
    rates, stepped = [], R.Position.stepped
    monkeypatch.setattr(R.Position, "stepped", lambda self, *more: rates.append(self.parts["schedule"].get_last_lr()[0])
                        or stepped(self, *more))
    monkeypatch.setattr(R, "evaluate", lambda predict, data: {"accuracy": next(scores)})
    monkeypatch.setattr(R, "batches", spy_batches)
    monkeypatch.setattr(R.Objective, "set_epoch", spy)
    results = R.main(args)
    assert "3 checkpoint(s) of the teacher" in capsys.readouterr().out
    assert read[:4] == [(1, "epoch-001", 7.0), (1, "epoch-001", 5.0), (1, "epoch-002", 3.0), (1, "epoch-003", 1.0)]
    assert {stage for stage, *_ in read[4:]} == {2} and kept["same"] and all(kept["same"])
    assert [row["score"] for row in results["history"]] == [0.5, 0.6, 0.4, 0.4, 0.3, 0.2]
    assert (results["best_epoch"], results["best_score"]) == (5, 0.3)
    rates = rates[12:]                                                  # after the teacher's 3 epochs of 4 steps
    assert rates[15] == 0 < rates[16] < rates[17] > rates[18] and max(rates[:16]) == pytest.approx(2e-5, rel=0.05)
    folder = next((tmp_path / "runs" / "own").glob("teacher-*"))
    kept = [load_file(folder / name / "model.safetensors")["classifier.weight"] for name in ("epoch-001", "epoch-002", "model")]
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1])     # the best of the teacher's was its second


def test_cr_ild_goes_on_from_the_end_of_its_first_stage(tmp_path, models, monkeypatch):
    """Which has trained no head, so that no epoch of it is the best; catches a return to an earlier one."""
    from safetensors.torch import load_file
    kept, set_epoch, batches, scores = {}, R.Objective.set_epoch, R.batches, iter([0.9, 0.9, 0.8, 0.1, 0.2, 0.3])

    def spy(lengths, size, seed, epoch):
        if epoch == 3:
            best = load_file(tmp_path / "runs" / "own" / "cr-ild-seed42" / "model" / "model.safetensors")
            kept["same"] = [torch.equal(best[name], value) for name, value in kept["model"].state_dict().items()]
        return batches(lengths, size, seed, epoch)
    monkeypatch.setattr(R, "evaluate", lambda predict, data: {"accuracy": next(scores)})
    monkeypatch.setattr(R, "batches", spy)
    monkeypatch.setattr(R.Objective, "set_epoch", lambda self, epoch: kept.update(model=self.model) or set_epoch(self, epoch))
    assert R.main(command(tmp_path, models, "--method", "cr-ild", "--epochs", "4"))["best_epoch"] == 4
    assert not all(kept["same"])


@pytest.mark.parametrize("method", ["rail-l", "cr-ild"])
def test_the_run_fits_on_the_layers_in_use(tmp_path, models, monkeypatch, method):
    """Catches a start on other layers than those that are trained, on other rows for one side."""
    args, data = side_and_data(tmp_path, calm_models(tmp_path, models), "--method", method)
    student, seen, fit = R.Side("student", args.student, data, args), [], R.Distance.fit
    monkeypatch.setattr(R.Distance, "fit", lambda self, *more: seen.append(more) or fit(self, *more))
    args.data = "data"
    teacher, _, _, ild = R.prepare_teacher(student, data, args, tmp_path / "work")
    (pooled_s, pooled_t, chances), rows = seen[0], torch.tensor(random.Random("ridge").sample(range(120), 120))[:9]
    with torch.no_grad():
        for side, pooled, layers in (student, pooled_s, ild.layers_s), (teacher, pooled_t, ild.all_t):
            _, hidden, mask = side("train", rows)
            expected = torch.stack([R.mean_pool(hidden[layer], mask) for layer in layers], 1)
            assert len(pooled) == 120 and torch.allclose(pooled[:9].float(), expected, atol=2e-3)
    assert chances.shape == (len(ild.layers_s), len(ild.all_t)) and torch.allclose(chances.sum(1), torch.ones(len(chances)))


def test_pro_kd_with_other_teachers(tmp_path, models, monkeypatch, capsys):
    """One checkpoint: Annealing-KD; a list of folders; one without a head in it; regression."""
    teachers = [str(tmp_path / f"teacher{i}") for i in (1, 2)]
    for i, path in enumerate(teachers):
        (tmp_path / "calm").exists() and shutil.rmtree(tmp_path / "calm"), (tmp_path / "sure").exists() and shutil.rmtree(tmp_path / "sure")
        calm_models(tmp_path, models)
        (tmp_path / "sure").rename(path)
    args = command(tmp_path, models, "--method", "pro-kd")
    one = R.main([*args, "--teacher", teachers[0], "--teacher-labels", "bad,good"])
    assert "1 checkpoint(s) of the teacher: Annealing-KD" in capsys.readouterr().out and len(one["history"]) == 2
    orders, set_epoch = [], R.Objective.set_epoch
    with monkeypatch.context() as patch:
        patch.setattr(R.Objective, "set_epoch", lambda self, epoch: orders.append(
            [table.teacher.order for table in self.tables]) or set_epoch(self, epoch))
        R.main([*args, "--teacher", ",".join(teachers), "--teacher-labels", "good,bad", "--overwrite"])
    assert orders == [[[1, 0], [1, 0]]] * 2
    assert "2 checkpoint(s) of the teacher\n" in capsys.readouterr().out
    for pair in ((models[1], teachers[0]), (teachers[0], models[1])):
        with pytest.raises(SystemExit) as stop:
            R.main([*args, "--teacher", ",".join(pair), "--teacher-labels", "bad,good", "--overwrite"])
        assert stop.value.code == 2 and "has no head for the task" in capsys.readouterr().err
    files = [write_table(tmp_path / f"{x}.csv", {"text": rows_of(40)["text"], "label": [i / 7 for i in range(40)]}) for x in "ab"]
    results = R.main(["--train-file", files[0], "--validation-file", files[1], *models, "--method", "pro-kd", "--epochs", "2",
                      "--teacher-epochs", "1", "--output-dir", str(tmp_path / "regression")])
    assert results["metric"] == "pearson" and results["history"][0]["loss"] == pytest.approx(results["history"][0]["kd"])


@pytest.mark.parametrize("method", ["cr-ild", "pro-kd"])
def test_toy_task_in_two_stages(tmp_path, method):
    """As a newcomer types it, shrunken: both stages, the last one's best, a model that is there."""
    results = R.main(["--task", "toy", "--method", method, "--max-train-examples", "100", "--epochs", "4", "--teacher-epochs", "2",
                      "--output-dir", str(tmp_path), "--device", "cpu"])
    assert [row["stage"] for row in results["history"]] == [1, 1, 2, 2] and results["best_epoch"] > 2
    assert R.parse(["--task", "toy", "--method", method])[1].epochs == 16 and Path(results["model"], "config.json").exists()
    assert len([*tmp_path.rglob("epoch-*")]) == (2 if method == "pro-kd" else 0)


@pytest.mark.parametrize("more, words", [
    (["--method", "kd", "--teacher", "a,b"], "many teachers, T_max: pro-kd"),
    (["--method", "kd", "--max-temperature", "5"], "many teachers, T_max: pro-kd"),
    (["--epochs", "1"], "2 stage(s): two: 0 < --first-stage < --epochs"), (["--first-stage", "2"], "2 stage(s)"),
    (["--method", "kd", "--first-stage", "1"], "--method kd, 1 stage(s)"),
    (["--first-stage", "0"], "not 1 number(s) within"), (["--max-temperature", "0.5"], "within [1")])
def test_mistakes_in_stages(tmp_path, models, capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, models, "--method", "cr-ild", *more))
    assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_student_without_inputs_embeds_is_refused(tmp_path, models, monkeypatch, capsys):
    from transformers import DistilBertForSequenceClassification as Model
    monkeypatch.setattr(Model, "forward", lambda self, input_ids, attention_mask: None)
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, models, "--method", "cr-ild"))
    assert stop.value.code == 2 and "takes no inputs_embeds" in capsys.readouterr().err


def test_report(tmp_path, capsys):
    """Mean and sample deviation over seeds, an average only where every task is there."""
    for task, method, seed, score in (("rte", "kd", 1, 0.5), ("rte", "kd", 2, 0.6), ("cola", "kd", 1, 0.3), ("rte", "none", 1, 0.4)):
        folder = tmp_path / task / f"{method}-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({
            "task": task, "method": method, "seed": seed, "best_score": score, "config": {"lr": 2e-5, "batch_size": 32},
            "teacher_score": None if method == "none" else 0.7}))
    (tmp_path / "others").mkdir()
    (tmp_path / "others/results.json").write_text("[]")                     # of another program
    R.main(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| kd | 30.0 (n=1) | 55.0 ± 7.1 (n=2) | 42.5 |" in out
    assert "| none | - | 40.0 (n=1) | - |" in out and "| teacher | 70.0 (n=1) | 70.0 (n=1) | 70.0 |" in out


MISTAKES = [
    (["--task", "sst3"], "--task"), (["--task", "toy", "--method", "railkd"], "--method"), ([], "--task"),
    (["--task", "toy", "--method", "kd", "--weights", "1,1,1"], "--weights"),
    (["--task", "toy", "--method", "kd", "--select", "last"], "--select"), (["--train-file", "a.csv"], "--validation-file"),
    (["--report", "nowhere"], "no finished run"), (["--task", "qnli", "--data-root", "nowhere"], "no nowhere/nyu-mll/glue/qnli"),
    (["--task", "sst2", "--train-file", "no.csv", "--validation-file", "no.csv"], "need --task"),
    (["--train-file", "no.csv", "--validation-file", "no.csv"], "No such file or directory: 'no.csv'"),
    (["--train-file", "no.xlsx", "--validation-file", "no.xlsx"], "no.xlsx is empty or no csv"),
    (["--task", "toy", "--method", "ckd", "--shared-proj"], "one width"),
    (["--task", "toy", "--method", "rail-l", "--select", "all"], "one width"),
    (["--task", "toy", "--method", "kd", "--distance", "layerwise"], "no such pair"),
    *((["--task", "toy", flag, value], flag) for flag, values in {
        "--epochs": "0 1.5 -1 many", "--patience": "0 -3", "--batch-size": "0 x", "--grad-accumulation": "0",
        "--lr": "fast -1 nan inf", "--weight-decay": "2", "--warmup": "1.5", "--temperature": "0 inf nan", "--proj-dim": "0",
        "--max-length": "3", "--max-train-examples": "0", "--seed": "-1 1e3", "--teacher-epochs": "0", "--teacher-lr": "x",
        "--teacher-seed": "-2", "--checkpoint-minutes": "-1 nan", "--weights": "1,1 0,0,0 a,b,c nan,1,1 -1,1,1",
        "--amp": "int8", "--start": "warm", "--teacher-proj": "no", "--device": "tpu9", "--select": "some",
        "--distance": "far"}.items() for value in values.split())]


@pytest.mark.parametrize("args, message", MISTAKES, ids=[" ".join(args) or "nothing" for args, _ in MISTAKES])
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        R.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "untrained" not in str(path)]


GOOD = "text,label\na b,good\nc d,bad\ne f,good\n"
FILES = [                                               # name, train, dev, what the line says
    ("no label.csv", "text,target\na,x\nb,y\n", GOOD, "rows of label"), ("unlabelled.csv", "text\na\nb\n", GOOD, "rows of label"),
    ("no text.jsonl", '{"text": 1, "label": "x"}\n{"text": 2, "label": "y"}\n', GOOD, "'text': ['int']"),
    ("text missing.jsonl", '{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', GOOD, "NoneType"),
    ("lists.jsonl", '{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["y"]}\n', GOOD, "'label': ['list']"),
    ("three texts.csv", "a,b,c,label\nx,x,x,good\ny,y,y,bad\n", GOOD, "one or two"), ("empty.csv", "", GOOD, "is empty or no csv"),
    ("empty.jsonl", "", GOOD, "is empty or no csv"), ("blank.jsonl", "\n", GOOD, "own data: "),
    ("header.csv", "text,label\n", GOOD, "no data"), ("empty.jsonl", "", GOOD, "no own data"),
    ("truncated.jsonl", '{"text": "a", "label": "good"}\n{"text": "b", "la', GOOD, "JSON"),
    ("truncated.parquet", "PAR1abcdef", GOOD, "parquet"), ("latin.csv", "text,label\ncaf\xe9,good\nx,bad\n".encode("latin-1"), GOOD, "utf-8"),
    ("semicolons.csv", "text;label\na;good\nb;bad\n", GOOD, "text;label"), ("commas.tsv", GOOD, GOOD, "text,label"),
    ("one class.csv", "text,label\na,good\nb,good\n", "text,label\na,good\n", "no label but good"),
    ("one row.csv", "text,label\na,good\n", "text,label\na,good\n", "no label but good"),
    ("no value.csv", "text,label\na,\nb,good\nc,bad\n", GOOD, "labels {''}"), ("new label.csv", GOOD, "text,label\na,great\n", "{'great'}"),
    ("class not in train.csv", "text,label\na,good\nb,fine\n", GOOD, "{'bad'}"),
    ("out of range.csv", "text,label\na,0\nb,1\n", "text,label\na,2\n", "labels {'2'}, known: ['0', '1']"),
    ("floats for classes.csv", "text,label\na,0\nb,1\n", "text,label\na,0.5\nb,1\n", "'0.5'"),
    ("words for numbers.csv", "text,label\na,0.5\nb,1.5\n", GOOD, "known: numbers"),
    ("infinite.csv", "text,label\na,0.5\nb,inf\n", "text,label\na,0.5\n", "labels {'inf'}"),
    ("other columns.csv", GOOD, "sentence,label\na,good\nb,bad\n", "'sentence'"),
    ("empty dev.csv", GOOD, "text,label\n", "no data")]


@pytest.mark.parametrize("name, train, dev, message", FILES, ids=[row[0] for row in FILES])
def test_mistakes_in_files(tmp_path, models, capsys, name, train, dev, message):
    for path, content in (tmp_path / name, train), (tmp_path / f"dev{name[-4:]}" if name[-4:] == ".tsv" else tmp_path / "dev.csv", dev):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused([*models, "--output-dir", str(tmp_path / "runs"), "--train-file", str(tmp_path / name), "--validation-file", str(path)],
            message, tmp_path / "runs", capsys)


def refused(args, message, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        R.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and error[-2] != ":", error
    assert not folder.exists() or not [path for path in folder.rglob("*") if path.is_file()]


def test_parquet_with_other_columns_is_refused(tmp_path, models, capsys):
    from datasets import Dataset
    Dataset.from_dict({"a": [1, 2], "b": ["x", "y"]}).to_parquet(tmp_path / "odd.parquet")
    refused([*command(tmp_path, models), "--train-file", str(tmp_path / "odd.parquet")], "rows of label", tmp_path / "runs", capsys)


@pytest.mark.parametrize("content", [
    "\ufefflabel,text\ngood,a b\nbad,c d\n", 'label\ttext\ngood\t"a\tb"\nbad\tc "d\n', "label,text\ngood,\nbad,\n",
    f"label,text\ngood,{'word ' * 200_000}\nbad,x\n", "label,text\ngood,\U0001f600\U0001f600\nbad,\x01\x02\x07\u200b\n"],
    ids=["byte order mark", "quoted tab", "no words", "a million characters", "emoji and control characters"])
def test_odd_texts_work(tmp_path, models, content):
    path = tmp_path / ("odd.tsv" if "\t" in content else "odd.csv")
    path.write_text(content, encoding="utf-8")
    results = R.main([*command(tmp_path, models), "--train-file", str(path), "--validation-file", str(path), "--epochs", "1"])
    assert set(json.loads(Path(results["model"], "config.json").read_text())["label2id"]) == {"bad", "good"}


def test_a_model_s_positions_are_a_limit_where_its_tokenizer_has_none(tmp_path, models):
    from transformers import AutoModelForMaskedLM
    short = tmp_path / "short"
    shutil.copytree(models[3], short)
    AutoModelForMaskedLM.from_pretrained(models[3], max_position_embeddings=16, ignore_mismatched_sizes=True).save_pretrained(short)
    args, data = side_and_data(tmp_path, models)
    data.texts["train"][0][0] = "the noun1 is not " * 20
    assert R.Side("student", str(short), data, args).encode("train")[1].max() == 14
    assert R.Side("student", models[3], data, args).encode("train")[1].max() > 80


def test_label_names_come_back_as_they_were(tmp_path, models):
    from transformers import AutoConfig
    labels = ["very good", "d\u00e9j\u00e0 vu \u2713", "07", "null"]
    write_table(tmp_path / "odd.jsonl", {"text": list("abcd"), "label": labels})
    results = R.main([*command(tmp_path, models, "--epochs", "1"), "--train-file", str(tmp_path / "odd.jsonl"),
                      "--validation-file", str(tmp_path / "odd.jsonl")])
    config = AutoConfig.from_pretrained(results["model"])
    assert sorted(labels) == [config.id2label[i] for i in range(4)] and config.label2id["07"] == sorted(labels).index("07")


@pytest.mark.parametrize("what, message", [
    ("weights cut off", "cannot load the teacher"), ("config cut off", "not a valid JSON"), ("no weights", "model.safetensors"),
    ("code in a pickle", "cannot load the teacher"), ("vision", "ViTConfig"), ("no encoder", "cannot load the teacher"),
    ("no tokenizer", "cannot load the teacher"), ("a decoder", "no encoder"), ("an encoder of another kind", "cannot load the teacher"),
    ("a block missing", "16 weights missing"), ("another width", "weights missing"), ("more words than vectors", "a tokenizer that does not fit"),
    ("code of its own", "cannot load the teacher"),
    ("another head", "has 3 labels, the task has 2"), ("a file", "cannot load the teacher"), ("nothing", "HF_HUB_OFFLINE")])
def test_mistakes_in_models(tmp_path, models, capsys, monkeypatch, what, message):
    import transformers as hub
    folder = tmp_path / "model"
    shutil.copytree(models[1], folder)
    weights, small = folder / "model.safetensors", {"vocab_size": 65, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    if what == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:500])
    elif what == "config cut off":
        (folder / "config.json").write_text('{"model_type": ')
    elif what in ("no weights", "code in a pickle"):
        weights.unlink()
    elif what == "another head":
        hub.AutoModelForSequenceClassification.from_pretrained(models[1], num_labels=3).save_pretrained(folder)
    elif what == "vision":
        hub.ViTModel(hub.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                   image_size=8, patch_size=4)).save_pretrained(folder)
    elif what == "no encoder":
        hub.T5Model(hub.T5Config(**small)).save_pretrained(folder)
    elif what == "a decoder":
        hub.GPT2ForSequenceClassification(hub.GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=0,
                                                         bos_token_id=0)).save_pretrained(folder)
        hub.BertTokenizerFast.from_pretrained(models[1]).save_pretrained(folder)
    elif what == "an encoder of another kind":
        hub.T5EncoderModel(hub.T5Config(**small)).save_pretrained(folder)
    elif what in ("a block missing", "another width"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 5} if what == "a block missing" else {"intermediate_size": 40}
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "more words than vectors":
        with open(folder / "vocab.txt", "a") as file:
            file.write("".join(f"\nmore{i}" for i in range(50)))
    elif what == "code of its own":
        (folder / "config.json").write_text(json.dumps({"model_type": "mine", "architectures": ["Mine"], "auto_map": {
            "AutoConfig": "mine.Mine", "AutoModelForSequenceClassification": "mine.Mine"}}))
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        monkeypatch.setattr("builtins.input", lambda *args: "y")                # to "run the custom code?"
    elif what == "no tokenizer":
        for path in folder.glob("*[!h]*.txt"):
            path.unlink()
    if what == "code in a pickle":
        class Code:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))
        torch.save({"code": Code()}, folder / "pytorch_model.bin")
    if what in ("a file", "nothing"):
        shutil.rmtree(folder)
        what == "a file" and folder.write_text("{}")
    refused([*command(tmp_path, models), "--teacher", str(folder)], message, tmp_path / "runs", capsys)
    assert not (tmp_path / "ran").exists()              # and with a reason: its words are another library's


def test_teacher_student_and_results_are_three_places(tmp_path, models, capsys):
    args, runs = command(tmp_path, models), tmp_path / "runs"
    refused([*args, "--student", models[1]], "one and the same model", runs, capsys)
    refused([*args, "--output-dir", models[1]], "must lie elsewhere", tmp_path / "no", capsys)
    inside = shutil.copytree(models[1], tmp_path / "inside" / "own" / "rail-c-seed42" / "teacher" / "model")
    with pytest.raises(SystemExit):
        R.main([*args, "--teacher", str(inside), "--output-dir", str(tmp_path / "inside")])
    assert "must lie elsewhere" in capsys.readouterr().err and (inside / "config.json").exists()
    model = R.main(args)["model"]
    before, error = Path(model, "model.safetensors").read_bytes(), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        R.main([*args, "--student", model, "--overwrite"])
    assert stop.value.code == 2 and "must lie elsewhere" in capsys.readouterr().err
    assert Path(model, "model.safetensors").read_bytes() == before


def test_results_of_another_version_or_command_are_left_alone(tmp_path, models, capsys):
    args = command(tmp_path, models, "--method", "none", "--epochs", "1")
    path = Path(R.main(args)["model"]).parent / "results.json"
    results = json.loads(path.read_text())
    del results["config"]["version"], results["floor"]
    path.write_text(json.dumps(results))
    for more, what in ([], "other version"), (["--lr", "0.5"], "other lr, version"):
        with pytest.raises(SystemExit) as stop:
            R.main([*args, *more])
        assert stop.value.code == 2 and what in capsys.readouterr().err and json.loads(path.read_text()) == results
    path.write_text("{}")                                                   # of another program
    with pytest.raises(SystemExit):
        R.main(args)
    assert "holds a run with other task, method" in capsys.readouterr().err and path.read_text() == "{}"
    path.write_text('{"task": "own", "met')
    for content in '{"task": "own", "met', "[]", "null", b"\xff\xfe{":
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for again in args, ["--report", str(tmp_path)]:
            with pytest.raises(SystemExit) as stop:
                R.main(again)
            assert stop.value.code == 2 and f"{path} is damaged: delete it" in capsys.readouterr().err
    assert R.main([*args, "--overwrite"])["floor"] == 0.52
    path.unlink()
    for foreign, words in ({"epoch": 3}, "is of a run with other task, method"), ([3], "is damaged: delete it"):
        torch.save(foreign, path.with_name("checkpoint.pt"))
        with pytest.raises(SystemExit):
            R.main(args)
        assert f"checkpoint.pt {words}" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_is_kept_from_step_to_step(tmp_path, models):
    """A tensor of 40 MB, made and freed in each step as an embedding's gradient is, takes its pages once."""
    import resource
    side_and_data(tmp_path, models)
    faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt for _ in range(4) if torch.ones(10 ** 7).sum()]
    assert min(after - before for before, after in zip(faults, faults[1:])) < 500       # of 9,766 pages


def test_a_full_disk_or_a_closed_folder_is_one_line(tmp_path, models, capsys, beside):
    lines = beside[1]["full"].result().stderr.splitlines()
    assert len(lines) == 4 and lines[1] == lines[3] == "exit 1", lines
    assert lines[0].startswith("railkd.py: error: reading or writing failed: ") and lines[2].startswith("railkd.py: error: ")
    assert not [*(beside[0] / "full").rglob("checkpoint.partial")]          # nothing half written takes up room
    assert beside[1]["before"] and all(path.read_bytes() == content for path, content in beside[1]["before"].items())
    (tmp_path / "closed").write_text("")
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, models, "--method", "none", "--output-dir", str(tmp_path / "closed")))
    assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_a_student_deeper_than_its_teacher_is_refused(tmp_path, models, capsys):
    swapped = ["--teacher", models[3], "--student", models[1], *models[4:]]
    with pytest.raises(SystemExit) as stop:
        R.main(command(tmp_path, swapped))
    assert stop.value.code == 2 and "cannot draw k = 3 intermediate layers from num_layers = 3" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- as a newcomer would

def python(*args, cwd=HERE, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run([sys.executable, *args], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True,
                          timeout=150)         # a hang is a failure


def test_importing_costs_torch_alone(tmp_path):
    """Catches an import of transformers or datasets at the top; the file works where only torch is there."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'datasets', 'sklearn', 'scipy', 'pandas', 'tqdm']))"
    code = f"{blocked}; import railkd, torch; d = railkd.ConcatDistance(4, 6, 2, start='random'); " \
           "print(d(torch.ones(3, 2, 4), torch.ones(3, 2, 6)).item() >= 0)"
    done = python("-c", code)
    assert done.stdout == "True\n" and not done.stderr


def test_default_command_from_a_hub_cache(beside):
    """The README's `--task sst2` with the default names, out of a hub cache, HF_HUB_OFFLINE=1, quiet off a terminal."""
    folder, done = beside[0], beside[1]["hub"].result()
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = json.loads((folder / "newcomer" / "runs" / "sst2" / "rail-c-seed42" / "results.json").read_text())
    assert results["config"]["teacher"] == "bert-base-uncased" and results["best_score"] >= 0


def test_codir_without_labels_takes_all_other_rows(monkeypatch):
    """Also where some rows' labels are known from earlier; labels and rows may be lists."""
    chances, draw = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda weights, *args, **options: chances.append(weights) or draw(weights, *args, **options))
    distance = R.ContrastiveDistance(4, 6, 2, num_examples=6, proj_dim=3, start="random")
    vectors = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    distance(*vectors, index=[0, 1, 2], labels=[0, 1, 1])
    assert chances[-1].tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    for labels in (None, [0.5, 0.1, 0.2]):
        distance.eval()(*vectors, index=[0, 1, 2], labels=labels)
        assert torch.equal(chances[-1], 1 - torch.eye(3, 6))


def test_bf16_is_known_by_any_name(tmp_path, models, monkeypatch):
    for capabilities, dtype in (({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16), ({"neon": True, "sve_bf16": True}, torch.bfloat16),
                                ({"avx512_bf16": False, "amx_bf16": False}, torch.float32), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert side_and_data(tmp_path, models)[0].dtype == dtype


def test_no_hub_is_one_line(tmp_path):
    """Catches minutes of retries, or a traceback, where the hub cannot be reached."""
    done = python(str(HERE / "railkd.py"), "--task", "sst2", cwd=tmp_path, HF_HOME=str(tmp_path),
                  HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--task toy" in done.stderr, done.stderr


def test_toy_end_to_end(beside):
    """The first command of the README, shrunken, from the shell."""
    folder, done = beside[0], beside[1]["toy"].result()
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "student  accuracy" in done.stdout and (folder / "toy" / "rail-c-seed42" / "model" / "config.json").exists()


README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""


@pytest.mark.parametrize("number, block", [*enumerate(re.findall(r"```python\n(.*?)```", README, re.S))])
def test_readme_code_runs(number, block, tmp_path, monkeypatch):
    if "Trainer" in block:
        pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"README.md, block {number}", "exec"), {"__name__": "readme"})


def test_toy_defaults_are_for_the_toy_task_alone():
    """Catches a folder named toy that changes the learning rate of another task."""
    assert R.parse(["--task", "sst2", "--output-dir", "toy"])[1].lr == 2e-5
    assert R.parse(["--task=toy"])[1].lr == R.parse(["--task", "toy"])[1].lr == 1e-3
    assert R.parse(["--task", "toy", "--lr", "0.5"])[1].lr == 0.5


def test_defaults_are_the_documented_ones():
    args = R.parse(["--task", "sst2"])[1]
    expected = dict(teacher="bert-base-uncased", student="distilbert-base-uncased", method="rail-c", epochs=40, patience=5,
                    batch_size=32, lr=2e-5, weights=(1 / 3,) * 3, temperature=2.0, max_length=128, seed=42)
    assert {k: vars(args)[k] for k in expected} == expected
    assert R.parse(["--task", "sst2", "--method", "kd"])[1].weights == (0.5, 0.5, 0.0)
    assert R.parse(["--task", "sst2", "--method", "none"])[1].weights == (1.0, 0.0, 0.0)
    assert R.LayerwiseDistance(4, 4, 2).proj_s.out_features == 128


def test_readme_and_help_name_what_there_is():
    """Catches a flag without help or source, a method that the README forgets."""
    actions = R.parse(["--task", "toy"])[0]._actions
    assert all(action.help for action in actions) and all(f"`{method}`" in README for method in R.METHODS)
    sourced = [action for action in actions if isinstance(action.default, (int, float)) and action.type]
    assert all("paper" in a.help or "our choice" in a.help or "seed" in a.help for a in sourced)


def test_the_file_keeps_to_its_shape():
    lines = (HERE / "railkd.py").read_text().splitlines()
    assert len(lines) <= 1000 and max(map(len, lines)) <= 110
    start, end = (next(i for i, line in enumerate(lines) if x in line) for x in ("= the method", "= end of the method"))
    assert end - start < 350


@needs_shared
@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "stsb", "rte", "wnli", "mnli", "qqp"])
def test_real_glue_is_read(task):
    """Catches a renamed column, test labels of -1 that come in, label names that get lost."""
    data = R.load_data(Namespace(task=task, data_root=str(SHARED), train_file=None, validation_file=None,
                                 max_train_examples=50))
    expected = {"sst2": ["negative", "positive"], "mnli": ["entailment", "neutral", "contradiction"], "stsb": None}
    assert data.names == expected.get(task, data.names) and len(data.labels["train"]) == 50
    assert len(data.texts["train"]) == (1 if task in ("sst2", "cola") else 2) and data.labels[data.dev[0]].min() >= 0
