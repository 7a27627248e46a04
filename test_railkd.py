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
HERE = Path(__file__).parent

B, M, N, D_S, D_T = 6, 3, 7, 10, 14  # batch, slots, teacher blocks, widths
DRAWS = [R.sample_layers(N, M, 3, epoch) for epoch in range(1, 41)]  # at which a fit aims
LABELS = torch.tensor([0, 1, 0, 1, 2, 2, 0, 0, 1, 1, 2, 2])  # of the memory bank's examples
INDEX = torch.tensor([3, 1, 4, 0, 5, 9])  # the rows of a batch


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


def pooled(k=M, d_s=D_S, batch=B):
    """Pooled states of M slots and of k teacher layers."""
    return torch.randn(batch, M, d_s), torch.randn(batch, k, D_T)


def hidden_states(num_layers, batch, length, width):
    return [torch.randn(batch, length, width) for _ in range(num_layers + 1)]


def options_of(distance):
    """What the distance cannot do without."""
    return {"labels": LABELS} if distance == "contrastive" else {}


# --------------------------------------------------------------------------- pooling and draw
def test_pooling_is_the_mean_of_the_tokens():
    """Catches padding averaged in, a sum for a mean, the wrong axis, hidden[:, 0] where it is
    padding, and multiplying by the mask, which lets NaN through."""
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


def test_pooling_works_in_32_bits_and_names_both_shapes():
    """Catches a sum in half precision, which overflows at 65,504, and a mask that is broadcast."""
    hidden, mask = torch.full((1, 100, 2), 1000.0, dtype=torch.float16), torch.ones(1, 100)
    with torch.autocast("cpu", torch.bfloat16):
        result = R.mean_pool(hidden, mask)
    assert result.dtype == torch.float32 and torch.allclose(result, torch.full((1, 2), 1000.0))
    for mask in (torch.zeros(2, 4), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=rf"\[2, 3, 4\].*{re.escape(str([*mask.shape]))}"):
            R.mean_pool(torch.zeros(2, 3, 4), mask)


def test_draw_covers_every_layer_and_every_subset_equally():
    """Catches a biased or unsorted draw, layer 0, the last block, and drawing with replacement."""
    draws = [R.sample_layers(N, M, seed, epoch) for seed in range(40) for epoch in range(100)]
    for draw in draws:
        assert draw == sorted(set(draw)) and len(draw) == M and set(draw) <= set(range(1, N))
    for size in (1, 2, 3):  # layers, pairs, whole draws
        chance = math.comb(N - 1 - size, M - size) / math.comb(N - 1, M)
        slack = 4.5 * math.sqrt(chance * (1 - chance) / len(draws))
        for subset in itertools.combinations(range(1, N), size):
            count = sum(set(subset) <= set(draw) for draw in draws)
            assert abs(count / len(draws) - chance) < slack


def test_draw_depends_on_its_arguments_alone():
    """Catches a global generator, an epoch or a seed that is ignored, and a float epoch, as the
    Trainer has it, that draws other layers than the integer."""
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert R.sample_layers(12, 5, 42, 1) == R.sample_layers(12, 5, 42, 1.0) == [1, 7, 8, 10, 11]
    R.select_layers("permuted", 12, 5, 3, 4)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert len({tuple(R.sample_layers(12, 5, 3, epoch)) for epoch in range(20)}) > 10
    assert len({tuple(R.sample_layers(12, 5, seed, 4)) for seed in range(20)}) > 10
    for num_layers, k in [(6, 6), (6, 0), (1, 1)]:
        with pytest.raises(ValueError, match=rf"k = {k}\b.*num_layers = {num_layers}\b"):
            R.sample_layers(num_layers, k, 0, 0)
        with pytest.raises(ValueError):
            R.select_layers("skip", num_layers, k)


def test_selections_are_the_published_ones():
    """Catches a layer that is off by one, and a permuted order that is drawn anew in every epoch or
    is the same for every seed."""
    expected = {"skip": [2, 4, 6, 8, 10], "last": [7, 8, 9, 10, 11], "reverse": [10, 8, 6, 4, 2]}
    expected |= {"middle": [6] * 5, "all": [*range(1, 12)], "random": R.sample_layers(12, 5, 3, 1)}
    for name, layers in expected.items():
        assert R.select_layers(name, 12, 5, 3, 1) == layers
    assert R.select_layers("skip", 24, 5) == [4, 8, 12, 16, 20]
    assert R.select_layers("final", 12, 1, 3, 1) == [12]
    with pytest.raises(ValueError, match="unknown selection"):
        R.select_layers("best", 12, 5)
    orders = [R.select_layers("permuted", 12, 5, seed, 0) for seed in range(9)]
    assert all(sorted(order) == [2, 4, 6, 8, 10] for order in orders)
    assert orders == [R.select_layers("permuted", 12, 5, seed, 7) for seed in range(9)]
    assert len({tuple(order) for order in orders}) > 3


def test_methods_are_the_published_ones():
    """Catches a method with the layers, distance or pooling of another, a wrong weight of Eq. 4,
    and two stages in the wrong order."""
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


# ----------------------------------------------------------------------- losses against numpy
def test_kd_loss_against_numpy():
    """Catches T^2 left out, T after the softmax, the mean over classes, the two models swapped, KL
    for a regression or for annealed logits, and phi upside down."""
    s, t = np.random.RandomState(0).randn(2, 5, 3)
    p, q = np.exp(t / 3), np.exp(s / 3)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = 3**2 * (p * np.log(p / q)).sum() / 5
    s, t = torch.tensor(s), torch.tensor(t)
    assert np.isclose(R.kd_loss(s, t, 3.0), expected, atol=1e-6)
    one = s[:, :1], t[:, :1]  # a regression
    assert np.isclose(R.kd_loss(*one, 3.0), np.mean(to_numpy(one[0] - one[1]) ** 2))
    for temperature, phi in ((1.0, 1.0), (4.0, 4 / 7), (7.0, 1 / 7)):
        for s_i, t_i in ((s, t), one):
            loss = R.kd_loss(s_i, t_i, temperature, max_temperature=7.0)
            assert np.isclose(loss, np.mean(to_numpy(s_i - phi * t_i) ** 2))


def test_kd_loss_pulls_the_student_alone():
    """Catches a teacher that gets a gradient, a loss in 16 bits, and shapes that are broadcast."""
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (R.kd_loss(s, t, 2.0) + R.kd_loss(s, t, 2.0, max_temperature=7.0)).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    assert R.kd_loss(s.bfloat16(), t.bfloat16(), 2.0).dtype == torch.float32
    for bad in [(s, t[:, :2], 2.0), (s, t[:, :1], 2.0), (s, t, 0.0), (s[0], t[0], 2.0)]:
        with pytest.raises(ValueError):
            R.kd_loss(*bad)


def test_mixup_is_near_both_texts():
    """Catches the shares swapped, a batch that is not reversed, clean states with a gradient, and
    vectors that are not normalised."""
    mixed, clean = torch.randn(B, 2, D_S, requires_grad=True), torch.randn(B, 2, D_S)
    clean.requires_grad_()
    loss = R.mixup_loss(mixed, clean, 0.7)
    m, c = unit(to_numpy(mixed)), unit(to_numpy(clean))
    expected = 0.0
    for b, i in itertools.product(range(B), range(2)):
        expected += 0.7 * ((m[b, i] - c[b, i]) ** 2).sum() / (B * 2)
        expected += 0.3 * ((m[b, i] - c[B - 1 - b, i]) ** 2).sum() / (B * 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert mixed.grad.abs().sum() > 0 and clean.grad is None


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("alpha", [None, [0.5, 1, 2]])
def test_layerwise_is_equation_2(shared, alpha):
    """Catches a missing normalisation, a mean over slots or widths, alpha ignored, mixed slots."""
    distance = R.LayerwiseDistance(D_S, D_T, M, M, proj_dim=8, shared=shared, alpha=alpha)
    s, t = pooled()
    z_s, z_t = distance.proj_s, distance.proj_t
    expected = 0.0
    for b, i in itertools.product(range(B), range(M)):
        x = mapped(z_s if shared else z_s[i], to_numpy(s[b, i]))
        y = mapped(z_t if shared else z_t[i], to_numpy(t[b, i]))
        difference = y / np.linalg.norm(y) - x / np.linalg.norm(x)
        expected += (alpha or [1, 1, 1])[i] * sum(difference**2) / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="3 slots need as many"):
        R.LayerwiseDistance(D_S, D_T, M, M + 1)


def test_concat_is_equation_3():
    """Catches normalising each slot, concatenating over the batch, and a sum of m terms."""
    distance = R.ConcatDistance(D_S, D_T, M, 2, proj_dim=8)
    s, t = pooled(k=2)
    z_s = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(distance.proj_t, to_numpy(t).reshape(B, -1)))
    assert np.isclose(distance(s, t).item(), ((z_s - z_t) ** 2).sum() / B, atol=1e-5)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_direct_is_pkd(d_s):
    """Catches the element mean of the authors' code, and a map where the widths are equal."""
    distance = R.DirectDistance(d_s, D_T, M, M)
    s, t = pooled(d_s=d_s)
    if d_s == D_T:
        assert not [*distance.parameters()]
        assert distance(3 * t, t).item() == pytest.approx(0, abs=1e-5)
        assert distance(-3 * t, t).item() == pytest.approx(4 * M, rel=1e-5)
    expected = ((unit(mapped(distance.proj_s, to_numpy(s))) - unit(to_numpy(t))) ** 2).sum() / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


def test_group_is_ckd():
    """Catches groups that are not contiguous, or whose sizes differ by two."""
    distance = R.GroupDistance(D_S, D_T, M, 8)
    s, t = pooled(k=8)
    expected = 0.0
    for i, layers in enumerate(np.array_split(np.arange(8), M)):
        target = unit(np.concatenate([to_numpy(t[:, layer]) for layer in layers], axis=-1))
        z = unit(mapped(distance.proj_s[i], to_numpy(s[:, i])))
        expected += ((z - target) ** 2).sum() / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)
    with pytest.raises(ValueError):
        R.GroupDistance(D_S, D_T, M, 2)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_attention_is_alp_kd(d_s):
    """Catches a softmax over slots instead of layers, scaled products, and normalised vectors."""
    distance = R.AttentionDistance(d_s, D_T, M, 6)
    assert bool([*distance.parameters()]) == (d_s != D_T)
    s, t = pooled(k=6, d_s=d_s)
    z_s, z_t, total = mapped(distance.proj_s, to_numpy(s)), to_numpy(t), 0.0
    for b, i in itertools.product(range(B), range(M)):
        e = np.exp([z_s[b, i] @ z_t[b, k] for k in range(6)])
        mixture = sum(e[k] / e.sum() * z_t[b, k] for k in range(6))
        total += ((z_s[b, i] - mixture) ** 2).sum()
    assert np.isclose(distance(s, t).item(), total / (B * M * D_T), rtol=1e-4)


# ----------------------------------------------------------------------------- the memory bank
def contrastive(labels=LABELS, **options):
    return R.ContrastiveDistance(D_S, D_T, M, M, labels, proj_dim=8, **options)


def test_contrastive_is_info_nce():
    """Catches a wrong anchor, no temperature, a positive that is missing below the line, and a bank
    that is not used."""
    labels = torch.zeros(12, dtype=torch.long)
    labels[7] = 1  # the one example with another label: all five negatives are it
    distance = contrastive(labels, num_negatives=5)
    s, t = pooled()
    z_s = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(distance.proj_t, to_numpy(t).reshape(B, -1)))
    positive = (z_s * z_t).sum(1) / 0.07
    negative = z_t @ to_numpy(distance.bank[7]) / 0.07
    expected = -np.mean(positive - np.log(np.exp(positive) + 5 * np.exp(negative)))
    assert np.isclose(distance(s, t, torch.arange(B)).item(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="index"):
        distance(s, t)


@pytest.mark.parametrize("labels", [LABELS, LABELS.float() / 3, LABELS * 0])
def test_negatives_have_another_label_and_are_drawn_equally(labels):
    """Catches negatives of the own label or the own row, and rows that are never drawn. With
    floats, or one label for all, every other example is a negative."""
    distance = contrastive(labels, num_negatives=4000).eval()
    s, t = pooled()
    for row in range(12):
        distance.bank.requires_grad_().grad = None
        others = [i for i in range(12) if labels[i] != labels[row]]
        if labels is not LABELS:
            others = [i for i in range(12) if i != row]
        same = distance.bank.detach()[others[0]].expand(12, 8).clone()
        distance.bank.data.copy_(same)  # all alike, so that each draw weighs the same
        distance(s[:1], t[:1], torch.tensor([row])).backward()
        counts = distance.bank.grad.norm(dim=1)
        assert counts.nonzero()[:, 0].tolist() == others
        shares = counts[others] / counts.sum()
        assert (shares * len(others) - 1).abs().max() < 0.3


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_memory_bank_moves_in_training_alone(momentum):
    """Catches a bank that moves in eval mode or without gradients, the wrong rows, and no momentum
    or no normalisation."""
    distance = contrastive(momentum=momentum)
    assert torch.allclose(distance.bank.norm(dim=1), torch.ones(12))
    s, t = pooled()
    before = distance.bank.clone()
    distance.eval()(s, t, INDEX)
    with torch.no_grad():
        distance.train()(s, t, INDEX)
    assert torch.equal(distance.bank, before)
    distance(s, t, INDEX)
    z = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    expected = unit(momentum * to_numpy(before[INDEX]) + (1 - momentum) * z)
    assert np.allclose(distance.bank[INDEX], expected, atol=1e-5)
    unseen = [row for row in range(12) if row not in INDEX]
    assert torch.equal(distance.bank[unseen], before[unseen])
    assert {"bank", "proj_t.weight"} <= set(distance.state_dict())


# ---------------------------------------------------------------------------- the ridge start
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
    before, state, torch_state = ild.layers_t, random.getstate(), torch.get_rng_state()
    ild.fit(states_s, states_t)
    assert ild.layers_t == before == R.select_layers(ild.select, N, len(ild.layers_s), 3, 5)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    return ild.distance, to_numpy(states_s), np.insert(to_numpy(states_t), 0, np.nan, axis=1)


@pytest.mark.parametrize("shared", [True, False])
def test_ridge_start_of_equation_2(shared):
    """Catches features that are not centred, an absolute penalty, targets of the wrong draws."""
    distance, x, h = fitted("rail-l", shared=shared, proj_dim=8)
    y = sum(unit(mapped(distance.proj_t, h[:, draw])) for draw in DRAWS) / 40
    if shared:
        assert_ridge(distance.proj_s, x.reshape(-1, D_S), y.reshape(-1, 8))
    else:
        for i in range(M):
            assert_ridge(distance.proj_s[i], x[:, i], y[:, i])


def test_ridge_start_of_the_others():
    """Catches a start towards another target than the method's, the unit of the mean instead of the
    mean of the units, and a layer that is off by one."""
    concat, x, h = fitted("rail-c", proj_dim=8)
    y = sum(unit(mapped(concat.proj_t, h[:, draw].reshape(40, -1))) for draw in DRAWS) / 40
    assert_ridge(concat.proj_s, x.reshape(40, -1), y)
    direct, x, h = fitted("pkd-skip", select="random")
    for i in range(M):
        assert_ridge(direct.proj_s[i], x[:, i], sum(unit(h[:, draw[i]]) for draw in DRAWS) / 40)
    for method in ("pkd-skip", "pkd-last", "cr-ild", "permuted"):
        fixed, x, h = fitted(method)
        layers = R.select_layers(R.METHODS[method].select, N, x.shape[1], 3)
        for i, layer in enumerate(layers):
            assert_ridge(fixed.proj_s[i], x[:, i], unit(h[:, layer]))
    group, x, h = fitted("ckd")
    attention, x_a, h_a = fitted("alp-kd")
    for i in range(M):
        assert_ridge(group.proj_s[i], x[:, i], unit(h[:, 2 * i + 1 : 2 * i + 3].reshape(40, -1)))
        assert_ridge(attention.proj_s[i], x_a[:, i], h_a[:, 1:N].mean(1))
    codir, x, h = fitted("codir", labels=torch.arange(40), proj_dim=8)
    y = unit(mapped(codir.proj_t, h[:, 1:N].reshape(40, -1)))
    assert_ridge(codir.proj_s, x.reshape(40, -1), y)


# ------------------------------------------------------------------- the loss object on models
def tiny(kind, layers, width):
    """A tiny random model of the kind."""
    options = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    options |= {"intermediate_size": 2 * width, "bos_token_id": 0, "eos_token_id": 0}
    options |= {"vocab_size": 100, "image_size": 16, "patch_size": 4, "num_channels": 1}
    return hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **options)).eval()


def states(model, length, pad=0):
    """The hidden states and the mask of four inputs, always the same, with padding at their end."""
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type == "vit":
        images = torch.randn(4, 1, 16, 16, generator=generator)
        return model(images, output_hidden_states=True).hidden_states, None
    ids = F.pad(torch.randint(5, 60, (4, length), generator=generator), (0, pad), value=1)
    mask = F.pad(torch.ones(4, length, dtype=torch.long), (0, pad))
    return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states, mask


PAIRS = ["bert distilbert rail-l", "mpnet roberta rail-c", "gpt2 gpt2 pkd-skip", "bert bert alp-kd"]


@pytest.mark.parametrize("case", [*PAIRS, "bert roberta ckd", "vit vit rail-c"])
def test_loss_works_on_every_architecture(case):
    """Catches what only one architecture has, and a vector that depends on its batch mates."""
    kind_t, kind_s, method = case.split()
    teacher, student = tiny(kind_t, 6, 16), tiny(kind_s, 4, 12)
    ild = R.IntermediateLoss(method, 4, 6, 12, 16)
    hidden_t, mask_t = states(teacher, 7)
    mask = torch.ones(4, hidden_t[0].shape[1]) if mask_t is None else mask_t
    blocks = torch.stack([R.mean_pool(hidden, mask) for hidden in hidden_t[1:]], dim=1)
    ild.fit(ild.pool_s(*states(student, 5)), blocks)
    value = ild(ild.pool_s(*states(student, 5)), ild.pool_t(hidden_t, mask_t))
    padded = ild(ild.pool_s(*states(student, 5, pad=3)), ild.pool_t(*states(teacher, 7, pad=2)))
    assert torch.allclose(value, padded, atol=1e-5) and value.ndim == 0 and 0 < value < 4 * 3
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("method", [name for name, row in R.METHODS.items() if row.distance])
@pytest.mark.parametrize("d_s", [12, 16])
def test_gradients_reach_all_they_should(method, d_s):
    """Catches a detached student, a teacher that learns, and a map in a plain list or left out."""
    options = options_of(R.METHODS[method].distance)
    ild = R.IntermediateLoss(method, 4, 6, d_s, 16, **options)
    assert ild.layers_s == ([4] if method == "cr-ild" else [1, 2, 3])
    hidden_s, hidden_t = hidden_states(4, 4, 5, d_s), hidden_states(6, 4, 7, 16)
    for hidden in hidden_s + hidden_t:
        hidden.requires_grad_()
    states_t = ild.pool_t(hidden_t, torch.ones(4, 7))
    ild(ild.pool_s(hidden_s, torch.ones(4, 5)), states_t, torch.arange(4)).backward()
    for layer, hidden in enumerate(hidden_s):
        assert (hidden.grad is not None) == (layer in ild.layers_s)
    assert all(hidden.grad is None for hidden in hidden_t)
    for name, p in ild.named_parameters():
        frozen = "proj_t" in name and method != "codir"
        assert p.requires_grad != frozen and (frozen or p.grad.abs().sum() > 0), name
    if method in ("rail-l", "rail-c", "codir"):
        for choice in ("frozen", "trained"):
            chosen = R.IntermediateLoss(method, 4, 6, d_s, 16, teacher_proj=choice, **options)
            trained = [p.requires_grad for p in chosen.distance.proj_t.parameters()]
            assert trained == [choice == "trained"] * 2


def test_pairing_is_what_is_computed():
    """Catches a layer that is off by one on either side: only the drawn layers matter, each to its
    slot. And a missing embedding output, which would shift all layers by one."""
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
    for bad_s, bad_t in ((hidden_s[1:], hidden_t), (hidden_s, hidden_t[1:])):
        with pytest.raises(ValueError, match="hidden states"):
            ild(ild.pool_s(bad_s, mask), ild.pool_t(bad_t, mask))
    for bad_s, bad_t in ((states_s[:, :1], states_t), (states_s, states_t[:, :1])):
        with pytest.raises(ValueError, match="need 3 and 3 layers"):
            ild(bad_s, bad_t)


@pytest.mark.parametrize("select", R.SELECTIONS)
@pytest.mark.parametrize("distance", R.DISTANCES)
def test_any_selection_goes_with_any_distance(select, distance):
    """Catches a method that is known by its name, F.normalize of 16-bit values under autocast, and
    layers that do not fit: rail-l with all of them."""
    options = {"select": select, "distance": distance} | options_of(distance)
    if select == "all" and distance in ("layerwise", "direct"):
        with pytest.raises(ValueError, match="slots"):
            R.IntermediateLoss("kd", 4, 9, 12, 16, **options)
        return
    ild = R.IntermediateLoss("kd", 4, 9, 12, 16, **options).eval()
    assert ild.layers_t == R.select_layers(select, 9, len(ild.layers_s), 0, 1)
    assert isinstance(ild.distance, R.DISTANCES[distance])
    states_s = ild.pool_s(hidden_states(4, 4, 5, 12), torch.ones(4, 5))
    states_t = ild.pool_t(hidden_states(9, 4, 5, 16), torch.ones(4, 5))
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
    with pytest.raises(ValueError, match="cannot draw"):
        R.IntermediateLoss("rail-c", 6, 5, 12, 16)  # a student deeper than its teacher
    with pytest.raises(TypeError, match="proj_dim"):
        R.IntermediateLoss("pkd-skip", 4, 9, 12, 16, proj_dim=8)


# ------------------------------------------------------------------------------- whole commands
STEPS = 4  # of an epoch on 120 examples
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
    """Flags: an untrained teacher of 4 blocks x 16, and a student of 3 blocks with another kind of
    model, and the same words with other ids."""
    R.make_toy_model(folder / "teacher", 4, 16)
    words = (folder / "teacher" / "vocab.txt").read_text().split("\n")
    sizes = {"vocab_size": len(words), "dim": width, "hidden_dim": 24, "n_layers": 3, "n_heads": 2}
    torch.manual_seed(0)
    model = hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes, **options))
    model.save_pretrained(folder / "student")
    (folder / "student" / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]))
    names = {"--teacher": folder / "teacher", "--student": folder / "student", "--device": "cpu"}
    return [f"{flag}={value}" for flag, value in names.items()]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return two_models(tmp_path_factory.mktemp("models"), 12)


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Flags: a teacher with a head, sure of itself, and a student as wide, without dropout."""
    folder = tmp_path_factory.mktemp("calm")
    still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    flags = two_models(folder, 16, **still)
    config = json.loads((folder / "student" / "config.json").read_text())
    odd = config | {"output_attentions": True, "return_dict": False}  # as some on the hub
    (folder / "student" / "config.json").write_text(json.dumps(odd))
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    torch.manual_seed(0)
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(folder / "teacher", **names)
    teacher.classifier.weight.data *= 200
    teacher.save_pretrained(folder / "teacher")
    return [*flags, "--amp=off"]


def folder_of(flags, name):
    return Path(next(flag for flag in flags if flag.startswith(f"--{name}=")).split("=")[1])


def command(folder, models, *more):
    """A whole run's flags: 120 training examples, 50 to evaluate on, 2 epochs of 4 steps."""
    folder.mkdir(exist_ok=True)
    train = write_table(folder / "train.csv", rows_of(120))
    dev = write_table(folder / "dev.csv", rows_of(50, seed=1))
    short = [f"--output-dir={folder / 'runs'}", "--epochs=2", "--teacher-epochs=1"]
    return [f"--train-file={train}", f"--validation-file={dev}", *models, *short, *more]


def quick(train, dev, models, folder, *more):
    """The flags of a run of one epoch without a teacher."""
    files = [f"--train-file={train}", f"--validation-file={dev}", f"--output-dir={folder / 'runs'}"]
    return [*files, *models, "--method=none", "--epochs=1", *more]


def python(*args, cwd=HERE, **environment):
    """A process of its own; a hang is a failure."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    options = {"capture_output": True, "text": True, "timeout": 150, "env": clean | environment}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, **options)


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(args, capsys, *words, kept=None):
    """The command ends with one line, the last of standard error, which holds the words. No file
    in the folder `kept` changes."""
    before = kept and files_of(kept)
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as stop:
        R.main([str(arg) for arg in args])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code not in (0, None) and line.startswith("railkd.py: error: "), line
    assert all(word in line for word in words), line
    assert not kept or before.items() <= files_of(kept).items()


def weights_of(model):
    return load_file(Path(model) / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def bits(results):
    """All that must not depend on an interruption: the history without times, and the weights."""
    times = {"seconds", "examples_per_s"}
    rows = [{name: row[name] for name in row if name not in times} for row in results["history"]]
    return (
        rows,
        results["best_epoch"],
        {x: y.tolist() for x, y in weights_of(results["model"]).items()},
    )


def spy(patch, owner, name):
    """The arguments and the result of each call of a function from now on, in a list."""
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def call(*args, **options):
        result = original(*args, **options)
        calls.append((args, options, result))
        return result

    patch.setattr(owner, name, call)
    return calls


def script_scores(patch, scores):
    """The accuracies on dev, epoch by epoch: the steps that were made tell which one it is."""
    steps = spy(patch, torch.optim.AdamW, "step")

    def accuracy(labels, answers):
        return scores[min(max(1, len(steps) // STEPS), len(scores)) - 1]

    patch.setattr("sklearn.metrics.accuracy_score", accuracy)


def answers(folder, texts, **cut):
    """An independent pass, text by text: logits (N, C), mean and first token of all layers."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    columns = [], [], []
    for text in texts:
        tokens = tokenizer(*([text] if isinstance(text, str) else text), **cut)["input_ids"]
        with torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True, return_dict=True)
        layers = torch.cat(output.hidden_states)  # (layers, L, d)
        for column, value in zip(
            columns, (output.logits[0], layers.mean(1), layers[:, 0]), strict=True
        ):
            column.append(value)
    return [torch.stack(column) for column in columns]


# ------------------------------------------------------------------------------------- mistakes
MISTAKES = [  # a command line, what the line says
    ("", "--task is one of"),
    ("--task=sst3", "--task is one of"),
    ("--train-file=a.csv", "--validation-file"),
    ("--task=sst2 --train-file=a.csv --validation-file=a.csv", "--task"),
    ("--train-file=no.csv --validation-file=no.csv", "no.csv"),
    ("--task=cola --data-root=nowhere", "nowhere"),
    ("--report=nowhere", "no finished run"),
    ("--predict=nowhere", "no finished run"),
    ("--task=toy --method=rail", "--method"),
    ("--task=toy --epochs=0", "--epochs: 0 is not positive"),
    ("--task=toy --epoch=3", "--epoch"),
    ("--task=toy --method=kd --select=last", "--select and --distance"),
    ("--task=toy --method=kd --distance=concat", "--select and --distance"),
    ("--task=toy --method=kd --weights 1 1 1", "no ILD weight"),
    ("--task=toy --weights 0 0 0", "--weights"),
    ("--task=toy --temperature=0", "--temperature"),
    ("--task=toy --method=cr-ild --epochs=1", "--epochs"),
    ("--task=toy --device=tpu9", "--device"),
    ("OWN --method=rail-l --select=all", "2 slots need as many teacher layers, not 3"),
    ("OWN --method=pkd-skip --proj-dim=8", "proj_dim"),
    ("OWN --method=pkd-skip --teacher-proj=trained", "teacher_proj"),
    ("OWN --teacher={student} --student={teacher}", "cannot draw k = 3"),
    ("OWN --student=nowhere", "cannot load the student nowhere"),
]


@pytest.mark.parametrize("line, words", MISTAKES)
def test_mistakes_on_the_command_line(tmp_path, models, capsys, monkeypatch, line, words):
    """Catches a mistake that is not seen, or seen after hours of work, or told in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {name: folder_of(models, name) for name in ("teacher", "student")}
    flags = line.format(**names).replace("OWN ", "").split()
    args = command(tmp_path, models, *flags) if line.startswith("OWN") else flags
    refused(args, capsys, words, kept=tmp_path)
    monkeypatch.setenv("RANK", "0")
    refused(command(tmp_path, models, "--method=codir"), capsys, "one process", kept=tmp_path)


GOOD = "text,label\na b,good\nc d,bad\ne f,good\n"
FILES = [  # name, train, dev, what the line says
    ("no label.csv", "text,target\na,x\nb,y\n", GOOD, "no label.csv", "no column label"),
    ("three texts.csv", "a,b,c,label\nx,x,x,good\ny,y,y,bad\n", GOOD, "a, b, c, label"),
    ("header.csv", "text,label\n", GOOD, "header.csv: need rows"),
    ("empty.csv", "", GOOD, "empty.csv: it is empty"),
    ("empty.jsonl", "", GOOD, "empty.jsonl: it is empty"),
    ("table.xlsx", "text", GOOD, "table.xlsx"),
    ("gap.csv", "text,label\na,good\n,bad\n", GOOD, "gap.csv: row 2 has no text"),
    ("short.csv", "text,label\na,good\nb\n", GOOD, "short.csv: row 2 has no label"),
    ("long.csv", "text,label\na,good\nb,bad,x\n", GOOD, "cannot read", "long.csv"),
    ("quote.csv", 'text,label\n"a,good\nb,bad\n', GOOD, "cannot read", "quote.csv"),
    ("null.jsonl", '{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', GOOD, "row 1"),
    ("list.jsonl", '{"text": ["a"], "label": "x"}\n', GOOD, "list.jsonl: need rows"),
    ("cut.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "la', GOOD, "cut.jsonl"),
    ("cut.parquet", "PAR1abcdef", GOOD, "cut.parquet"),
    ("latin.csv", "text,label\ncaf\xe9,good\nx,bad\n", GOOD, "latin.csv"),
    (
        "one class.csv",
        "text,label\na,good\nb,good\n",
        GOOD[:20] + "\n",
        "one class.csv: all labels",
    ),
    ("good.csv", GOOD, GOOD + "g,so\n", "dev.csv", "bad, good", "'so'"),
    ("minus.csv", "text,label\na,0\nb,1\nc,-1\n", GOOD, "minus.csv", "0, 1", "'-1'"),
    ("hidden.csv", "text,label\na,-1\nb,-1\n", GOOD, "hidden.csv", "'-1'"),
    ("number.csv", "text,label\na,0.5\nb,1.5\n", GOOD, "dev.csv", "numbers", "'good'"),
    ("nan.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', GOOD, "row 2"),
]


@pytest.mark.parametrize("row", FILES, ids=[row[0] for row in FILES])
def test_mistakes_in_files(tmp_path, models, capsys, row):
    """Catches rows that are lost or shifted, labels that are made up, and -1 as one more class."""
    name, train, dev, *words = row
    (tmp_path / name).write_text(train, "latin-1")
    (tmp_path / "dev.csv").write_text(dev)
    args = quick(tmp_path / name, tmp_path / "dev.csv", models, tmp_path)
    refused(args, capsys, *words, kept=tmp_path)


def read_labels(tmp_path, *files):
    """-> the data of a training file and an evaluation file, as the command reads them."""
    flags = zip(("--train-file", "--validation-file"), files, strict=True)
    return R.load_data(R.parse([str(x) for flag in flags for x in flag]))


def write_classes(path, names, numbers, **texts):
    """A parquet file as on the hub: numbers of classes, whose names are in the file, or floats."""
    texts = texts or {"text": [f"the word{i}" for i in range(len(numbers))]}
    kinds = {name: Value("string") for name in texts}
    kinds["label"] = ClassLabel(names=list(names)) if names else Value("float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict(texts | {"label": numbers}, features=Features(kinds))
    table.add_column("idx", list(range(len(numbers)))).to_parquet(path)
    return path


LABELS_OF_FILES = [  # the labels in the file, the classes in order; none: a regression
    (["schlecht, sehr", "gut"], ["gut", "schlecht, sehr"]),
    (["01", "1"], ["01", "1"]),
    (["1", "0"], ["0", "1"]),
    ([5, 3], ["3", "5"]),
    (["NA", "None", "nan"], ["NA", "None", "nan"]),
    (["v1.0", "v2.0"], ["v1.0", "v2.0"]),
    (["3.4", "2"], []),
    ([1.5, 2.0], []),
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("labels, names", LABELS_OF_FILES)
def test_one_rule_for_the_labels_of_all_formats(tmp_path, suffix, labels, names):
    """Catches words that are read as numbers or as nothing, and scores in text as 26 classes."""
    rows = {"label": labels * 3, "text": ["a b"] * len(labels) * 3}
    path = write_table(tmp_path / f"rows{suffix}", rows)
    data = read_labels(tmp_path, path, path)
    found = data.labels["train"].tolist()
    assert data.names == names and data.texts["train"].column_names == ["text"]
    expected = [names.index(str(x)) if names else float(x) for x in labels * 3]
    assert found == pytest.approx(expected) and data.labels["train"].is_floating_point() != bool(
        names
    )


def test_odd_files_are_read(tmp_path):
    """Catches a byte order mark in a column's name, a lone quote in a tsv, the index of pandas
    taken for text, and classes that are lost because no row has them."""
    for name, content in {
        "mark.csv": "\ufefflabel,text\ngood,a b\nbad,c d\n",
        "quote.tsv": 'label\ttext\ngood\t"a b\nbad\tc "d\n',
        "index.csv": ",text,label\n0,a,good\n1,b,bad\n",
        "ids.csv": "id,text,idx,label\n1,a,7,good\n2,b,8,bad\n",
        "two lines.csv": 'text,label\n"a ""b"", c",good\n"x\ny",bad\n',
        "LARGE.CSV": "text,label\na,good\nb,bad\n",
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        data = read_labels(tmp_path, tmp_path / name, tmp_path / name)
        assert data.names == ["bad", "good"] and len(data.labels["train"]) == 2, name
        assert data.texts["train"].column_names == ["text"]
    named = write_classes(tmp_path / "a.parquet", "cabd", [0, 0, 1, 2])
    others = write_classes(tmp_path / "b.parquet", "abc", [0, 1, 2])
    data = read_labels(tmp_path, named, others)
    assert data.names == [*"cabd"] and data.labels["validation"].tolist() == [1, 2, 0]


def test_the_subset_does_not_depend_on_the_seed(tmp_path, models):
    """Catches seeds that are compared on other data, and a subset that is the file's beginning."""
    args = command(tmp_path, models, "--max-train-examples=20")
    found = [
        R.load_data(R.parse([*args, f"--seed={seed}"])).texts["train"]["text"][:] for seed in "12"
    ]
    assert found[0] == found[1] and len(found[0]) == 20
    assert found[0] != TEXTS[:20] and set(found[0]) <= set(TEXTS)


# ------------------------------------------------------------------------------------------ GLUE
def make_glue(root, task="mnli", names=MNLI, dev=("validation_matched",), tests=(), size=60):
    """A clone in the hub's layout, README included; the text's first word tells the label."""
    splits = ["train", *dev, *tests]
    lines = [f"configs:\n- config_name: {task}\n  data_files:"]
    lines += [f"  - split: {split}\n    path: {task}/{split}-*" for split in splits]
    glue = root / "nyu-mll" / "glue"
    for i, split in enumerate(splits):
        labels = [(row + i) % len(names) if names else row % 9 / 2 for row in range(size)]
        texts = {"premise": [f"word{int(10 * x)} is word{int(x)}" for x in labels]}
        texts["hypothesis"] = ["the noun1 " + split.replace("_", " ")] * size
        labels = [-1] * size if split in tests else labels
        write_classes(glue / task / f"{split}-00000-of-00001.parquet", names, labels, **texts)
    (glue / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    return [f"--task={task}", f"--data-root={root}"]


@pytest.mark.parametrize("dev", [["matched", "mismatched"], ["matched"]])
def test_mnli_keeps_its_dev_sets_apart(tmp_path, models, dev):
    """Catches two dev sets in one score, the second one selecting the epoch, and a second column
    of text that the model never sees."""
    data = make_glue(tmp_path, dev=[f"validation_{split}" for split in dev])
    results = R.main([*data, *models, "--method=none", "--epochs=1", f"--output-dir={tmp_path}"])
    names = ["accuracy", "accuracy_mismatched"][: len(dev)]
    row = results["history"][0]
    assert [*row["metrics"]] == names and results["metric"] == "accuracy"
    assert results["best_score"] == row["score"] == row["metrics"]["accuracy"]
    assert results["labels"] == list(MNLI) and results["columns"] == ["premise", "hypothesis"]
    machine = R.Machine(R.parse([*data, "--device=cpu"]))
    student = R.Encoder("student", results["model"], list(MNLI), R.parse(data), machine)
    pairs = Dataset.from_dict({"a": ["the", "is"], "b": ["not", "but"]})
    tokens = student.tokenize(pairs)["input_ids"][:]
    assert [ids.count(3) for ids in tokens] == [2, 2]  # [SEP]


SUBMITTED = [  # task, its names, its test splits, what it answers, the files
    ("mnli", MNLI, ["test_matched", "test_mismatched"], MNLI, ["MNLI-m.tsv", "MNLI-mm.tsv"]),
    ("rte", ("entailment", "not_entailment"), ["test"], None, ["RTE.tsv"]),
    ("qqp", ("not_duplicate", "duplicate"), ["test"], "01", ["QQP.tsv"]),
    ("cola", ("unacceptable", "acceptable"), ["test"], "01", ["CoLA.tsv"]),
    ("sst2", ("negative", "positive"), ["test"], "01", ["SST-2.tsv"]),
    ("stsb", None, ["test"], None, ["STS-B.tsv"]),
]


@pytest.mark.parametrize("row", SUBMITTED, ids=[" ".join(row[4]) for row in SUBMITTED])
def test_submission_is_what_the_model_says(tmp_path, models, row):
    """Catches other names, numbers instead of words, another order, and a score of 5.1."""
    task, names, tests, words, files = row
    dev = ["validation_matched"] if task == "mnli" else ["validation"]
    data = make_glue(tmp_path, task, names, dev, tests, size=30)
    args = [*data, *models, "--amp=off", f"--output-dir={tmp_path / 'runs'}", "--lr=0.01"]
    run = Path(R.main([*args, "--method=none", "--epochs=1"])["model"]).parent
    assert R.main(["--predict", str(run)]) == {}
    assert sorted(path.name for path in (run / "submission").iterdir()) == files
    for split, file in zip(tests, files, strict=True):
        path = tmp_path / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet"
        table = pandas.read_parquet(path)
        pairs = list(zip(table["premise"], table["hypothesis"], strict=True))
        logits = answers(run / "model", pairs)[0]
        head, *rows = (run / "submission" / file).read_text().splitlines()
        assert head == "index\tprediction" and [x.split("\t")[0] for x in rows] == [
            *map(str, range(30))
        ]
        said = [x.split("\t")[1] for x in rows]
        if names:
            assert said == [(words or names)[i] for i in logits.argmax(1)]
        else:
            assert all(re.fullmatch(r"\d\.\d{3}", score) for score in said)
            assert [*map(float, said)] == pytest.approx(logits[:, 0].clamp(0, 5), abs=0.0006)


def test_predictions_of_a_file(tmp_path, models, capsys):
    """Catches a map before the argmax, columns in the order of this file, metrics of other rows,
    and a stale file; then what does not fit."""
    data = make_glue(tmp_path, size=30)
    args = [*data, *models, "--method=none", "--epochs=1", "--amp=off", "--max-length=12"]
    run = Path(R.main([*args, f"--output-dir={tmp_path}", "--lr=0.01"])["model"]).parent
    one, two = rows_of(50, seed=3)["text"], rows_of(50, seed=4)["text"]
    table = {"hypothesis": two, "premise": one, "label": ["entails", "neutral"] * 25}
    args = ["--predict", run, "--test-file", write_table(tmp_path / "other.tsv", table)]
    logits = answers(run / "model", zip(one, two, strict=True), truncation=True, max_length=12)[0]
    expected = [["entails", "neutral", "neutral"][i] for i in logits.argmax(1)]
    named = "neutral=neutral,contradiction=neutral,entailment=entails"
    found = R.main([*map(str, args), "--label-map", named])
    head, *rows = (run / "predictions.tsv").read_text().splitlines()
    rows = [row.split("\t") for row in rows]
    assert head == "index\tprediction\tprobability" and [row[1] for row in rows] == expected
    chances = logits.softmax(1).max(1).values.tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(chances, abs=0.0001)
    right = sum(x == y for x, y in zip(expected, table["label"], strict=True)) / 50
    assert found == {"file": args[3], "n": 50, "metrics": {"accuracy": right}}
    assert json.loads((run / "predictions.json").read_text()) == found
    for line, content, words in [
        ("--label-map entailment=a,neutral=b", "a,b,label\na,b,a\n", "contradiction"),
        ("--label-map entailment=a,neutral=b,contradiction=c", "a,b,label\na,b,x\n", "a, b, c"),
        ("", "a,label\nx,entailment\n", "premise"),
        ("", "a,b,label\na,b,maybe\n", "'maybe'"),
    ]:
        (tmp_path / "bad.csv").write_text(content)
        bad = ["--predict", run, "--test-file", tmp_path / "bad.csv", *line.split()]
        refused(bad, capsys, words, kept=tmp_path)
    for hidden in ({}, {"label": [-1] * 50}):
        write_table(tmp_path / "other.tsv", {"b": two, "a": one} | hidden)
        assert R.main([*map(str, args)]) == {"file": args[3], "n": 50}
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


# ---------------------------------------------------------------------------------------- models
def test_label_names_of_the_teacher_decide():
    """Catches logits in an order that only the names tell, and names that differ by case."""
    ours = ["billing", "bug", "other", "question"]
    theirs = dict(enumerate(["Billing", "question", "other", "bug"]))
    assert R.label_order("x", theirs, ours) == [0, 3, 2, 1]
    assert R.label_order("x", {0: "a", 1: "A"}, ["A", "a"]) == [1, 0]
    assert R.label_order("x", {0: "LABEL_0", 1: "LABEL_1"}, ["b", "a"]) == [0, 1]


def save_teacher(folder, models, names, weights=None):
    """A copy of the teacher with a head and these names; `weights` replaces the head's."""
    shutil.copytree(folder_of(models, "teacher"), folder)
    names = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}}
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, **names)
    if weights is not None:
        model.classifier.weight.data, model.classifier.bias.data = weights
    model.save_pretrained(folder)
    return f"--teacher={folder}"


def test_a_teacher_of_no_use_is_told(tmp_path, models, calm, capsys):
    """Catches labels in another order without a word, a teacher on another scale, which a
    correlation does not see, one with other labels, and a run that is refused for a warning."""
    head = weights_of(folder_of(calm, "teacher"))
    flipped = head["classifier.weight"].flip(0), head["classifier.bias"].flip(0)
    right = save_teacher(tmp_path / "right", calm, ["GOOD", "Bad"], flipped)
    turned = save_teacher(tmp_path / "turned", calm, ["LABEL_0", "LABEL_1"], flipped)
    flags, scores, told = ["--amp=off", right, turned], [], []
    for i, flag in enumerate(flags):
        more = ["--method=kd", "--epochs=1", f"--name={i}", flag]
        scores.append(R.main(command(tmp_path, calm, *more))["teacher_score"])
        told.append(capsys.readouterr().out)
    assert scores[1] == scores[0] and scores[2] == pytest.approx(1 - scores[0]) != scores[0]
    worse = told[0] if scores[0] < 0.5 else told[2]
    assert "WARNING: the teacher is no better than one answer for all" in worse
    three = save_teacher(tmp_path / "three", models, "abc")
    refused(command(tmp_path, models, three), capsys, "3 labels, the data 2")
    scorer = save_teacher(tmp_path / "scorer", models, ["score"])
    found = answers(tmp_path / "scorer", TEXTS[:60])[0][:, 0]
    stretched = 5 * (found - found.min()) / (found.max() - found.min())  # from 0 to 5
    for name, labels in (("same", found), ("stretched", stretched)):
        rows = {"text": TEXTS[:60], "label": labels.tolist()}
        path = write_table(tmp_path / f"{name}.jsonl", rows)
        more = ["--method=kd", "--amp=off", f"--name={name}", scorer]
        results = R.main(quick(path, path, models, tmp_path, *more))
        assert results["teacher_score"] > 0.99 and results["labels"] is None
        assert ("WARNING: the teacher" in capsys.readouterr().out) == (name == "stretched")


def test_no_input_exceeds_what_a_model_can_take(tmp_path, capsys):
    """Catches an IndexError at the first long text, at the second text of a pair, or at a word: the
    positions of RoBERTa begin after its padding index, and it knows one type of token."""
    (tmp_path / "toy").mkdir()
    R.make_toy_model(tmp_path / "toy" / "bert", 2, 16)
    shutil.copytree(tmp_path / "toy" / "bert", tmp_path / "roberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 89}
    config = hf.RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=20)
    config.pad_token_id, config.type_vocab_size = 1, 1
    hf.RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 20}
    (tmp_path / "roberta" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = {"a": ["the noun1 is not " * 9, "the"], "b": ["word3 is", "is"], "label": ["x", "y"]}
    path = write_table(tmp_path / "long.csv", rows)
    flags = [f"--student={tmp_path / 'roberta'}", "--device=cpu"]
    results = R.main(quick(path, path, flags, tmp_path))
    assert "1 of them reach the limit of 18 tokens" in capsys.readouterr().out
    assert results["last_score"] in (0.0, 0.5, 1.0)
    words = (tmp_path / "roberta" / "vocab.txt").read_text()
    (tmp_path / "roberta" / "vocab.txt").write_text(words + "\nmore\nwords")
    refused(quick(path, path, flags, tmp_path, "--seed=1"), capsys, "91 words does not fit 89")


def test_answers_that_are_not_finite_are_refused(tmp_path, calm, capsys):
    """Catches a teacher that overflows in 16 bits and is told to be untrained, or is cached."""
    head = weights_of(folder_of(calm, "teacher"))
    huge = head["classifier.weight"] * 1e6, head["classifier.bias"]
    flag = save_teacher(tmp_path / "huge", calm, ["bad", "good"], huge)
    args = command(tmp_path, calm, flag, "--amp=fp16")
    refused(args, capsys, "not finite", "--amp off", str(tmp_path / "huge"))
    assert not [*tmp_path.rglob("*.arrow")]


# ------------------------------------------------------------------------------------ the teacher
def test_cache_is_what_the_teacher_says(tmp_path, calm, monkeypatch):
    """Catches rows in another order, a layer that is off by one, the wrong pooling, a second pass,
    and a cache that serves another teacher, text, length or pooling."""
    cache, asked = tmp_path / "runs" / "teacher-cache", spy(monkeypatch, R.Encoder, "answer")

    def count_after(*more):
        asked.clear()
        R.main(command(tmp_path, calm, "--epochs=1", "--overwrite", *more))
        by_teacher = [x for x in asked if x[0][0].model.config.model_type == "bert"]
        return len([*cache.glob("*.arrow")]), bool(by_teacher)

    assert count_after() == (2, True)  # of dev the logits alone
    table = max((Dataset.from_file(str(x)) for x in cache.glob("*.arrow")), key=len)
    logits, means, first = answers(folder_of(calm, "teacher"), TEXTS)
    assert np.allclose(table.with_format("numpy")["logits_t"][:], logits, atol=1e-3)
    for i in range(1, 5):
        assert table.features[f"layer_{i}"].feature.dtype == "float16"
        layer = np.stack(table.with_format("numpy")[f"layer_{i}"][:])
        assert np.allclose(layer, means[:, i], atol=2e-3, rtol=2e-3)
    for more in (["--seed=1"], ["--method=kd"], ["--method=ckd", "--lr=0.001", "--batch-size=9"]):
        assert count_after(*more) == (2, False)
    assert count_after("--method=pkd-last") == (3, True)
    assert count_after("--max-length=8") == (5, True)
    assert count_after("--amp=bf16") == (7, True)
    head = weights_of(folder_of(calm, "teacher"))
    moved = head["classifier.weight"], head["classifier.bias"] + 1e-3
    assert count_after(save_teacher(tmp_path / "moved", calm, ["bad", "good"], moved)) == (9, True)


def test_teacher_without_a_head_is_made_once(tmp_path, models, monkeypatch):
    """Catches a teacher that the method or the seed changes, or that trains on with the student;
    weight decay on biases and norms; and maps that are left out."""
    steps, teachers = spy(monkeypatch, torch.optim.AdamW, "step"), []
    for more in (["--weight-decay=0.02"], ["--method=kd", "--seed=2", "--weight-decay=0.02"]):
        steps.clear()
        results = R.main(command(tmp_path, models, *more))
        teachers.append((results["teacher"], len(steps), weights_of(results["teacher"])))
        if "kd" not in results["method"]:
            high, low = steps[-1][0][0].param_groups
            assert all(p.ndim >= 2 for p in high["params"]) and high["weight_decay"] == 0.02
            assert all(p.ndim < 2 for p in low["params"]) and low["weight_decay"] == 0.0
            trained = sum(p.numel() for p in high["params"] + low["params"])
            assert trained == results["params_s"] + 128 * (12 + 1)  # with the student's map
    (one, made, weights), (two, again, later) = teachers
    assert one == two and (made, again) == (3 * STEPS, 2 * STEPS) and same(weights, later)
    folder = Path(one).parent
    assert folder.name.startswith("teacher-teacher-") and folder.parent == tmp_path / "runs" / "own"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-001", "model"]


# ----------------------------------------------------------------------------------- the training
KEYS = """task method seed metric best_score best_epoch last_score teacher teacher_score labels
    model teacher_metrics columns params_s params_t collapsed config versions device history"""
ROW = "stage epoch layers_t loss ce kd ild mix cosine_s seconds examples_per_s metrics score"
CASES = [*R.METHODS, "rail-l --select=last", "pkd-skip --distance=concat"]
CASES += ["kd --select=final --distance=layerwise", "rail-c --distance=contrastive --weights 1 0 2"]


@pytest.mark.parametrize("case", CASES)
def test_every_method_runs(tmp_path, calm, case):
    """Catches a missing key, a term without its weight, another draw, a file that is left over, and
    a flag that does not arrive."""
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
        weights = dict(zip(("ce", "kd", "ild", "mix"), row.stages[x["stage"] - 1][:4], strict=True))
        if "--weights" in case:
            weights |= {"ce": 1, "kd": 0, "ild": 2}
        elif "kd --select" in case:  # a distance makes it a method of three terms
            weights = {"ce": 1 / 3, "kd": 1 / 3, "ild": 1 / 3, "mix": 0}
        used = [name for name in weights if weights[name] or name == "ce"]
        assert {*ROW.split()} == {*x} and x["epoch"] == epoch
        assert used == [name for name in weights if x[name] is not None]
        total = sum(weights[name] * x[name] for name in used)
        assert x["loss"] == pytest.approx(total, rel=1e-4, abs=1e-6)
        select = results["config"]["select"] or row.select
        slots, layers = 1 if select == "final" else 2, None
        if weights["ild"]:
            layers = R.select_layers(select, 4, slots, 42, epoch)
        assert x["layers_t"] == layers
    best = max(
        (x for x in results["history"] if x["stage"] == halves[-1]), key=lambda x: x["score"]
    )
    assert (results["best_epoch"], results["best_score"]) == (best["epoch"], best["score"])
    assert results["last_score"] == results["history"][-1]["score"]
    config = hf.AutoConfig.from_pretrained(results["model"])
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": 0, "good": 1}


@pytest.mark.parametrize("method", ["rail-c", "codir", "pkd-skip", "cr-ild", "reverse"])
def test_terms_are_those_of_the_two_models(tmp_path, calm, method, monkeypatch):
    """Catches a row of another example, a layer that is off by one, the wrong pooling, a
    temperature or a label that does not arrive: at lr 0, against an independent pass."""
    calls, row, orders = spy(monkeypatch, R.IntermediateLoss, "forward"), R.METHODS[method], []
    results = R.main(
        command(tmp_path, calm, f"--method={method}", "--lr=0", "--temperature=3", "--epochs=4")
    )
    logits_s, *states_s = answers(results["model"], TEXTS)
    logits_t, *states_t = answers(folder_of(calm, "teacher"), TEXTS)
    which = [R.mean_pool, R.first_token].index(row.pool)
    ce, kd = F.cross_entropy(logits_s, GOLD).item(), R.kd_loss(logits_s, logits_t, 3.0).item()
    assert kd > 0.1
    for x in results["history"]:
        assert x["ce"] == pytest.approx(ce, abs=1e-5)
        assert x["kd"] is None or x["kd"] == pytest.approx(kd, rel=1e-4)
        if x["ild"] is None:
            continue
        steps = calls[(x["epoch"] - 1) * STEPS : x["epoch"] * STEPS]
        index = torch.cat([args[3] for args, _, _ in steps])
        orders.append(index.tolist())
        assert sorted(orders[-1]) == [*range(120)]
        layers_s = [3] if method == "cr-ild" else [1, 2]
        given_s, given_t = (torch.cat([args[i] for args, _, _ in steps]) for i in (1, 2))
        assert torch.allclose(given_s, states_s[which][index][:, layers_s], atol=1e-4)
        expected = states_t[which][index][:, x["layers_t"]]
        assert torch.allclose(given_t, expected, atol=2e-3, rtol=2e-3)
        total = sum(value.item() * len(args[3]) for args, _, value in steps) / 120
        assert x["ild"] == pytest.approx(total, rel=1e-5)
    assert len({*map(tuple, orders)}) == len(orders)  # another order in each epoch


@pytest.mark.parametrize("case", ["rail-c/off/20", "rail-c/fp16/20", "cr-ild/off/8,12"])
def test_gradients_and_rates_of_every_step(tmp_path, calm, monkeypatch, case):
    """Catches clipping before the scale of fp16 is taken away, and a schedule over all stages."""
    (method, amp, parts), norms, rates, expected = case.split("/"), [], [], []
    original = torch.optim.AdamW.step

    def look(optimizer, *args, **options):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(sum(x.square().sum() for x in grads if x is not None).item() ** 0.5)
        rates.append(optimizer.param_groups[0]["lr"])
        return original(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    more = [f"--method={method}", "--epochs=5", "--lr=0.001", "--warmup=0.25", f"--amp={amp}"]
    more += ["--weights", "50", "50", "50"] if method == "rail-c" else []
    results = R.main(command(tmp_path, calm, *more))
    assert ("float16" in results["device"]) == (amp == "fp16")
    for size in map(int, parts.split(",")):
        warm = size // 4
        expected += [0.001 * step / warm for step in range(warm)]
        expected += [0.001 * (size - step) / (size - warm) for step in range(warm, size)]
    if amp == "off":  # fp16 leaves out the steps whose gradients overflow
        assert rates == pytest.approx(expected)
    finite = [x for x in norms if x < float("inf")]
    assert len(finite) >= 12 and max(finite) < 1.01
    assert method == "cr-ild" or min(finite[-4:]) > 0.9


def test_mixed_inputs(tmp_path, calm, monkeypatch):
    """Catches an unmixed text, a mask of one text alone, a share that is always the same, and a
    consistency that is not applied or does not grow."""
    calls = spy(monkeypatch, R.Encoder, "run")
    more = ["--method=cr-ild", "--lr=0", "--epochs=4", "--batch-size=8"]
    results = R.main(command(tmp_path, calm, *more))
    pairs = [(calls[i - 1], calls[i]) for i, call in enumerate(calls) if len(call[0]) > 2]
    assert len(pairs) == 30  # 15 steps in each epoch of the first stage
    shares, values = [], []
    for (_, _, clean), ((student, batch, share), _, mixed) in pairs:
        mask, ids = batch["attention_mask"], batch["input_ids"]
        words = student.model.get_input_embeddings()(ids)
        both = mask.maximum(mask.flip(0))
        again = student.model(
            inputs_embeds=share * words + (1 - share) * words.flip(0),
            attention_mask=both,
            output_hidden_states=True,
        )
        assert torch.equal(mixed[2], both)
        assert torch.allclose(mixed[1][3], again.hidden_states[3], atol=1e-5)
        state_m, state = R.mean_pool(mixed[1][3], both), R.mean_pool(clean[1][3], mask)
        shares.append(share)
        values.append(R.mixup_loss(state_m[:, None], state[:, None], share).item())
    assert 0.5 <= min(shares) < 0.6 and 0.9 < max(shares) <= 1.0
    means = [sum(values[:15]) / 15 / 2, sum(values[15:]) / 15]  # its weight grows by e / E
    assert [row["mix"] for row in results["history"][:2]] == pytest.approx(means, rel=1e-3)


def test_pro_kd_follows_the_teacher(tmp_path, models, calm, capsys):
    """Catches a checkpoint or a temperature that is off by one epoch, and weights of the wrong
    stage. With one checkpoint it is Annealing-KD."""
    more = "--method=pro-kd --teacher-epochs=3 --teacher-lr=0.03 --lr=0 --epochs=8 --amp=off"
    more = [f"--teacher={folder_of(models, 'teacher')}", *more.split(), "--weights"]
    results = R.main(command(tmp_path, calm, *more, "0.5", "0.5", "0"))
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
    """Catches a second stage that starts from another epoch, patience in the first stage or off by
    one, a best epoch that is not of the last stage, and a tie that replaces it."""
    script_scores(monkeypatch, [0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.5, 0.5, 0.4, 0.9])
    seen, original = [], R.train_epoch

    def look(net, *args):
        before = {x: y.clone() for x, y in net.model.state_dict().items()}
        row = original(net, *args)
        seen.append((before, {x: y.clone() for x, y in net.model.state_dict().items()}))
        return row

    monkeypatch.setattr(R, "train_epoch", look)
    more = [f"--method={method}", "--epochs=10", "--patience=2", "--lr=0.01"]
    results = R.main(command(tmp_path, calm, *more))
    for other in (1, 2, 3, 4, 5):
        assert same(seen[5][0], seen[other - 1][1]) == (other == epoch)
    rows = [(row["epoch"], row["stage"], row["score"]) for row in results["history"]]
    assert rows[4:] == [(5, 1, 0.5), (6, 2, 0.2), (7, 2, 0.5), (8, 2, 0.5), (9, 2, 0.4)]
    found = results["best_epoch"], results["best_score"], results["last_score"]
    assert found == (7, 0.5, 0.4) and same(weights_of(results["model"]), seen[6][1])


def test_a_collapse_and_a_run_that_learns_nothing_are_told(tmp_path, models, monkeypatch, capsys):
    """Catches an alarm that never rings, or always, and a stored result that forgets it."""
    script_scores(monkeypatch, [0.5])  # no better than one answer for all
    assert not R.main(command(tmp_path, models, "--method=none"))["collapsed"]
    assert "WARNING: the student has learned nothing" in capsys.readouterr().out
    original, steps = R.mean_pool, spy(monkeypatch, torch.optim.AdamW, "step")

    def alike(hidden, mask):
        return original(hidden, mask) * (1e-3 if steps else 1) + (1 if steps else 0)

    monkeypatch.setattr(R, "mean_pool", alike)
    for _ in range(2):
        results = R.main(command(tmp_path, models, "--method=none", "--seed=2"))
        assert results["collapsed"] and results["history"][0]["cosine_s"] > 0.99
        assert "WARNING: the student has collapsed" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, models, monkeypatch, capsys):
    """Catches hours of NaN, and a message without its place."""
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum() * math.nan)
    args = command(tmp_path, models, "--method=none")
    refused(args, capsys, "epoch 1, step 4: the loss is not finite")


# ---------------------------------------------------------------------- interruptions and results
def test_results_come_back_and_are_not_mixed_up(tmp_path, models, capsys, monkeypatch):
    """Catches a second training, the results of other flags or data, an unseeded generator, and
    results that are lost when a new run fails."""
    args = command(tmp_path, models, "--lr=0.003")
    first = R.main(args)
    one = bits(first)
    with pytest.MonkeyPatch.context() as patch:
        steps = spy(patch, torch.optim.AdamW, "step")
        assert R.main(args) == first and not steps
    assert first["model"] in capsys.readouterr().out
    torch.manual_seed(5)
    assert bits(R.main([*args, "--overwrite"])) == one
    kept = tmp_path / "runs" / "own"
    refused([*args, "--lr=0.5", "--epochs=3"], capsys, "--lr", "--epochs", "--name", kept=kept)
    refused([*args, "--overwrite", "--student=nowhere"], capsys, "nowhere", kept=kept)
    named = R.main([*args, "--lr=0.001", "--name=slow"])
    assert named["model"] == str(kept / "rail-l-slow-seed42" / "model") and bits(named) != one
    other = R.main([*args, "--seed=1"])
    assert bits(other)[0] != one[0] and other["teacher_score"] == first["teacher_score"]
    answer = hf.pipeline("text-classification", model=first["model"])("the noun1 is word3")
    assert answer[0]["label"] in ("bad", "good")
    write_table(tmp_path / "dev.csv", rows_of(49, seed=1))  # other data under the same name
    refused(args, capsys, "content of", "dev.csv", kept=kept)


@pytest.mark.parametrize("method", ["rail-l", "codir", "cr-ild", "pro-kd"])
def test_stopped_and_started_again_gives_the_same_bits(
    tmp_path, models, method, monkeypatch, capsys
):
    """Catches a memory bank, a schedule, a best score, an epoch or a stage that is lost. The run is
    stopped in the teacher's training and in both halves of the student's, and while it saves."""
    flags = [f"--method={method}", "--epochs=4", "--lr=0.003", "--teacher-lr=0.003"]
    (tmp_path / "whole").mkdir()
    args = command(tmp_path / "stopped", models, *flags, "--teacher-epochs=2")
    moved = [arg.replace("stopped", "whole") for arg in args if "-file=" not in arg]
    whole = R.main([*args[:2], *moved])
    original, write, stops = torch.optim.AdamW.step, R.write, [6, 7, 9, 6]

    class Stopped(BaseException):
        pass

    for stop in stops:
        count = [0]

        def step(self, *args, count=count, stop=stop, **options):
            count[0] += 1
            if count[0] == stop:
                raise Stopped
            return original(self, *args, **options)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(torch.optim.AdamW, "step", step)
            R.main(args)

    def half(path, content):
        path.with_name(path.name + ".partial").write_bytes(bytes(content)[:99])
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(R, "write", half)
        R.main(args)
    assert write is R.write and [*(tmp_path / "stopped").rglob("checkpoint.pt")]
    refused([*args, "--lr=0.5"], capsys, "checkpoint.pt", "--lr", "--name")
    again = R.main(args)
    assert "resumed after epoch" in capsys.readouterr().out and bits(again) == bits(whole)
    folder = Path(again["model"]).parent
    assert sorted(x.name for x in folder.iterdir()) == ["model", "results.json"]


def start(args, output):
    """The file as a program of its own, which writes to a file."""
    command = [sys.executable, str(HERE / "railkd.py"), *args]
    return subprocess.Popen(command, stdout=output.open("w"), stderr=subprocess.STDOUT)


def test_killed_processes_go_on_with_the_same_bits(tmp_path, models):
    """Catches half a file, and work that only an orderly end saves: SIGKILL at random moments, and
    Ctrl-C, which is one line and exit 130."""
    flags = ["--epochs=6", "--lr=0.003", "--teacher-epochs=2", "--batch-size=4"]
    args = command(tmp_path / "killed", models, *flags)
    moved = [arg.replace("killed", "whole") for arg in args if "-file=" not in arg]
    whole = R.main([*args[:2], *moved])
    for number, kind in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGKILL)):
        output = tmp_path / f"{number}.txt"
        running = start(args, output)
        seen = ("epoch 1 ", "method ", "epoch 3  layers_t")[number]
        while seen not in output.read_text() and running.poll() is None:
            time.sleep(0.005)
        time.sleep(random.random() / 10)
        running.send_signal(kind)
        code = running.wait(60)
        assert code in (-9, 130, 0), output.read_text()
        if code == 130:
            assert output.read_text().splitlines()[-1].startswith("railkd.py: stopped")
    assert bits(R.main(args)) == bits(whole)


RANKS = """import runpy, sys
sys.path.insert(0, sys.argv[1])
import railkd
railkd.main([*sys.argv[3:], f"--output-dir={sys.argv[2]}/uneven", "--batch-size=16"])
sys.argv[1:] = [*sys.argv[3:], f"--output-dir={sys.argv[2]}/even", "--batch-size=15"]
runpy.run_path(railkd.__file__, run_name="__main__")
"""


def test_two_processes_do_what_one_does(tmp_path, calm):
    """Catches a loss or a gradient that is the sum or the share of one process, and unequal shares
    where the batch does not divide the data. (Sums in another order differ in the last bits.)"""
    (tmp_path / "ranks.py").write_text(RANKS)
    args = command(tmp_path, calm, "--lr=0.001", "--seed=3")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = python(*torchrun, tmp_path / "ranks.py", HERE, tmp_path / "two", *args)
    assert done.returncode == 0, done.stderr
    one = R.main([*args, "--batch-size=30"])
    folder = Path("own", "rail-l-seed3", "results.json")
    two = json.loads((tmp_path / "two" / "even" / folder).read_text())
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["layers_t"] == b["layers_t"] and a["score"] == pytest.approx(b["score"])
        for name in ("loss", "ce", "kd", "ild"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    w, v = weights_of(one["model"]), weights_of(two["model"])
    assert all(torch.allclose(w[name], v[name], atol=2e-4) for name in w)
    for row in json.loads((tmp_path / "two" / "uneven" / folder).read_text())["history"]:
        assert row["seconds"] * row["examples_per_s"] == pytest.approx(128)
    assert done.stdout.count("epoch 2  layers_t") == 2  # two runs, and one process speaks


# ----------------------------------------------------------------------- the script and the table
def test_report(tmp_path, capsys):
    """Catches the deviation of a population, and an average over tasks that happen to be there."""
    scores = {
        "rte/kd-seed1": 0.5,
        "rte/kd-seed2": 0.6,
        "cola/kd-seed1": 0.3,
        "rte/none-x-seed1": 0.4,
    }
    for name, score in scores.items():
        content = {"task": name.split("/")[0], "best_score": score}
        teacher = {} if "none" in name else {"teacher": "x", "teacher_score": 0.7}
        content |= {"teacher": None, "teacher_score": None} | teacher
        R.write(tmp_path / name / "results.json", json.dumps(content).encode())
    R.main(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| method | cola | rte | average |" in out
    assert "| kd | 30.0 (n=1) | 55.0 ± 7.1 (n=2) | 42.5 |" in out
    assert "| none-x | - | 40.0 (n=1) | - |" in out
    assert "| teacher | 70.0 (n=1) | 70.0 (n=1) | 70.0 |" in out


FAKE = """#!{python} -ES
import os, sys
with open("{folder}/calls", "a") as file:
    print(*sys.argv[2:], file=file)
if sys.argv[2] == "--task":
    sys.exit(130 if "stop" in sys.argv else "kd" in sys.argv and "2" in sys.argv)
"""


def test_script_runs_the_whole_grid(tmp_path):
    """Catches a run that is left out, a failure that stops the rest or is not told, points of the
    grid that share a folder, and a script that goes on after Ctrl-C."""
    (tmp_path / "python3").write_text(FAKE.format(python=sys.executable, folder=tmp_path))
    (tmp_path / "python3").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "METHODS": "none kd", "SEEDS": "1 2"}
    line = ["-c", "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])", "run_glue.sh"]
    more = ["--output-dir", "out", "--epochs=3"]
    done = python(*line, *more, **path, TASKS="cola rte", SEARCH="1")
    expected, points = [], itertools.product(("1e-5", "2e-5", "5e-5", "4e-6"), (8, 16, 32))
    runs = [*itertools.product(("cola", "rte"), ("none", "kd"), "12")]
    for (lr, size), (task, method, seed) in itertools.product(points, runs):
        point = f"--name lr{lr}-batch{size} --lr {lr} --batch-size {size}"
        expected.append(
            f"--task {task} --method {method} --seed {seed} --output-dir out {point} --epochs=3"
        )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [*expected, "--report out"] and done.returncode == 1
    assert len([x for x in done.stderr.splitlines() if " kd seed 2" in x]) == len(expected) // 4
    stopped = python(*line, "stop", **path, TASKS="cola")
    assert stopped.returncode == 130 and stopped.stdout.count("== ") == 1


# ----------------------------------------------------------------------- the command and its README
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


@pytest.mark.parametrize("how", ["copied", "imported"])
def test_torch_alone_is_enough(how):
    """For the method part, copied from between its two comments, and to import the file."""
    code = (HERE / "railkd.py").read_text(encoding="utf-8")
    part = code.split("# ==== the method\n")[1].split("# ==== end of the method")[0]
    method = part if how == "copied" else "from railkd import *"
    done = python("-c", USE.format(method=method))
    assert done.stdout == "True\n" and not done.stderr, done.stderr


def test_defaults_are_the_documented_ones(capsys):
    """Catches a default that was changed for a try, and a flag without help."""
    args = vars(R.parse(["--task", "sst2"]))
    expected = {"method": "rail-l", "epochs": 40, "patience": None, "batch_size": 32, "lr": 2e-5}
    expected |= {"temperature": 2.0, "max_length": 128, "seed": 42, "teacher_epochs": 3}
    expected |= {"teacher": "google-bert/bert-base-uncased", "weights": None, "start": "ridge"}
    expected |= {"student": "distilbert/distilbert-base-uncased"}
    assert {name: args[name] for name in expected} == expected and len(args) == 35
    assert R.parse(["--task=toy"]).lr == 1e-3 and R.parse(["--task=toy", "--lr=0.5"]).lr == 0.5
    assert R.parse(["--task=toy", "--method=cr-ild"]).epochs == 16
    assert R.parse(["--task=sst2", "--method=none", "--teacher=x"]).teacher is None
    with pytest.raises(SystemExit):
        R.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in args)


def test_toy_task_is_learned(tmp_path):
    """Catches a first command that does not work, and a teacher that learns nothing from it."""
    done = python(HERE / "railkd.py", "--task=toy", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = R.read_results(tmp_path / "runs" / "toy" / "rail-l-seed42")
    assert results["teacher_score"] > 0.9 and results["best_score"] > 0.55


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs clones of GLUE in ../shared/hub")
@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "stsb", "rte", "wnli", "mnli"])
def test_real_glue_is_read(task):
    """Catches a renamed column, test labels of -1 that come in, and label names that get lost."""
    args = [f"--task={task}", f"--data-root={SHARED}", "--max-train-examples=50"]
    data = R.load_data(R.parse(args))
    names = {"sst2": ["negative", "positive"], "mnli": [*MNLI]}
    assert data.names == names.get(task, data.names) and bool(data.names) == (task != "stsb")
    assert len(data.labels["train"]) == 50 and data.labels[data.dev[0]].min() >= 0
    assert len(data.texts["train"].column_names) == (1 if task in ("sst2", "cola") else 2)
