# SPDX-License-Identifier: MIT
"""Tests of railkd.py: no network, no GPU, no download. Docstrings say which mistakes they catch."""

import functools
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported
import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file

import railkd as R

torch.set_num_threads(1)  # tiny models only; it also keeps the sums in one order
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for what the tests start
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
HERE = Path(__file__).parent
PROGRAM = [sys.executable, HERE / "railkd.py"]

B, M, N, D_S, D_T = 6, 3, 7, 10, 14  # batch, slots, teacher blocks, widths
DRAWS = [R.sample_layers(N, M, 3, epoch) for epoch in range(1, 41)]  # at which a fit aims
LABELS = torch.tensor([0, 1, 0, 1, 2, 2, 0, 0, 1, 1, 2, 2])  # of the memory bank's examples


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def mapped(maps, x):
    """What a map makes of x in numpy; of several maps, each takes its own slot of (B, m, d)."""
    if isinstance(maps, torch.nn.ModuleList):
        return np.stack([mapped(linear, x[:, i]) for i, linear in enumerate(maps)], axis=1)
    if isinstance(maps, torch.nn.Identity):
        return x
    return x @ to_numpy(maps.weight).T + to_numpy(maps.bias)


def pooled(k=M, d_s=D_S):
    return torch.randn(B, M, d_s), torch.randn(B, k, D_T)


def hidden_states(num_layers, batch, length, width):
    return [torch.randn(batch, length, width) for _ in range(num_layers + 1)]


def test_pooling_is_the_mean_of_the_tokens():
    """Catches padding averaged in or multiplied, so that NaN comes through, a sum for a mean, the
    wrong axis, hidden[:, 0] where it is padding, a sum in 16 bits, and a mask that is broadcast."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    padding = ~mask.bool()
    hidden = torch.randn(4, 5, 3).masked_fill(padding[..., None], math.nan).requires_grad_()
    for kind in (torch.bool, torch.int64, torch.float32):
        result, first = R.mean_pool(hidden, mask.to(kind)), R.first_token(hidden, mask.to(kind))
        for b in range(4):
            tokens = [to_numpy(hidden[b, i]) for i in range(5) if mask[b, i]] or [np.zeros(3)]
            assert np.allclose(to_numpy(result[b]), sum(tokens) / len(tokens), atol=1e-6)
            assert np.allclose(to_numpy(first[b]), tokens[0])
    result.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[padding].abs().sum() == 0
    with torch.autocast("cpu", torch.bfloat16):
        result = R.mean_pool(torch.full((1, 100, 2), 1000.0).half(), torch.ones(1, 100))
    assert result.dtype == torch.float32 and torch.allclose(result, torch.full((1, 2), 1000.0))
    for mask in (torch.zeros(2, 4), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=rf"\[2, 3, 4\].*{re.escape(str([*mask.shape]))}"):
            R.mean_pool(torch.zeros(2, 3, 4), mask)


def test_draw_covers_every_subset_equally_and_depends_on_its_arguments_alone():
    """Catches a biased or unsorted draw, layer 0, the last block, drawing with replacement, a
    global generator, an epoch or seed ignored, and another draw for a float epoch."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    draws = [R.sample_layers(N, M, seed, epoch) for seed in range(40) for epoch in range(100)]
    for draw in draws:
        assert draw == sorted(set(draw)) and len(draw) == M and set(draw) <= set(range(1, N))
    for size in (1, 2, 3):  # layers, pairs, whole draws
        chance = math.comb(N - 1 - size, M - size) / math.comb(N - 1, M)
        slack = 4.5 * math.sqrt(chance * (1 - chance) / len(draws))
        for subset in itertools.combinations(range(1, N), size):
            count = sum(set(subset) <= set(draw) for draw in draws)
            assert abs(count / len(draws) - chance) < slack
    assert R.sample_layers(12, 5, 42, 1) == R.sample_layers(12, 5, 42, 1.0) == [1, 7, 8, 10, 11]
    R.select_layers("permuted", 12, 5, 3, 4)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert len({tuple(R.sample_layers(12, 5, 3, epoch)) for epoch in range(20)}) > 10
    assert len({tuple(R.sample_layers(12, 5, seed, 4)) for seed in range(20)}) > 10
    for num_layers, k in [(6, 6), (6, 0), (1, 1)]:
        with pytest.raises(ValueError, match=rf"k = {k}\b.*num_layers = {num_layers}\b"):
            R.select_layers("skip", num_layers, k)


def test_selections_and_methods_are_the_published_ones():
    """Catches a layer off by one, an order that epochs change or seeds share, a mixed-up method."""
    expected = {"skip": [2, 4, 6, 8, 10], "last": [7, 8, 9, 10, 11], "reverse": [10, 8, 6, 4, 2]}
    expected |= {"middle": [6] * 5, "all": [*range(1, 12)], "random": R.sample_layers(12, 5, 3, 1)}
    for name, layers in expected.items():
        assert R.select_layers(name, 12, 5, 3, 1) == layers
    assert R.select_layers("skip", 24, 5) == [4, 8, 12, 16, 20]
    assert R.select_layers("final", 12, 1, 3, 1) == [12]
    pytest.raises(ValueError, R.select_layers, "best", 12, 5)
    orders = [R.select_layers("permuted", 12, 5, seed, 0) for seed in range(9)]
    assert all(sorted(order) == [2, 4, 6, 8, 10] for order in orders)
    assert orders == [R.select_layers("permuted", 12, 5, seed, 7) for seed in range(9)]
    assert len({tuple(order) for order in orders}) > 3
    expected = {"rail-l": "random layerwise", "rail-c": "random concat", "ckd": "all group"}
    expected |= {"alp-kd": "all attention", "codir": "all contrastive", "cr-ild": "final direct"}
    expected |= {"pkd-skip": "skip direct", "pkd-last": "last direct", "reverse": "reverse direct"}
    expected |= {"permuted": "permuted direct", "all-to-one": "middle direct"}
    expected |= dict.fromkeys(["none", "kd", "pro-kd"], "None None")
    weights = {"none": [(1, 0, 0, 0)], "kd": [(0.5, 0.5, 0, 0)], "codir": [(0.5, 0.5, 1 / 32, 0)]}
    weights |= {"cr-ild": [(0, 0, 1, 0.1), (0, 1, 0, 0)], "pro-kd": [(0, 1, 0, 0), (1, 0, 0, 0)]}
    assert set(R.METHODS) == set(expected)
    for name, row in R.METHODS.items():
        assert f"{row.select} {row.distance}" == expected[name]
        assert row.pool is (R.first_token if "pkd" in name else R.mean_pool)
        third = [pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))]
        assert [stage[:4] for stage in row.stages] == weights.get(name, third), name
    assert [(x.anneal, x.then) for x in R.METHODS["pro-kd"].stages][0] == (True, "best")
    assert [(x.anneal, x.then) for x in R.METHODS["cr-ild"].stages][0] == (False, "last")


def test_kd_loss_against_numpy():
    """Catches T^2 left out, T after the softmax, the mean over classes, the models swapped, KL for
    a regression or annealed logits, phi upside down, a teacher that learns, and 16 bits."""
    s, t = np.random.RandomState(0).randn(2, 5, 3)
    p, q = (np.exp(x / 3) / np.exp(x / 3).sum(1, keepdims=True) for x in (t, s))
    expected = 3**2 * (p * np.log(p / q)).sum() / 5
    s, t = torch.tensor(s, requires_grad=True), torch.tensor(t, requires_grad=True)
    assert np.isclose(R.kd_loss(s, t, 3.0).item(), expected, atol=1e-6)
    one = s[:, :1], t[:, :1]  # a regression
    assert np.isclose(R.kd_loss(*one, 3.0).item(), np.mean(to_numpy(one[0] - one[1]) ** 2))
    for temperature, phi in ((1.0, 1.0), (4.0, 4 / 7), (7.0, 1 / 7)):
        for s_i, t_i in ((s, t), one):
            loss = R.kd_loss(s_i, t_i, temperature, max_temperature=7.0)
            assert np.isclose(loss.item(), np.mean(to_numpy(s_i - phi * t_i) ** 2))
    (R.kd_loss(s, t, 2.0) + R.kd_loss(*one, 2.0) + loss).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    assert R.kd_loss(s.bfloat16(), t.bfloat16(), 2.0).dtype == torch.float32
    for bad in [(s, t[:, :2], 2.0), (s, t[:, :1], 2.0), (s, t, 0.0), (s[0], t[0], 2.0)]:
        pytest.raises(ValueError, R.kd_loss, *bad)


@pytest.mark.parametrize("shared, alpha", [(True, None), (True, [0.5, 1, 2]), (False, [2, 1, 3])])
def test_layerwise_is_equation_2(shared, alpha):
    """Catches a missing normalisation, a mean over slots or widths, alpha ignored, mixed slots."""
    distance = R.LayerwiseDistance(D_S, D_T, M, M, proj_dim=8, shared=shared, alpha=alpha)
    s, t = pooled()
    x, y = mapped(distance.proj_s, to_numpy(s)), mapped(distance.proj_t, to_numpy(t))
    of_slots = ((unit(y) - unit(x)) ** 2).sum(-1) * (alpha or [1, 1, 1])
    assert np.isclose(distance(s, t).item(), of_slots.sum() / B, atol=1e-5)


def test_concat_is_equation_3_and_group_is_ckd():
    """Catches normalising each slot, a sum over slots, and groups apart, or unequal by two."""
    concat, group = R.ConcatDistance(D_S, D_T, M, 7, proj_dim=8), R.GroupDistance(D_S, D_T, M, 7)
    s, t = pooled(k=7)
    z_s = unit(mapped(concat.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(concat.proj_t, to_numpy(t).reshape(B, -1)))
    assert np.isclose(concat(s, t).item(), ((z_s - z_t) ** 2).sum() / B, atol=1e-5)
    expected = 0.0
    for i, layers in enumerate(np.array_split(np.arange(7), M)):
        target = unit(np.concatenate([to_numpy(t[:, layer]) for layer in layers], axis=-1))
        z = unit(mapped(group.proj_s[i], to_numpy(s[:, i])))
        expected += ((z - target) ** 2).sum() / B
    assert np.isclose(group(s, t).item(), expected, atol=1e-5)
    pytest.raises(ValueError, R.GroupDistance, D_S, D_T, M, 2)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_direct_is_pkd_and_attention_is_alp_kd(d_s):
    """Catches a mean of elements, needless maps, a softmax over slots, and scaled products."""
    direct, attention = R.DirectDistance(d_s, D_T, M, M), R.AttentionDistance(d_s, D_T, M, 6)
    for distance in (direct, attention):
        assert bool([*distance.parameters()]) == (d_s != D_T)
    s, t = pooled(d_s=d_s)
    expected = ((unit(mapped(direct.proj_s, to_numpy(s))) - unit(to_numpy(t))) ** 2).sum() / B
    assert np.isclose(direct(s, t).item(), expected, atol=1e-5)
    s, t = pooled(k=6, d_s=d_s)
    z_s, z_t = mapped(attention.proj_s, to_numpy(s)), to_numpy(t)
    weights = np.exp(z_s @ z_t.transpose(0, 2, 1))
    mixture = weights / weights.sum(2, keepdims=True) @ z_t
    assert np.isclose(attention(s, t).item(), np.mean((z_s - mixture) ** 2), rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_contrastive_is_info_nce_with_a_memory_bank(momentum):
    """Catches a wrong anchor, scores or positive, and a bank with wrong rows, momentum or time."""
    labels = torch.zeros(12, dtype=torch.long)
    labels[7] = 1  # the one example with another label: all five negatives are it
    options = {"proj_dim": 8, "num_negatives": 5, "momentum": momentum}
    distance = R.ContrastiveDistance(D_S, D_T, M, M, labels, **options).eval()
    (s, t), index = pooled(), torch.tensor([3, 1, 4, 0, 5, 9])
    before, moved = distance.bank.clone(), to_numpy(distance.bank)
    z_s = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(distance.proj_t, to_numpy(t).reshape(B, -1)))
    positive, negative = (z_s * z_t).sum(1) / 0.07, z_t @ moved[7] / 0.07
    expected = -np.mean(positive - np.log(np.exp(positive) + 5 * np.exp(negative)))
    assert np.isclose(distance(s, t, index).item(), expected, atol=1e-4)
    with torch.no_grad():
        distance.train()(s, t, index)
    assert torch.equal(distance.bank, before) and np.allclose(moved, unit(moved))
    distance(s, t, index)
    moved[index] = unit(momentum * moved[index] + (1 - momentum) * z_s)
    assert np.allclose(distance.bank, moved, atol=1e-5)
    assert {"bank", "proj_t.weight"} <= set(distance.state_dict())
    pytest.raises(ValueError, distance, s, t)  # without the rows


@pytest.mark.parametrize("labels", [LABELS, LABELS.float() / 3, LABELS * 0])
def test_negatives_have_another_label_and_are_drawn_equally(labels):
    """Catches negatives of the own label, or of the own row without labels, and a biased draw."""
    options, is_any = {"proj_dim": 8, "num_negatives": 4000}, labels is not LABELS
    distance = R.ContrastiveDistance(D_S, D_T, M, M, labels, **options).eval()
    s, t = pooled()
    for row in range(12):
        distance.bank.requires_grad_().grad = None
        others = [i for i in range(12) if labels[i] != labels[row] or (is_any and i != row)]
        distance.bank.data[:] = distance.bank.data[others[0]].clone()  # each draw weighs the same
        distance(s[:1], t[:1], torch.tensor([row])).backward()
        counts = distance.bank.grad.norm(dim=1)
        assert counts.nonzero()[:, 0].tolist() == others
        shares = counts[others] / counts.sum()
        assert (shares * len(others) - 1).abs().max() < 0.3


def assert_ridge(linear, x, y):
    """The map is the ridge solution from x to y, in numpy."""
    x0, y0 = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * np.trace(x0.T @ x0) / x.shape[1]
    weight = np.linalg.solve(x0.T @ x0 + penalty * np.eye(x.shape[1]), x0.T @ y0).T
    assert np.allclose(to_numpy(linear.weight), weight, atol=1e-5)
    assert np.allclose(to_numpy(linear.bias), y.mean(0) - weight @ x.mean(0), atol=1e-5)


def fitted(method, **options):
    """A fitted loss, and in numpy its states (40, m, d_s) and (40, n + 1, d_t), counted from 0."""
    ild = R.IntermediateLoss(method, M + 1, N, D_S, D_T, seed=3, **options)
    states_s = torch.randn(40, len(ild.layers_s), D_S) + 1  # a mean that a centring takes away
    states_t = torch.randn(40, N, D_T)
    ild.set_epoch(5)
    state, torch_state = random.getstate(), torch.get_rng_state()
    ild.fit(states_s, states_t)
    assert ild.layers_t == R.select_layers(ild.select, N, len(ild.layers_s), 3, 5)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    return ild.distance, to_numpy(states_s), np.insert(to_numpy(states_t), 0, np.nan, axis=1)


def test_ridge_start_aims_at_the_mean_target_of_the_method():
    """Catches no centring, an absolute penalty, wrong draws or layers, and units of the mean."""
    shared, x, h = fitted("rail-l", proj_dim=8)
    y = sum(unit(mapped(shared.proj_t, h[:, draw])) for draw in DRAWS) / 40
    assert_ridge(shared.proj_s, x.reshape(-1, D_S), y.reshape(-1, 8))
    concat, x, h = fitted("rail-c", proj_dim=8)
    y = sum(unit(mapped(concat.proj_t, h[:, draw].reshape(40, -1))) for draw in DRAWS) / 40
    assert_ridge(concat.proj_s, x.reshape(40, -1), y)
    codir, x, h = fitted("codir", labels=torch.arange(40), proj_dim=8)
    y = unit(mapped(codir.proj_t, h[:, 1:N].reshape(40, -1)))
    assert_ridge(codir.proj_s, x.reshape(40, -1), y)
    own, x_o, h_o = fitted("rail-l", shared=False, proj_dim=8)
    y = sum(unit(mapped(own.proj_t, h_o[:, draw])) for draw in DRAWS) / 40
    direct, x_d, h_d = fitted("pkd-skip", select="random")
    group, x_g, h_g = fitted("ckd")
    attention, x_a, h_a = fitted("alp-kd")
    for i in range(M):
        assert_ridge(own.proj_s[i], x_o[:, i], y[:, i])
        assert_ridge(direct.proj_s[i], x_d[:, i], sum(unit(h_d[:, x[i]]) for x in DRAWS) / 40)
        pair = h_g[:, 2 * i + 1 : 2 * i + 3].reshape(40, -1)
        assert_ridge(group.proj_s[i], x_g[:, i], unit(pair))
        assert_ridge(attention.proj_s[i], x_a[:, i], h_a[:, 1:N].mean(1))
    for method in ("pkd-skip", "pkd-last", "cr-ild", "permuted"):
        fixed, x, h = fitted(method)
        layers = R.select_layers(R.METHODS[method].select, N, x.shape[1], 3)
        for i, layer in enumerate(layers):
            assert_ridge(fixed.proj_s[i], x[:, i], unit(h[:, layer]))


def tiny(kind, layers, width):
    options = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    options |= {
        "intermediate_size": 2 * width,
        "vocab_size": 99,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **options)).eval()


def states(model, length, pad=0):
    """The hidden states and the mask of four inputs, always the same, with padding at their end."""
    ids = F.pad(torch.arange(4 * length).reshape(4, length) + 5, (0, pad), value=1)
    mask = F.pad(torch.ones(4, length, dtype=torch.long), (0, pad))
    return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states, mask


@pytest.mark.parametrize("case", ["bert distilbert", "mpnet roberta", "gpt2 gpt2", "bert roberta"])
def test_loss_works_on_every_architecture(case):
    """Catches what only one architecture has, and a vector that depends on its batch mates."""
    kind_t, kind_s = case.split()
    teacher, student = tiny(kind_t, 6, 16), tiny(kind_s, 4, 12)
    ild = R.IntermediateLoss("rail-l", 4, 6, 12, 16)
    value = ild(ild.pool_s(*states(student, 5)), ild.pool_t(*states(teacher, 7)))
    padded = ild(ild.pool_s(*states(student, 5, pad=3)), ild.pool_t(*states(teacher, 7, pad=2)))
    assert torch.allclose(value, padded, atol=1e-5) and value.ndim == 0 and 0 < value < 4 * 3
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("method", [name for name, row in R.METHODS.items() if row.distance])
@pytest.mark.parametrize("d_s", [12, 16])
def test_gradients_reach_all_they_should(method, d_s):
    """Catches a detached student, a teacher that learns, and a map in a plain list or left out."""
    options = {"labels": LABELS} if method == "codir" else {}
    ild = R.IntermediateLoss(method, 4, 6, d_s, 16, **options)
    assert ild.layers_s == ([4] if method == "cr-ild" else [1, 2, 3])
    hidden_s, hidden_t = hidden_states(4, 4, 5, d_s), hidden_states(6, 4, 7, 16)
    for hidden in hidden_s + hidden_t:
        hidden.requires_grad_()
    ild(ild.pool_s(hidden_s), ild.pool_t(hidden_t), torch.arange(4)).backward()
    for layer, hidden in enumerate(hidden_s):
        assert (hidden.grad is not None) == (layer in ild.layers_s)
    assert all(hidden.grad is None for hidden in hidden_t)
    for name, p in ild.named_parameters():
        frozen = "proj_t" in name and method != "codir"
        assert p.requires_grad != frozen and (frozen or p.grad.abs().sum() > 0), name
    for choice in ("frozen", "trained") if method in ("rail-l", "rail-c", "codir") else ():
        chosen = R.IntermediateLoss(method, 4, 6, d_s, 16, teacher_proj=choice, **options)
        trained = [p.requires_grad for p in chosen.distance.proj_t.parameters()]
        assert trained == [choice == "trained"] * 2


def test_pairing_is_what_is_computed():
    """Catches a layer off by one on either side, or in another slot, and missing embeddings."""
    ild = R.IntermediateLoss("rail-l", 4, 9, 12, 12, seed=7)
    hidden_s, hidden_t = hidden_states(4, 4, 5, 12), hidden_states(9, 4, 5, 12)
    mask = torch.ones(4, 5)
    assert ild.layers_t == R.sample_layers(9, 3, 7, 1)
    ild.set_epoch(3)
    assert ild.layers_t == R.sample_layers(9, 3, 7, 3) and isinstance(ild.layers_s, list)
    states_s, states_t = ild.pool_s(hidden_s, mask), ild.pool_t(hidden_t, mask)
    assert torch.equal(states_s, torch.stack([hidden_s[i].mean(1) for i in (1, 2, 3)], dim=1))
    assert torch.equal(states_t, torch.stack([hidden_t[i].mean(1) for i in ild.layers_t], dim=1))
    assert torch.equal(ild.pool_s(hidden_s, None), states_s)
    assert torch.allclose(ild(states_s, states_t), ild.distance(states_s, states_t))
    for pool, hidden in ((ild.pool_s, hidden_s), (ild.pool_t, hidden_t)):
        with pytest.raises(ValueError, match="hidden states"):
            pool(hidden[1:], mask)
    for bad_s, bad_t in ((states_s[:, :1], states_t), (states_s, states_t[:, :1])):
        with pytest.raises(ValueError, match="need 3 and 3 layers"):
            ild(bad_s, bad_t)


@pytest.mark.parametrize("select", R.SELECTIONS)
@pytest.mark.parametrize("distance", R.DISTANCES)
def test_any_selection_goes_with_any_distance(select, distance):
    """Catches a method known by its name, norms in 16 bits, and layers that do not fit."""
    options = {"select": select, "distance": distance}
    options |= {"labels": LABELS} if distance == "contrastive" else {}
    if select == "all" and distance in ("layerwise", "direct"):
        pytest.raises(ValueError, R.IntermediateLoss, "kd", 4, 9, 12, 16, **options)
        return
    ild = R.IntermediateLoss("kd", 4, 9, 12, 16, **options).eval()
    assert ild.layers_t == R.select_layers(select, 9, len(ild.layers_s), 0, 1)
    assert isinstance(ild.distance, R.DISTANCES[distance])
    states_s = ild.pool_s(hidden_states(4, 4, 5, 12))
    states_t = ild.pool_t(hidden_states(9, 4, 5, 16))
    torch.manual_seed(1)  # for the negatives
    expected = ild(states_s, states_t, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(ild(states_s, states_t, torch.arange(4)), expected)
        value = ild(states_s.bfloat16(), states_t.half(), torch.arange(4))
    assert value.dtype == torch.float32 and torch.allclose(value, expected, rtol=0.05)


def test_names_are_checked():
    """Catches a KeyError or a silent default for a name that does not exist."""
    unknown = [("rail", "random", "concat"), ("none", None, None), ("kd", "random", None)]
    unknown += [("rail-c", None, "far"), ("rail-c", "best", None)]
    for method, select, distance in unknown:
        with pytest.raises(ValueError, match="rail-c"):  # the known ones are named
            R.IntermediateLoss(method, 4, 9, 12, 16, select=select, distance=distance)
    for method, choice in (("rail-c", "thawed"), ("pkd-skip", "trained")):
        with pytest.raises(ValueError, match="teacher_proj"):
            R.IntermediateLoss(method, 4, 9, 12, 16, teacher_proj=choice)


# ------------------------------------------------------------------------------- whole commands
STEPS = 4  # of an epoch on 120 examples
STEP = torch.optim.AdamW, "step"
MNLI = ("entailment", "neutral", "contradiction")


def write_table(path, columns):
    """Columns -> a csv, tsv, json lines or parquet file, by its suffix; the path as text."""
    table = pandas.DataFrame(columns)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def rows_of(size, labels=("bad", "good"), seed=0):
    """Texts of the toy language with labels of that name."""
    table = R.toy_data(seed, size)
    return {"text": table["text"], "label": [labels[x == "good"] for x in table["label"]]}


TEXTS, GOLD = rows_of(120)["text"], torch.tensor(rows_of(120, (0, 1))["label"])


def two_models(folder, width, **options):
    """Flags: an untrained BERT of 4 blocks x 16, and a DistilBERT of 3 with other word ids."""
    R.make_toy_model(folder / "teacher", 4, 16)
    words = (folder / "teacher" / "vocab.txt").read_text().split("\n")
    sizes = {"vocab_size": len(words), "dim": width, "hidden_dim": 24, "n_layers": 3, "n_heads": 2}
    torch.manual_seed(0)
    model = hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes, **options))
    model.save_pretrained(folder / "student")
    (folder / "student" / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]))
    return [f"--teacher={folder / 'teacher'}", f"--student={folder / 'student'}", "--device=cpu"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return two_models(tmp_path_factory.mktemp("models"), 12)


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Flags: a teacher with a sure head, a student as wide, no dropout, odd flags as on the hub."""
    folder = tmp_path_factory.mktemp("calm")
    options = dict.fromkeys(["dropout", "attention_dropout", "seq_classif_dropout"], 0.0)
    flags = two_models(folder, 16, **options)
    config = folder / "student" / "config.json"
    odd = {"output_attentions": True, "return_dict": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    teacher = save_teacher(folder / "sure", flags, ["bad", "good"], lambda w, b: (200 * w, b))
    return [teacher, *flags[1:], "--amp=off"]


def save_teacher(folder, models, names, change=lambda weight, bias: (weight, bias)):
    """A copy of the teacher with a head of these names, which `change` may replace -> flag."""
    shutil.copytree(models[0].split("=")[1], folder)
    names = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}}
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, **names)
    head = model.classifier
    head.weight.data, head.bias.data = change(head.weight.data, head.bias.data)
    model.save_pretrained(folder)
    return f"--teacher={folder}"


def command(folder, models, *more):
    """A whole run's flags: 120 training examples, 50 to evaluate on, 2 epochs of 4 steps."""
    train = write_table(folder / "train.csv", rows_of(120))
    dev = write_table(folder / "dev.csv", rows_of(50, seed=1))
    return quick(train, dev, models, folder, "--method=rail-l", "--epochs=2", *more)


def quick(train, dev, models, folder, *more):
    """The flags of a run of one epoch without a teacher, if they are not replaced by others."""
    files = [f"--train-file={train}", f"--validation-file={dev}", f"--output-dir={folder / 'runs'}"]
    return [*files, *models, "--method=none", "--epochs=1", "--teacher-epochs=1", *more]


def process(*line, cwd=HERE, **environment):
    """A program of its own; a hang is a failure."""
    options = {"capture_output": True, "text": True, "timeout": 300, "env": CLEAN | environment}
    return subprocess.run([str(x) for x in line], cwd=cwd, **options)


@pytest.fixture
def refused(tmp_path, capsys):
    """A check that a command ends with one line that holds the words, and changes no file."""

    def check(args, *words):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as stop:
            R.main([str(arg) for arg in args])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code not in (0, None) and line.startswith("railkd.py: error: "), line
        assert all(word in line for word in words), line
        assert all(path.read_bytes() == content for path, content in before.items())

    return check


def lists(tensors):
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def weights_of(model):
    return lists(load_file(Path(model) / "model.safetensors"))


def bits(results):
    """All that must not depend on an interruption: the history without times, and the weights."""
    rows = [row | {"seconds": 0, "examples_per_s": 0} for row in results["history"]]
    return rows, results["best_epoch"], weights_of(results["model"])


def spy(patch, owner, name, note=lambda args, result: (args, result)):
    """What there is to note of each call of a function from now on, in a list."""
    original, notes = getattr(owner, name), []

    @functools.wraps(original)
    def call(*args, **options):
        result = original(*args, **options)
        notes.append(note(args, result))
        return result

    patch.setattr(owner, name, call)
    return notes


def script_scores(patch, scores):
    """The accuracies on dev, epoch by epoch: the steps that were made tell which one it is."""
    steps, last, name = spy(patch, *STEP), len(scores), "sklearn.metrics.accuracy_score"
    patch.setattr(name, lambda *_: scores[min(max(1, len(steps) // STEPS), last) - 1])


def answers(folder, texts, **cut):
    """An independent pass, text by text: logits (N, C), mean and first token of all layers."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, rows = hf.AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        tokens = tokenizer(*([text] if isinstance(text, str) else text), **cut)["input_ids"]
        with torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True, return_dict=True)
        layers = torch.cat(output.hidden_states)  # (layers, L, d)
        rows.append((output.logits[0], layers.mean(1), layers[:, 0]))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


MISTAKES = [  # a command line, what the line says
    ("--task=sst3", "--task is one of"),
    ("--train-file=a.csv", "--validation-file"),
    ("--task=sst2 --train-file=a.csv --validation-file=a.csv", "--task"),
    ("--train-file=no.csv --validation-file=no.csv", "no.csv"),
    ("--task=cola --data-root=nowhere", "nowhere"),
    ("--report=nowhere", "no finished run"),
    ("--predict=nowhere", "no finished run"),
    ("--task=toy --epochs=0", "--epochs: 0 is not positive"),
    ("--task=toy --epoch=3", "--epoch"),
    ("--task=toy --method=kd --distance=concat", "--select and --distance"),
    ("--task=toy --weights 0 0 0", "--weights"),
    ("--task=toy --temperature=0", "--temperature"),
    ("--task=toy --method=cr-ild --epochs=1", "--epochs"),
    ("--task=toy --device=tpu9", "--device"),
    ("OWN --method=rail-l --select=all", "2 slots need as many teacher layers, not 3"),
    ("OWN --method=pkd-skip --proj-dim=8", "proj_dim"),
    ("OWN --method=codir", "one process"),
    ("OWN --teacher={1} --student={0}", "cannot draw k = 3"),
    ("OWN --student=nowhere", "cannot load the student nowhere"),
]
GOOD = "text,label\na b,good\nc d,bad\ne f,good\n"
FILES = [  # name, train, dev, what the line says
    ("no label.csv", "text,target\na,x\nb,y\n", GOOD, "no label.csv", "no column label"),
    ("three texts.csv", "a,b,c,label\nx,x,x,good\ny,y,y,bad\n", GOOD, "a, b, c, label"),
    ("empty.csv", "", GOOD, "empty.csv: it is empty"),
    ("gap.csv", "text,label\na,good\n,bad\n", GOOD, "gap.csv: row 2 has no text"),
    ("short.csv", "text,label\na,good\nb\n", GOOD, "short.csv: row 2 has no label"),
    ("long.csv", "text,label\na,good\nb,bad,x\n", GOOD, "cannot read", "long.csv"),
    ("list.jsonl", '{"text": ["a"], "label": "x"}\n', GOOD, "list.jsonl: need rows"),
    ("cut.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "la', GOOD, "cut.jsonl"),
    ("quote.csv", 'text,label\n"a,good\nb,bad\n', GOOD, "cannot read", "quote.csv"),
    ("hidden.csv", "text,label\na,-1\nb,-1\n", GOOD, "hidden.csv", "'-1'"),
    ("one class.csv", GOOD[:20], GOOD[:20], "one class.csv: all labels"),
    ("good.csv", GOOD, GOOD + "g,so\n", "dev.csv", "bad, good", "'so'"),
    ("minus.csv", "text,label\na,0\nb,1\nc,-1\n", GOOD, "minus.csv", "0, 1", "'-1'"),
    ("pair.csv", "a,b,label\nx,y,good\nz,x,bad\n", GOOD, "dev.csv: need the texts ['a', 'b']"),
    ("number.csv", "text,label\na,0.5\nb,1.5\n", GOOD, "dev.csv", "numbers", "'good'"),
    ("nan.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', GOOD, "row 2"),
]
LABELS_OF_FILES = [  # the labels in the file, the classes in order; none: a regression
    (["schlecht, sehr", "gut"], ["gut", "schlecht, sehr"]),
    (["01", "1"], ["01", "1"]),
    ([5, 10, 3], ["3", "5", "10"]),
    (["NA", "None", "nan"], ["NA", "None", "nan"]),
    (["v1.0", "v2.0"], ["v1.0", "v2.0"]),
    (["3.4", "2"], []),
    ([1.5, 2.0], []),
]
SUBMITTED = [  # task, its names, its test splits, what it answers, the files
    ("mnli", MNLI, ["test_matched", "test_mismatched"], MNLI, ["MNLI-m.tsv", "MNLI-mm.tsv"]),
    ("rte", ("entailment", "not_entailment"), ["test"], None, ["RTE.tsv"]),
    ("cola", ("unacceptable", "acceptable"), ["test"], "01", ["CoLA.tsv"]),
    ("sst2", ("negative", "positive"), ["test"], "01", ["SST-2.tsv"]),
    ("stsb", None, ["test"], None, ["STS-B.tsv"]),
]


@pytest.mark.parametrize("line, words", MISTAKES)
def test_mistakes_on_the_command_line(tmp_path, models, refused, monkeypatch, line, words):
    """Catches a mistake that is not seen, or seen after hours of work, or told in a traceback."""
    monkeypatch.chdir(tmp_path)
    if "codir" in line:
        monkeypatch.setenv("RANK", "0")  # as under torchrun
    flags = line.format(*[x.split("=")[1] for x in models]).replace("OWN ", "").split()
    refused(command(tmp_path, models, *flags) if line.startswith("OWN") else flags, words)


@pytest.mark.parametrize("row", FILES, ids=[row[0] for row in FILES])
def test_mistakes_in_files(tmp_path, models, refused, row):
    """Catches rows that are lost or shifted, labels that are made up, and -1 as one more class."""
    name, train, dev, *words = row
    (tmp_path / name).write_text(train, "latin-1")
    (tmp_path / "dev.csv").write_text(dev)
    refused(quick(tmp_path / name, tmp_path / "dev.csv", models, tmp_path), *words)


def read_labels(train, dev):
    """-> the data of a training file and an evaluation file, as the command reads them."""
    return R.Data(R.parse([f"--train-file={train}", f"--validation-file={dev}"]))


def write_classes(path, names, numbers, **texts):
    """A parquet file as on the hub: numbers of classes, whose names are in the file, or floats."""
    kinds = dict.fromkeys(texts, Value("string"))
    kinds["label"] = ClassLabel(names=list(names)) if names else Value("float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(texts | {"label": numbers}, features=Features(kinds)).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("labels, names", LABELS_OF_FILES)
def test_one_rule_for_the_labels_of_all_formats(tmp_path, suffix, labels, names):
    """Catches words that are read as numbers or as nothing, and scores in text as 26 classes."""
    rows = {"label": labels * 3, "text": ["a b"] * len(labels) * 3}
    path = write_table(tmp_path / f"rows{suffix}", rows)
    data = read_labels(path, path)
    expected = [names.index(str(x)) if names else float(x) for x in labels * 3]
    assert data.labels["train"].tolist() == pytest.approx(expected) and data.names == names
    assert data.labels["train"].is_floating_point() != bool(names)
    assert data.texts["train"].column_names == ["text"]


def test_odd_files_are_read(tmp_path, models):
    """Catches a mark, a quote or an index in the text, texts of a pair that change places, classes
    that are lost, and a subset that depends on the seed."""
    for name, content in {
        "mark.csv": "\ufefflabel,text\ngood,a b\nbad,c d\n",
        "quote.tsv": 'label\ttext\ngood\t"a b\nbad\tc "d\n',
        "index.csv": ",text,label\n0,a,good\n1,b,bad\n",
        "ids.csv": "id,text,idx,label\n1,a,7,good\n2,b,8,bad\n",
        "two lines.CSV": 'text,label\n"a ""b"", c",good\n"x\ny",bad\n',
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        data = read_labels(tmp_path / name, tmp_path / name)
        assert data.names == ["bad", "good"] and len(data.labels["train"]) == 2, name
        assert data.texts["train"].column_names == ["text"]
    pairs = {"a": [*"wxyz"], "b": [*"stuv"], "label": [*"cdcd"]}
    turned = {name: pairs[name] for name in ("b", "label", "a")}
    data = read_labels(
        *(write_table(tmp_path / f"{i}.csv", x) for i, x in enumerate([pairs, turned]))
    )
    assert data.texts["validation"].column_names == ["a", "b"]
    named = write_classes(tmp_path / "a.parquet", "cabd", [0, 0, 1, 2], text=[*"wxyz"])
    others = write_classes(tmp_path / "b.parquet", "abc", [0, 1, 2], text=[*"xyz"])
    data = read_labels(named, others)
    assert data.names == [*"cabd"] and data.labels["validation"].tolist() == [1, 2, 0]
    args = command(tmp_path, models, "--max-train-examples=20")
    one, two = (R.Data(R.parse([*args, f"--seed={i}"])).texts["train"]["text"][:] for i in (1, 2))
    assert one == two != TEXTS[:20] and len(one) == 20 and set(one) <= set(TEXTS)


def make_glue(root, task="mnli", names=MNLI, dev=("validation_matched",), tests=(), size=60):
    """A clone in the hub's layout, README included; the text's first word tells the label."""
    splits, glue = ["train", *dev, *tests], root / "nyu-mll" / "glue"
    lines = [f"configs:\n- config_name: {task}\n  data_files:"]
    lines += [f"  - split: {split}\n    path: {task}/{split}-*" for split in splits]
    for i, split in enumerate(splits):
        labels = [(row + i) % len(names) if names else row % 9 / 2 for row in range(size)]
        texts = {"premise": [f"word{int(10 * x)} is word{int(x)}" for x in labels]}
        texts["hypothesis"] = ["the noun1 " + split.replace("_", " ")] * size
        labels = [-1] * size if split in tests else labels
        write_classes(glue / task / f"{split}-00000-of-00001.parquet", names, labels, **texts)
    (glue / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    return [f"--task={task}", f"--data-root={root}", "--method=none", "--epochs=1"]


@pytest.mark.parametrize("row", SUBMITTED, ids=[" ".join(row[4]) for row in SUBMITTED])
def test_submission_is_what_the_model_says(tmp_path, models, row):
    """Catches other names, numbers instead of words, another order, and a score of 5.1."""
    task, names, tests, words, files = row
    dev = ["validation_matched"] if task == "mnli" else ["validation"]
    data = make_glue(tmp_path, task, names, dev, tests, size=30)
    args = [*data, *models, "--amp=off", f"--output-dir={tmp_path / 'runs'}", "--lr=0.01"]
    run = Path(R.main(args)["model"]).parent
    assert R.main(["--predict", str(run)]) == {}
    assert sorted(path.name for path in (run / "submission").iterdir()) == files
    for split, file in zip(tests, files, strict=True):
        path = f"nyu-mll/glue/{task}/{split}-00000-of-00001.parquet"
        texts = pandas.read_parquet(tmp_path / path)
        logits = answers(run / "model", zip(texts["premise"], texts["hypothesis"], strict=True))[0]
        said = pandas.read_csv(run / "submission" / file, sep="\t", dtype=str)
        assert [*said] == ["index", "prediction"] and [*said["index"]] == [*map(str, range(30))]
        if names:
            assert [*said["prediction"]] == [(words or names)[i] for i in logits.argmax(1)]
        else:
            assert all(re.fullmatch(r"\d\.\d{3}", score) for score in said["prediction"])
            scores = [*map(float, said["prediction"])]
            assert scores == pytest.approx(logits[:, 0].clamp(0, 5), abs=0.0006)


def test_mnli_and_predictions_of_a_file(tmp_path, models, refused, monkeypatch):
    """Catches mixed dev sets, a lost text, a map before the argmax, other columns, a stale file."""
    data = make_glue(tmp_path, dev=["validation_matched", "validation_mismatched"], size=30)
    args = [*data, *models, "--amp=off", "--max-length=12", f"--output-dir={tmp_path}", "--lr=0.01"]
    with monkeypatch.context() as patch:
        calls = spy(patch, R.Encoder, "run")
        results = R.main(args)
    run, row = Path(results["model"]).parent, results["history"][0]
    assert [*row["metrics"]] == ["accuracy", "accuracy_mismatched"]
    assert results["best_score"] == row["score"] == row["metrics"][results["metric"]]
    assert results["labels"] == list(MNLI) and results["columns"] == ["premise", "hypothesis"]
    ids = [batch["input_ids"] for (_, batch), _ in calls]
    assert all((x == 3).sum() == 2 * len(x) for x in ids)  # two [SEP]
    one, two = rows_of(50, seed=3)["text"], rows_of(50, seed=4)["text"]
    table = {"hypothesis": two, "premise": one, "label": ["entails", "neutral"] * 25}
    args = ["--predict", str(run), "--test-file", write_table(tmp_path / "other.tsv", table)]
    logits = answers(run / "model", zip(one, two, strict=True), truncation=True, max_length=12)[0]
    expected = [["entails", "neutral", "neutral"][i] for i in logits.argmax(1)]
    named = "neutral=neutral,contradiction=neutral,entailment=entails"
    found = R.main([*args, "--label-map", named])
    said = pandas.read_csv(run / "predictions.tsv", sep="\t")
    assert [*said] == ["index", "prediction", "probability"] and [*said["prediction"]] == expected
    chances = logits.softmax(1).max(1).values.tolist()
    assert [*said["probability"]] == pytest.approx(chances, abs=0.0001)
    right = sum(x == y for x, y in zip(expected, table["label"], strict=True)) / 50
    assert found == {"file": args[3], "n": 50, "metrics": {"accuracy": right}}
    assert json.loads((run / "predictions.json").read_text()) == found
    unfit = [
        ("--label-map entailment=a,neutral=b", "a,b,label\na,b,a\n", "contradiction"),
        ("--label-map entailment=a,neutral=b,contradiction=c", "a,b,label\na,b,x\n", "a, b, c"),
        ("", "a,label\nx,entailment\n", "premise"),
        ("", "a,b,label\na,b,maybe\n", "'maybe'"),
    ]
    for line, content, words in unfit:
        (tmp_path / "bad.csv").write_text(content)
        refused([*args[:3], tmp_path / "bad.csv", *line.split()], words)
    for hidden in ({}, {"label": [-1] * 50}):
        write_table(tmp_path / "other.tsv", {"b": two, "a": one} | hidden)
        assert R.main(args) == {"file": args[3], "n": 50}
        assert not (run / "predictions.json").exists()


def test_metrics():
    """Against sums by hand. Catches a macro mean, another order, and nan for constant answers."""
    labels, found = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    for task in ("mrpc", "qqp"):  # the first selects the epoch
        scores = [*R.measure(task, found, labels).items()]
        assert scores == [("f1", pytest.approx(2 / 3)), ("accuracy", pytest.approx(2 / 3))]
    assert R.measure("cola", found, labels) == pytest.approx({"matthews": 1 / 3})
    assert R.measure("own", found, labels) == pytest.approx({"accuracy": 2 / 3})
    labels, found = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 9.0])
    # deviations -2 -1 0 3 and -3 -1 -2 6: 6 + 1 + 0 + 18 over the root of 14 * 50
    expected = {"pearson": 25 / 700**0.5, "spearman": 1 - 6 * 2 / (4 * 15)}
    assert R.measure("stsb", found, labels) == pytest.approx(expected)
    assert set(R.measure("own", torch.ones(4), labels).values()) == {0.0}


# -------------------------------------------------------------------- the teacher, the training
def test_a_teacher_of_no_use_is_told(tmp_path, models, calm, capsys, refused):
    """Catches silence on other labels, order or scale, and an overflow; a warning ends no run."""
    theirs = dict(enumerate(["Billing", "question", "other", "bug"]))
    assert R.label_order(theirs, ["billing", "bug", "other", "question"]) == [0, 3, 2, 1]
    assert R.label_order({0: "x", 1: "A"}, ["a", "x"]) == [1, 0]
    huge = save_teacher(tmp_path / "huge", calm, ["bad", "good"], lambda w, b: (w * 1e6, b))
    refused(command(tmp_path, calm, huge, "--amp=fp16"), "not finite", "--amp off", huge[10:])
    assert not [*tmp_path.rglob("*.arrow")]
    three = save_teacher(tmp_path / "three", models, "abc")
    refused(command(tmp_path, models, three), "3 labels, the data 2")
    scores, told = [], []
    for names in (["bad", "good"], ["GOOD", "Bad"], ["LABEL_0", "LABEL_1"]):
        turn = (lambda w, b: (w, b)) if "bad" in names else (lambda w, b: (w.flip(0), b.flip(0)))
        flags = ["--method=kd", "--epochs=1", f"--name={names[0]}", "--amp=off"]
        teacher = save_teacher(tmp_path / names[0], calm, names, turn)
        scores.append(R.main(command(tmp_path, calm, *flags, teacher))["teacher_score"])
        told.append(capsys.readouterr().out)
    assert scores[1] == scores[0] and scores[2] == pytest.approx(1 - scores[0]) != scores[0]
    worse = told[0] if scores[0] < 0.5 else told[2]
    assert "WARNING: the teacher is no better than one answer for all" in worse
    scorer = save_teacher(tmp_path / "scorer", models, ["score"])
    found = answers(tmp_path / "scorer", TEXTS[:60])[0][:, 0]
    stretched = 5 * (found - found.min()) / (found.max() - found.min())  # from 0 to 5
    for name, labels in (("same", found), ("stretched", stretched)):
        rows = {"text": TEXTS[:60], "label": labels.tolist()}
        path = write_table(tmp_path / f"{name}.jsonl", rows)
        flags = ["--method=kd", "--amp=off", f"--name={name}", scorer]
        results = R.main(quick(path, path, models, tmp_path, *flags))
        assert results["teacher_score"] > 0.99 and results["labels"] is None
        assert ("WARNING: the teacher" in capsys.readouterr().out) == (name == "stretched")


def test_no_input_exceeds_what_a_model_can_take(tmp_path, capsys, refused):
    """Catches an IndexError: positions after a padding index, one type of token, odd words."""
    R.make_toy_model(tmp_path / "roberta", 2, 16)  # for its words
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 89}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 20, "type_vocab_size": 1}
    hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes)).save_pretrained(tmp_path / "roberta")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 20}
    (tmp_path / "roberta" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = {"a": ["the noun1 is not " * 9, "the"], "b": ["word3 is", "is"], "label": ["x", "y"]}
    path = write_table(tmp_path / "long.csv", rows)
    flags = [f"--student={tmp_path / 'roberta'}", "--device=cpu"]
    results = R.main(quick(path, path, flags, tmp_path))
    assert "1 reach the limit of 18 tokens" in capsys.readouterr().out
    assert results["last_score"] in (0.0, 0.5, 1.0)
    with (tmp_path / "roberta" / "vocab.txt").open("a") as file:
        file.write("\nmore\nwords")
    refused(quick(path, path, flags, tmp_path, "--seed=1"), "91 words for 89 embeddings")


def test_cache_is_what_the_teacher_says(tmp_path, calm, monkeypatch):
    """Catches other rows, layers or pooling, a second pass, and a cache that serves others."""
    cache, asked = tmp_path / "runs" / "teacher-cache", spy(monkeypatch, R.Encoder, "answer")

    def count_after(*more):
        asked.clear()
        R.main(command(tmp_path, calm, "--epochs=1", "--overwrite", *more))
        kinds = [args[0].model.config.model_type for args, _ in asked]
        return len([*cache.glob("*.arrow")]), "bert" in kinds

    assert count_after() == (2, True)  # of dev the logits alone
    table = max((Dataset.from_file(str(x)) for x in cache.glob("*.arrow")), key=len)
    assert table.features["layer_1"].feature.dtype == "float16"
    logits, means, _ = answers(calm[0].split("=")[1], TEXTS)
    table = table.with_format("numpy")
    assert np.allclose(table["logits_t"][:], logits, atol=1e-3)
    for i in range(1, 5):
        assert np.allclose(np.stack(table[f"layer_{i}"][:]), means[:, i], atol=2e-3, rtol=2e-3)
    for more in (["--seed=1"], ["--method=kd"], ["--method=ckd", "--lr=0.001", "--batch-size=9"]):
        assert count_after(*more) == (2, False)
    moved = save_teacher(tmp_path / "moved", calm, ["bad", "good"], lambda w, b: (w, b + 1e-3))
    other = {"--method=pkd-last": 3, "--max-length=8": 5, "--amp=bf16": 7, moved: 9}
    assert all(count_after(flag) == (count, True) for flag, count in other.items())


def test_teacher_without_a_head_is_made_once(tmp_path, models, monkeypatch):
    """Catches a teacher that depends on method, seed or decay, decay on biases, maps left out."""
    steps, made = spy(monkeypatch, *STEP), []
    for more in (["--method=kd", "--seed=2"], ["--method=rail-l", "--weight-decay=0.02"]):
        results = R.main(command(tmp_path, models, *more))
        made.append((results["teacher"], weights_of(results["teacher"])))
    assert made[0] == made[1]
    assert len(steps) == (1 + 2 + 2) * STEPS
    high, low = steps[-1][0][0].param_groups
    assert all(p.ndim >= 2 for p in high["params"]) and high["weight_decay"] == 0.02
    assert all(p.ndim < 2 for p in low["params"]) and low["weight_decay"] == 0.0
    trained = sum(p.numel() for p in high["params"] + low["params"])
    assert trained == results["params_s"] + 128 * (12 + 1)  # with the student's map
    folder = Path(results["teacher"]).parent
    assert folder.name.startswith("teacher-teacher-") and folder.parent == tmp_path / "runs" / "own"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-001", "model"]


KEYS = """task method seed metric best_score best_epoch last_score teacher teacher_score labels
    model teacher_metrics columns params_s params_t collapsed config versions device history"""
ROW = "stage epoch layers_t loss ce kd ild mix cosine_s seconds examples_per_s metrics score"
CASES = [*R.METHODS, "rail-l --select=last", "pkd-skip --distance=concat"]
CASES += ["kd --select=final --distance=layerwise", "rail-c --distance=contrastive --weights 1 0 2"]


@pytest.mark.parametrize("case", CASES)
def test_every_method_runs(tmp_path, calm, case):
    """Catches a lost key or flag, a term without its weight, another draw, and a file left over."""
    method, *more = case.split()
    results = R.main(command(tmp_path, calm, f"--method={method}", *more, "--epochs=4"))
    folder, row = tmp_path / "runs" / "own" / f"{method}-seed42", R.METHODS[method]
    assert sorted(x.name for x in folder.iterdir()) == ["model", "results.json"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert {*KEYS.split()} == {*results} and results["model"] == str(folder / "model")
    assert (results["teacher_score"] is None) == (results["teacher"] is None) == (method == "none")
    halves = [1, 1, 2, 2] if len(row.stages) == 2 else [1, 1, 1, 1]
    assert [x["stage"] for x in results["history"]] == halves
    for epoch, x in enumerate(results["history"], 1):
        weights = row.stages[x["stage"] - 1]._asdict()
        if "--weights" in case:
            weights |= {"ce": 1, "kd": 0, "ild": 2}
        elif "kd --select" in case:  # a distance makes it a method of three terms
            weights |= {"ce": 1 / 3, "kd": 1 / 3, "ild": 1 / 3}
        terms = [name for name in ("ce", "kd", "ild", "mix") if weights[name] or name == "ce"]
        assert {*ROW.split()} == {*x} and x["epoch"] == epoch
        assert all((x[name] is None) == (name not in terms) for name in ("ce", "kd", "ild", "mix"))
        total = sum(weights[name] * x[name] for name in terms)
        assert x["loss"] == pytest.approx(total, rel=1e-4, abs=1e-6)
        select = results["config"]["select"] or row.select
        drawn = weights["ild"] and R.select_layers(select, 4, 2 - (select == "final"), 42, epoch)
        assert x["layers_t"] == (drawn or None)
    last = [x for x in results["history"] if x["stage"] == halves[-1]]
    best = max(last, key=lambda x: x["score"])
    assert (results["best_epoch"], results["best_score"]) == (best["epoch"], best["score"])
    assert results["last_score"] == last[-1]["score"]
    config = hf.AutoConfig.from_pretrained(results["model"])
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": 0, "good": 1}


@pytest.mark.parametrize("method", ["rail-c", "codir", "pkd-skip", "cr-ild", "reverse"])
def test_terms_are_those_of_the_two_models(tmp_path, calm, method, monkeypatch):
    """At lr 0, catches another row, layer, pooling, label or temperature by a pass of its own."""
    calls, row, orders = spy(monkeypatch, R.IntermediateLoss, "forward"), R.METHODS[method], []
    more = [f"--method={method}", "--lr=0", "--temperature=3", "--epochs=4"]
    results = R.main(command(tmp_path, calm, *more))
    logits_s, *states_s = answers(results["model"], TEXTS)
    logits_t, *states_t = answers(calm[0].split("=")[1], TEXTS)
    which = [R.mean_pool, R.first_token].index(row.pool)
    ce, kd = F.cross_entropy(logits_s, GOLD).item(), R.kd_loss(logits_s, logits_t, 3.0).item()
    assert kd > 0.1
    for x in results["history"]:
        assert x["ce"] == pytest.approx(ce, abs=1e-5)
        assert x["kd"] is None or x["kd"] == pytest.approx(kd, rel=1e-4)
        if x["ild"] is None:
            continue
        steps = calls[(x["epoch"] - 1) * STEPS : x["epoch"] * STEPS]
        given_s, given_t, index = (torch.cat([args[i] for args, _ in steps]) for i in (1, 2, 3))
        orders.append(tuple(index.tolist()))
        assert sorted(orders[-1]) == [*range(120)]
        layers_s = [3] if method == "cr-ild" else [1, 2]
        assert torch.allclose(given_s, states_s[which][index][:, layers_s], atol=1e-4)
        expected = states_t[which][index][:, x["layers_t"]]
        assert torch.allclose(given_t, expected, atol=2e-3, rtol=2e-3)
        total = sum(value.item() * len(args[3]) for args, value in steps) / 120
        assert x["ild"] == pytest.approx(total, rel=1e-5)
    assert len({*orders}) == len(orders)  # another order in each epoch


def norm_and_rate(args, _):
    """Of an optimizer's step: the norm of all gradients, and the learning rate."""
    groups = args[0].param_groups
    grads = [p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]
    return torch.cat(grads).norm().item(), groups[0]["lr"]


@pytest.mark.parametrize("case", ["rail-c/off/20", "rail-c/fp16/20", "cr-ild/off/8,12"])
def test_gradients_and_rates_of_every_step(tmp_path, calm, monkeypatch, case):
    """Catches clipping before the scale of fp16 is taken away, and a schedule over all stages."""
    (method, amp, parts), expected = case.split("/"), []
    steps = spy(monkeypatch, *STEP, norm_and_rate)
    more = [f"--method={method}", "--epochs=5", "--lr=0.001", "--warmup=0.25", f"--amp={amp}"]
    more += ["--weights", "50", "50", "50"] if method == "rail-c" else []
    results = R.main(command(tmp_path, calm, *more))
    assert ("float16" in results["device"]) == (amp == "fp16")
    for size in map(int, parts.split(",")):
        warm = size // 4
        expected += [0.001 * step / warm for step in range(warm)]
        expected += [0.001 * (size - step) / (size - warm) for step in range(warm, size)]
    if amp == "off":  # fp16 leaves out the steps whose gradients overflow
        assert [rate for _, rate in steps] == pytest.approx(expected)
    finite = [norm for norm, _ in steps if math.isfinite(norm)]
    assert len(finite) >= 12 and max(finite) < 1.01
    assert method == "cr-ild" or min(finite[-4:]) > 0.9


def test_mixed_inputs(tmp_path, calm, monkeypatch):
    """Catches shares swapped, a batch not reversed, clean states that learn, no normalisation; an
    unmixed text, a mask of one text, a constant share, and a weight that does not grow."""
    mixed, clean = torch.randn(2, B, 2, D_S, requires_grad=True)
    loss, m, c = R.mixup_loss(mixed, clean, 0.7), unit(to_numpy(mixed)), unit(to_numpy(clean))
    expected = 0.7 * ((m - c) ** 2).sum() + 0.3 * ((m - c[::-1]) ** 2).sum()
    assert loss.item() == pytest.approx(expected / (B * 2), rel=1e-5)
    from_mixed, from_clean = torch.autograd.grad(loss, (mixed, clean), allow_unused=True)
    assert from_mixed.abs().sum() > 0 and from_clean is None
    calls = spy(monkeypatch, R.Encoder, "run")
    more = ["--method=cr-ild", "--lr=0", "--epochs=4", "--batch-size=8"]
    results = R.main(command(tmp_path, calm, *more))
    shares, values = [], []
    for (_, (_, hidden, mask)), ((student, batch, *share), mixed) in itertools.pairwise(calls):
        if not share:
            continue  # this is no pair of a clean batch and its mixture
        words = student.model.get_input_embeddings()(batch["input_ids"])
        inputs = {"inputs_embeds": share[0] * words + (1 - share[0]) * words.flip(0)}
        inputs["attention_mask"] = both = mask.maximum(mask.flip(0))
        again = student.model(**inputs, output_hidden_states=True)
        assert torch.equal(mixed[2], both)
        assert torch.allclose(mixed[1][3], again.hidden_states[3], atol=1e-5)
        state_m, state = R.mean_pool(mixed[1][3], both), R.mean_pool(hidden[3], mask)
        shares += share
        values.append(R.mixup_loss(state_m[:, None], state[:, None], share[0]).item())
    assert len(values) == 30 and 0.5 <= min(shares) < 0.6 and 0.9 < max(shares) <= 1.0
    means = [sum(values[:15]) / 15 / 2, sum(values[15:]) / 15]  # its weight grows by e / E
    assert [row["mix"] for row in results["history"][:2]] == pytest.approx(means, rel=1e-3)


def test_pro_kd_follows_the_teacher(tmp_path, models, calm, capsys):
    """Catches a checkpoint or temperature off by one epoch, and weights of the wrong stage."""
    more = (
        "--method=pro-kd --teacher-epochs=3 --teacher-lr=0.03 --lr=0 --epochs=8 --weights .5 .5 0"
    )
    results = R.main(command(tmp_path, calm, models[0], *more.split()))
    assert "3 checkpoints" in capsys.readouterr().out
    folder, logits_s = Path(results["teacher"]).parent, answers(results["model"], TEXTS)[0]
    known = [answers(folder / f"epoch-00{i}", TEXTS)[0] for i in (1, 2, 3)]
    pairs = zip((known[0], known[0], known[1], known[2]), (7, 5, 3, 1), strict=True)
    expected = [R.kd_loss(logits_s, logits_t, t, 7.0).item() for logits_t, t in pairs]
    expected += [R.kd_loss(logits_s, known[2], 2.0).item()] * 4  # the last stage, the last teacher
    assert [row["kd"] for row in results["history"]] == pytest.approx(expected, rel=1e-3)
    assert len({f"{x:.3g}" for x in expected}) == 5
    for row in results["history"]:
        loss = row["kd"] if row["stage"] == 1 else (row["ce"] + row["kd"]) / 2
        assert row["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("method, epoch", [("pro-kd", 1), ("cr-ild", 5)])
def test_stages_and_patience(tmp_path, calm, method, epoch, monkeypatch):
    """Catches a stage from another epoch, patience off by one, a best epoch of stage 1, a tie."""
    script_scores(monkeypatch, [0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.5, 0.5, 0.4, 0.9])
    before = spy(monkeypatch, R.Objective, "set_epoch", lambda x, _: lists(x[0].model.state_dict()))
    after = spy(monkeypatch, R, "train_epoch", lambda x, _: lists(x[0].model.state_dict()))
    more = [f"--method={method}", "--epochs=10", "--patience=2", "--lr=0.01"]
    results = R.main(command(tmp_path, calm, *more))
    for other in (1, 2, 3, 4, 5):
        assert (before[5] == after[other - 1]) == (other == epoch)
    rows = [(row["epoch"], row["stage"], row["score"]) for row in results["history"]]
    assert rows[4:] == [(5, 1, 0.5), (6, 2, 0.2), (7, 2, 0.5), (8, 2, 0.5), (9, 2, 0.4)]
    found = results["best_epoch"], results["best_score"], results["last_score"]
    assert found == (7, 0.5, 0.4) and weights_of(results["model"]) == after[6]


def test_runs_that_go_wrong_are_told(tmp_path, models, monkeypatch, capsys, refused):
    """Catches an alarm that is silent, false or forgotten: collapse, nothing learned, NaN."""
    args = command(tmp_path, models, "--method=none")
    with monkeypatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum() * math.nan)
        refused(args, "epoch 1, step 4: the loss is not finite")
    script_scores(monkeypatch, [0.5])  # no better than one answer for all
    assert not R.main(args)["collapsed"]
    assert "WARNING: the student has learned nothing" in capsys.readouterr().out
    pool, steps = R.mean_pool, spy(monkeypatch, *STEP)
    monkeypatch.setattr(R, "mean_pool", lambda *x: pool(*x) * 1e-3 + 1 if steps else pool(*x))
    for _ in range(2):
        results = R.main([*args, "--seed=2"])
        assert results["collapsed"] and results["history"][0]["cosine_s"] > 0.99
        assert "WARNING: the student has collapsed" in capsys.readouterr().out


def test_results_come_back_and_are_not_mixed_up(tmp_path, models, capsys, monkeypatch, refused):
    """Catches a second training, results of other flags or data, no seed, and lost results."""
    args = command(tmp_path, models, "--lr=0.003")
    first = R.main(args)
    one = bits(first)
    with monkeypatch.context() as patch:
        steps = spy(patch, *STEP)
        assert R.main(args) == first and not steps
    assert first["model"] in capsys.readouterr().out
    torch.manual_seed(5)
    assert bits(R.main([*args, "--overwrite"])) == one
    refused([*args, "--lr=0.5", "--epochs=3"], "--lr", "--epochs", "--name")
    refused([*args, "--overwrite", "--student=nowhere"], "nowhere")
    named = R.main([*args, "--lr=0.001", "--name=slow"])
    assert Path(named["model"]).parent.name == "rail-l-slow-seed42" and bits(named) != one
    other = R.main([*args, "--seed=1"])
    assert bits(other)[0] != one[0] and other["teacher_score"] == first["teacher_score"]
    answer = hf.pipeline("text-classification", model=first["model"])("the noun1 is word3")
    assert answer[0]["label"] in ("bad", "good")
    write_table(tmp_path / "dev.csv", rows_of(49, seed=1))  # other data under the same name
    refused(args, "content of", "dev.csv")


@pytest.mark.parametrize("method", ["rail-l", "codir", "cr-ild", "pro-kd"])
def test_stopped_runs_go_on(tmp_path, models, method, monkeypatch, capsys, refused):
    """Catches a bank, schedule, best score or stage that a stop loses, also while it saves."""
    flags = [f"--method={method}", "--epochs=4", "--lr=0.003", "--teacher-lr=0.003"]
    args = command(tmp_path, models, *flags, "--teacher-epochs=2")
    whole = R.main([*args, f"--output-dir={tmp_path / 'whole'}"])
    left = []

    def stop(*_):
        left[-1] -= 1
        if left[-1] == 0:
            raise KeyboardInterrupt

    for owner, name, count in [(*STEP, 6), (*STEP, 13), (*STEP, 6), (Path, "write_bytes", 1)]:
        left.append(count)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            spy(patch, owner, name, stop)
            R.main(args)
        assert stopped.value.code == 130
    refused([*args, "--lr=0.5"], "checkpoint.pt", "--lr", "--name")
    again = R.main(args)
    assert "resumed after epoch 3" in capsys.readouterr().out and bits(again) == bits(whole)
    assert sorted(os.listdir(Path(again["model"]).parent)) == ["model", "results.json"]


# ------------------------------------------------------------- the script, the command, the README
README = (HERE / "README.md").read_text(encoding="utf-8")
SHARED = HERE.parent / "shared" / "hub"
USE = """import random, sys, torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing import NamedTuple
for library in ("transformers", "datasets", "sklearn", "scipy", "pandas", "numpy", "tqdm"):
    sys.modules[library] = None
{method}
ild = IntermediateLoss('rail-l', 4, 6, 8, 10)
s, t = [torch.ones(2, 3, 8)] * 5, [torch.ones(2, 3, 10)] * 7
print(ild(ild.pool_s(s, torch.ones(2, 3)), ild.pool_t(t, torch.ones(2, 3))).item() >= 0)"""
FAKE = """#!/bin/sh
shift
echo "$@" >> {folder}/calls
case "$*" in *stop*) exit 130 ;; *"kd --seed 2"*) exit 1 ;; esac
"""
RANKS = """import runpy, sys
sys.path.insert(0, sys.argv[1])
import railkd
railkd.main([*sys.argv[3:], f"--output-dir={sys.argv[2]}/uneven", "--batch-size=16"])
sys.argv[1:] = [*sys.argv[3:], f"--output-dir={sys.argv[2]}/even", "--batch-size=15"]
runpy.run_path(railkd.__file__, run_name="__main__")
"""


def test_script_runs_the_whole_grid(tmp_path):
    """Catches a run left out, a failure that is silent or stops the rest, and a deaf Ctrl-C."""
    (tmp_path / "python3").write_text(FAKE.format(folder=tmp_path))
    (tmp_path / "python3").chmod(0o755)
    line = ["bash", "run_glue.sh"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "METHODS": "none kd", "SEEDS": "1 2"}
    done = process(*line, "--output-dir", "out", "--epochs=3", **path, TASKS="cola rte", SEARCH="1")
    expected, points = [], itertools.product(("1e-5", "2e-5", "5e-5", "4e-6"), (8, 16, 32))
    runs = [*itertools.product(("cola", "rte"), ("none", "kd"), "12")]
    for (lr, size), (task, method, seed) in itertools.product(points, runs):
        run = f"--task {task} --method {method} --seed {seed} --output-dir out"
        point = f"--name lr{lr}-batch{size} --lr {lr} --batch-size {size}"
        expected.append(f"{run} {point} --epochs=3")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [*expected, "--report out"] and done.returncode == 1
    assert len([x for x in done.stderr.splitlines() if " kd seed 2" in x]) == len(expected) // 4
    stopped = process(*line, "stop", **path, TASKS="cola")
    assert stopped.returncode == 130 and stopped.stdout.count("== ") == 1


def test_torch_alone_is_enough():
    """For the method part, copied from between its two comments, and to import the file."""
    code = (HERE / "railkd.py").read_text(encoding="utf-8")
    part = code.split("# ==== the method\n")[1].split("# ==== end of the method")[0]
    for method in (part, "from railkd import *"):
        done = process(sys.executable, "-c", USE.format(method=method))
        assert done.stdout == "True\n" and not done.stderr, done.stderr


def test_defaults_are_the_documented_ones(capsys):
    """Catches a default that was changed for a try, and a flag without help."""
    args = vars(R.parse(["--task", "sst2"]))
    expected = {"method": "rail-l", "epochs": 40, "patience": None, "batch_size": 32, "lr": 2e-5}
    expected |= {"temperature": 2.0, "max_length": 128, "seed": 42, "teacher_epochs": 3}
    expected |= {"weights": None, "start": "ridge", "teacher": "google-bert/bert-base-uncased"}
    expected |= {"student": "distilbert/distilbert-base-uncased"}
    assert {name: args[name] for name in expected} == expected and len(args) == 35
    assert R.parse(["--task=toy"]).lr == 1e-3 and R.parse(["--task=toy", "--lr=0.5"]).lr == 0.5
    assert R.parse(["--task=toy", "--method=cr-ild"]).epochs == 16
    assert R.parse(["--task=sst2", "--method=none", "--teacher=x"]).teacher is None
    pytest.raises(SystemExit, R.main, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in args)


def test_a_torch_for_gpus_runs_without_one(monkeypatch):
    """Catches the accelerator that torch was built for, which is not there on a laptop."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert R.Machine(R.parse(["--task=toy"])).device.type == "cpu"


def test_readme_names_what_there_is():
    """Catches a method that the README forgets, and a flag that does not exist."""
    names = [*R.METHODS, *(distance.__name__ for distance in R.DISTANCES.values())]
    assert all(f"`{name}`" in README for name in names)
    flags = {name.replace("_", "-") for name in vars(R.parse(["--task", "sst2"]))}
    flags |= {"help", "no-shared-proj", "nproc-per-node"}
    assert set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", README)) <= flags


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_code_runs(block, tmp_path, monkeypatch):
    """Catches a loop in the README that does not run any more."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs clones of GLUE in ../shared/hub")
def test_real_glue_is_read():
    """Catches a renamed column, test labels of -1 that come in, and label names that get lost."""
    for task in ("sst2", "cola", "mrpc", "stsb", "rte", "wnli", "mnli"):
        data = R.Data(
            R.parse([f"--task={task}", f"--data-root={SHARED}", "--max-train-examples=50"])
        )
        assert bool(data.names) == (task != "stsb") and data.labels[data.dev[0]].min() >= 0
        assert len(data.texts["train"].column_names) == (1 if task in ("sst2", "cola") else 2)
    assert data.names == [*MNLI]


# ------------------------------------------------- programs that run beside the tests above
def toy(folder, models, calm):
    return folder, process(*PROGRAM, "--task=toy", "--device=cpu", cwd=folder)


def killed(folder, models, calm):
    """A run that is killed, stopped and killed again, at random moments -> its flags."""
    flags = ["--epochs=6", "--lr=0.003", "--teacher-epochs=2", "--batch-size=4"]
    args, output = command(folder, models, *flags), folder / "output.txt"
    plan = [(signal.SIGKILL, "epoch 1 "), (signal.SIGINT, "method "), (signal.SIGKILL, "epoch 3  ")]
    for kind, seen in plan:
        with output.open("w") as file:
            running = subprocess.Popen([*PROGRAM, *args], env=CLEAN, stdout=file, stderr=file)
        while seen not in output.read_text() and running.poll() is None:
            time.sleep(0.005)
        time.sleep(random.Random().random() / 10)
        running.send_signal(kind)
        code = running.wait(60)
        assert code in (-9, 130, 0), output.read_text()
        assert code != 130 or output.read_text().splitlines()[-1].startswith("railkd.py: stopped")
    return args


def two_processes(folder, models, calm):
    """Two runs under torchrun -> the flags, and what the program said."""
    (folder / "ranks.py").write_text(RANKS)
    args = command(folder, calm, "--lr=0.001", "--seed=3")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return folder, args, process(*torchrun, folder / "ranks.py", HERE, folder, *args)


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory, models, calm):
    """The slow programs run beside the tests, one by one, if their tests were asked for."""
    names = "test_killed_runs_go_on test_two_processes_do_what_one_does test_toy_task_is_learned"
    programs = dict(zip(names.split(), (killed, two_processes, toy), strict=True))
    asked = [item.name for item in request.session.items if item.name in programs]
    folder, worker = tmp_path_factory.mktemp, ThreadPoolExecutor(1)
    yield {x: worker.submit(programs[x], folder("beside"), models, calm) for x in asked}
    worker.shutdown(cancel_futures=True)


def test_killed_runs_go_on(tmp_path, beside):
    """Catches half a file, and work that only an orderly end saves: SIGKILL, and Ctrl-C (130)."""
    args = beside["test_killed_runs_go_on"].result()
    assert bits(R.main(args)) == bits(R.main([*args, f"--output-dir={tmp_path}"]))


def test_two_processes_do_what_one_does(beside):
    """Catches sums or shares for means, and unequal shares. Last bits may differ by the order."""
    folder, args, done = beside["test_two_processes_do_what_one_does"].result()
    assert done.returncode == 0, done.stderr
    one = R.main([*args, "--batch-size=30"])
    two = R.read_results(folder / "even" / "own" / "rail-l-seed3")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["layers_t"] == b["layers_t"] and a["score"] == pytest.approx(b["score"])
        for name in ("loss", "ce", "kd", "ild"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    w, v = weights_of(one["model"]), weights_of(two["model"])
    assert all(np.allclose(w[name], v[name], atol=2e-4) for name in w)
    for row in R.read_results(folder / "uneven" / "own" / "rail-l-seed3")["history"]:
        assert row["seconds"] * row["examples_per_s"] == pytest.approx(128)
    assert done.stdout.count("epoch 2  layers_t") == 2  # two runs, and one process speaks


def test_toy_task_is_learned(beside):
    """Catches a first command that does not work, and a teacher that learns nothing from it."""
    folder, done = beside["test_toy_task_is_learned"].result()
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = R.read_results(folder / "runs" / "toy" / "rail-l-seed42")
    assert results["teacher_score"] > 0.9 and results["best_score"] > 0.55
