# SPDX-License-Identifier: MIT
"""Tests of railkd.py: no network, no GPU, no download. A docstring names the mistake it catches."""

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file

import railkd as R

torch.set_num_threads(1)  # tiny models only; it also keeps the sums in one order
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for what the tests start
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # for tiny models a pool of threads takes longer
HERE = Path(__file__).parent


def write_table(path, columns):
    """Columns -> a csv, tsv, json lines or parquet file, by its suffix; the path as text."""
    table = pandas.DataFrame(columns)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def rows_of(size, labels=("bad", "good"), seed=0):
    """Texts of the toy language with labels of that name."""
    table = R.toy_data(seed, size)
    return {"text": table["text"], "label": [labels[x == "good"] for x in table["label"]]}


def other_ids(teacher, folder):
    """The teacher's words with other ids become the folder's vocabulary -> how many there are."""
    words = (Path(teacher) / "vocab.txt").read_text().split("\n")
    (folder / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]))
    return len(words)


def two_models(teacher, student, width, **options):
    """Flags: the teacher and an untrained student of 3 blocks, with a tokenizer of its own."""
    student.mkdir()
    sizes = {"vocab_size": other_ids(teacher, student), "dim": width, "hidden_dim": 24}
    config = hf.DistilBertConfig(n_layers=3, n_heads=2, **sizes, **options)
    torch.manual_seed(0)
    hf.DistilBertForMaskedLM(config).save_pretrained(student)
    return ["--teacher", str(teacher), "--student", str(student), "--device", "cpu"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Flags: an untrained teacher, 4 blocks x 16, and a student, 3 x 12."""
    folder = tmp_path_factory.mktemp("models")
    return two_models(R.toy_model(folder / "teacher", 4, 16), folder / "student", 12)


def command(tmp_path, models, *more):
    """A whole run's flags: 120 training examples, 50 to evaluate on, 2 epochs of 4 steps."""
    tmp_path.mkdir(exist_ok=True)
    train = write_table(tmp_path / "train.csv", rows_of(120))
    dev = write_table(tmp_path / "dev.csv", rows_of(50, seed=1))
    files = ["--train-file", train, "--validation-file", dev]
    short = ["--output-dir", str(tmp_path / "runs"), "--epochs", "2", "--teacher-epochs", "1"]
    return [*files, *models, *short, *more]


def python(*args, cwd=HERE, timeout=150, **environment):
    """A process of its own; a hang is a failure."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=clean | environment, **options)


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(args, capsys, *words, kept=None):
    """Exit 2 with one readable line that holds the words; the files in `kept` stay as they are."""
    before = kept and files_of(kept)
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as stop:
        R.main(args)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("railkd.py: error: "), line
    assert line.endswith("\n") and line[:-1].isprintable() and line[-2] != ":", line
    assert len(line) < 700 and all(word in line for word in words), line
    assert before == (kept and files_of(kept)), line


B, M, N, D_S, D_T = 6, 3, 7, 10, 14  # batch, slots, teacher blocks, widths
DRAWS = [R.sample_layers(N, M, 3, epoch) for epoch in range(1, 41)]  # at which a fit aims
INDEX = torch.tensor([3, 1, 4, 0, 5, 9])  # of a batch: its rows in a memory bank of 12
UNSEEN = [row for row in range(12) if row not in INDEX]  # of that bank
SAME = torch.zeros(B, dtype=torch.long)  # of a batch: one label for all


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def mapped(maps, x):
    """What a map makes of x, in numpy; several of them: of (B, k, d), each of its own slot."""
    if isinstance(maps, torch.nn.ModuleList):
        return np.stack([mapped(linear, x[:, i]) for i, linear in enumerate(maps)], axis=1)
    y = x @ to_numpy(maps.weight).T
    return y if maps.bias is None else y + to_numpy(maps.bias)


def pooled(k=M, d_s=D_S, batch=B):
    """Pooled vectors of M slots and of k teacher layers."""
    return torch.randn(batch, M, d_s), torch.randn(batch, k, D_T)


def hidden_states(num_layers, batch, length, width):
    return [torch.randn(batch, length, width) for _ in range(num_layers + 1)]


def options_of(distance):
    """What the distance cannot do without."""
    return {"num_examples": 12} if distance == "contrastive" else {}


# --------------------------------------------------------------------------- pooling and draw
def test_mean_pool_is_the_mean_of_the_tokens():
    """Catches padding averaged in, a sum for a mean, a mean over the wrong axis; hidden[:, 0] where
    it is padding; multiplying by the mask, which keeps NaN, in the value and in the gradient."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    padding = ~mask.bool()
    hidden = torch.randn(4, 5, 3).masked_fill(padding[..., None], math.nan).requires_grad_()
    result, first = R.mean_pool(hidden, mask), R.first_token(hidden, mask)
    for b in range(4):
        tokens = [to_numpy(hidden[b, i]) for i in range(5) if mask[b, i]] or [np.zeros(3)]
        assert np.allclose(to_numpy(result[b]), sum(tokens) / len(tokens), atol=1e-6)
        assert np.allclose(to_numpy(first[b]), tokens[0])
    result.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[padding].abs().sum() == 0


def test_pooling_is_in_32_bits_and_names_both_shapes():
    """Catches a sum of many half-precision values, which overflows at 65,504; a mask that is
    broadcast silently, a message that does not help."""
    hidden, mask = torch.full((1, 100, 2), 1000.0, dtype=torch.float16), torch.ones(1, 100)
    with torch.autocast("cpu", torch.bfloat16):
        result = R.mean_pool(hidden, mask)
    assert result.dtype == torch.float32 and torch.allclose(result, torch.full((1, 2), 1000.0))
    for mask in (torch.zeros(2, 4), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=rf"\[2, 3, 4\].*{re.escape(str([*mask.shape]))}"):
            R.mean_pool(torch.zeros(2, 3, 4), mask)


def test_draw_covers_every_layer_and_every_pair_equally():
    """Catches a biased or unsorted draw, layer 0 or the last layer, drawing with replacement."""
    draws = [R.sample_layers(N, M, seed, epoch) for seed in range(40) for epoch in range(100)]
    for draw in draws:
        assert draw == sorted(set(draw)) and len(draw) == M and set(draw) <= set(range(1, N))
    for size in (1, 2, 3):  # layers, pairs, whole subsets
        chance = math.comb(N - 1 - size, M - size) / math.comb(N - 1, M)
        slack = 4.5 * math.sqrt(chance * (1 - chance) / len(draws))
        for subset in itertools.combinations(range(1, N), size):
            count = sum(set(subset) <= set(draw) for draw in draws)
            assert abs(count / len(draws) - chance) < slack


def test_draw_depends_on_its_arguments_alone():
    """Catches a draw from a global generator, an epoch or a seed that is ignored."""
    random.seed(1)
    before = R.sample_layers(12, 5, 3, 4)
    random.seed(2)
    torch.manual_seed(2)
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert R.sample_layers(12, 5, 3, 4) == before
    R.select_layers("permuted", 12, 5, 3, 4)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert len({tuple(R.sample_layers(12, 5, 3, epoch)) for epoch in range(20)}) > 10
    assert len({tuple(R.sample_layers(12, 5, seed, 4)) for seed in range(20)}) > 10


@pytest.mark.parametrize("num_layers, k", [(6, 6), (6, 0), (1, 1)])
def test_impossible_draw_names_both_numbers(num_layers, k):
    """Catches fewer layers than asked for, an error that does not say what is wrong."""
    with pytest.raises(ValueError, match=rf"k = {k}\b.*num_layers = {num_layers}\b"):
        R.sample_layers(num_layers, k, 0, 0)
    with pytest.raises(ValueError):
        R.select_layers("skip", num_layers, k)


def test_selections_are_the_published_ones():
    """Catches an off-by-one layer; the paper's own table for BERT-12 and RoBERTa-24. And a permuted
    order that is drawn anew in every epoch, or is the same for every seed."""
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
    for epoch in (1, 7):
        assert orders == [R.select_layers("permuted", 12, 5, seed, epoch) for seed in range(9)]
    assert len({tuple(order) for order in orders}) > 3


def test_methods_are_the_published_ones():
    """Catches a method with the layers, the distance or the pooling of another, a weight of Eq. 4
    that was changed, two stages in the wrong order."""
    expected = {"rail-l": "random layerwise", "rail-c": "random concat", "ckd": "all group"}
    expected |= {"alp-kd": "all attention", "codir": "all contrastive", "cr-ild": "final direct"}
    expected |= {"pkd-skip": "skip direct", "pkd-last": "last direct", "reverse": "reverse direct"}
    expected |= {"permuted": "permuted direct", "all-to-one": "middle direct"}
    expected |= dict.fromkeys(["none", "kd", "pro-kd"], "None None")
    third = pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
    weights = {"none": [(1, 0, 0, 0)], "kd": [(0.5, 0.5, 0, 0)]}
    weights |= {"cr-ild": [(0, 0, 1, 0.1), (0, 1, 0, 0)], "pro-kd": [(0, 1, 0, 0), (1, 0, 0, 0)]}
    assert set(R.METHODS) == set(expected)
    for name, row in R.METHODS.items():
        assert f"{row.select} {row.distance}" == expected[name]
        assert row.pool is (R.first_token if "pkd" in name else R.mean_pool)
        assert [stage[:4] for stage in row.stages] == weights.get(name, [third]), name


# ----------------------------------------------------------------------- losses against numpy
def test_kd_loss_against_numpy():
    """Catches T^2 left out, T after the softmax, the mean over classes, the two swapped; KL for a
    regression or for annealed logits, where the squared error stands, phi upside down."""
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
    """Catches a teacher with a gradient, a loss in 16 bits, shapes that are broadcast."""
    s, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (R.kd_loss(s, t, 2.0) + R.kd_loss(s, t, 2.0, max_temperature=7.0)).backward()
    assert s.grad.abs().sum() > 0 and t.grad is None
    assert R.kd_loss(s.bfloat16(), t.bfloat16(), 2.0).dtype == torch.float32
    for bad in [(s, t[:, :2], 2.0), (s, t[:, :1], 2.0), (s, t, 0.0), (s[0], t[0], 2.0)]:
        with pytest.raises(ValueError):
            R.kd_loss(*bad)


def test_mixup_is_near_both_texts():
    """Catches the shares swapped, a batch not reversed, clean with a gradient, no normalise."""
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
@pytest.mark.parametrize("bias", [True, False])
def test_layerwise_is_equation_2(shared, bias):
    """Catches a missing normalise, a mean over slots or widths, alpha ignored, slots mixed up."""
    alpha = [0.5, 1.0, 2.0]
    options = {"proj_dim": 8, "shared": shared, "bias": bias, "alpha": alpha}
    distance = R.LayerwiseDistance(D_S, D_T, M, start="random", **options)
    s, t = pooled()
    z_s, z_t = mapped(distance.proj_s, to_numpy(s)), mapped(distance.proj_t, to_numpy(t))
    expected = 0.0
    for b, i in itertools.product(range(B), range(M)):
        x, y = z_s[b, i], z_t[b, i]
        difference = y / np.linalg.norm(y) - x / np.linalg.norm(x)
        expected += alpha[i] * sum(difference**2) / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


def test_concat_is_equation_3():
    """Catches normalising each slot, concatenating over the batch, a sum of m terms, no alpha."""
    distance = R.ConcatDistance(D_S, D_T, M, proj_dim=8, start="random", alpha=[0.5])
    s, t = pooled()
    z_s = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(distance.proj_t, to_numpy(t).reshape(B, -1)))
    assert np.isclose(distance(s, t).item(), 0.5 * ((z_s - z_t) ** 2).sum() / B, atol=1e-5)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_direct_is_pkd(d_s):
    """Catches the author code's element mean, another range, a map where the widths are equal."""
    distance = R.DirectDistance(d_s, D_T, M, start="random" if d_s != D_T else "ridge")
    s, t = pooled(d_s=d_s)
    if d_s == D_T:  # nothing to fit
        assert distance(3 * t, t).item() == pytest.approx(0, abs=1e-5)
        assert distance(-3 * t, t).item() == pytest.approx(4 * M, rel=1e-5)
    z = to_numpy(s) if d_s == D_T else mapped(distance.proj_s, to_numpy(s))
    expected = ((unit(z) - unit(to_numpy(t))) ** 2).sum() / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


def test_group_is_ckd():
    """Catches groups that are not contiguous or whose sizes differ by two, alpha ignored."""
    alpha = [0.5, 1.0, 2.0]
    distance = R.GroupDistance(D_S, D_T, M, num_targets=8, start="random", alpha=alpha)
    s, t = pooled(k=8)
    expected = 0.0
    for i, layers in enumerate(np.array_split(np.arange(8), M)):
        target = unit(np.concatenate([to_numpy(t[:, layer]) for layer in layers], axis=-1))
        z = unit(mapped(distance.proj_s[i], to_numpy(s[:, i])))
        expected += alpha[i] * ((z - target) ** 2).sum() / B
    assert np.isclose(distance(s, t).item(), expected, atol=1e-5)


@pytest.mark.parametrize("d_s", [D_S, D_T])
def test_attention_is_alp_kd(d_s):
    """Catches a softmax over slots instead of layers, scaled products, normalised vectors."""
    distance = R.AttentionDistance(d_s, D_T, M, num_targets=6, start="random")
    s, t = pooled(k=6, d_s=d_s)
    z_s, z_t = to_numpy(s), to_numpy(t)
    z_s = z_s if d_s == D_T else mapped(distance.proj_s, z_s)
    total, weights = 0.0, np.zeros((B, M, 6))
    for b, i in itertools.product(range(B), range(M)):
        e = np.exp([z_s[b, i] @ z_t[b, k] for k in range(6)])
        weights[b, i] = e / e.sum()
        mixture = sum(weights[b, i, k] * z_t[b, k] for k in range(6))
        total += ((z_s[b, i] - mixture) ** 2).sum()
    assert np.isclose(distance(s, t).item(), total / (B * M * D_T), rtol=1e-4)
    assert np.allclose(distance.weights, weights, atol=1e-4)


def contrastive(**options):
    return R.ContrastiveDistance(D_S, D_T, M, 12, proj_dim=8, start="random", **options)


def test_contrastive_is_info_nce():
    """Catches a wrong anchor, no temperature, no positive below the line, a bank not used."""
    distance = contrastive(num_negatives=5).eval()
    distance.bank_labels[7] = 1  # the one row of another label: all five negatives are it
    s, t = pooled()
    z_s = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    z_t = unit(mapped(distance.proj_t, to_numpy(t).reshape(B, -1)))
    positive = (z_s * z_t).sum(1) / 0.07
    negative = z_t @ to_numpy(distance.bank[7]) / 0.07
    expected = -np.mean(positive - np.log(np.exp(positive) + 5 * np.exp(negative)))
    loss = distance(s, t, index=torch.arange(B), labels=SAME)
    assert np.isclose(loss.item(), expected, atol=1e-4)


def rows_drawn(distance, s, t, index, labels):
    """The rows of the memory bank on which the loss of one example depends."""
    bank = distance.bank.requires_grad_()
    bank.grad = None
    distance.eval()(s[:1], t[:1], index=index, labels=labels).backward()
    return bank.grad.abs().sum(1).nonzero()[:, 0].tolist()


def test_contrastive_draws_the_right_negatives():
    """Catches negatives of the own label, the own row, rows whose label is not known; labels that
    are registered after the draw, or used where the batch has none; rows, labels in a list."""
    distance = contrastive(num_negatives=500)
    s, t = pooled()
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    distance.bank[UNSEEN] = math.nan  # not known yet: the first batch must not see them
    assert distance(s, t, index=INDEX.tolist(), labels=labels.tolist()).isfinite()
    distance.bank[UNSEEN] = 0.0
    for row, label in zip(INDEX.tolist(), labels.tolist(), strict=True):
        drawn = rows_drawn(distance, s, t, [row], [label])
        assert drawn == sorted(INDEX[labels != label].tolist())
        for none in (None, [0.5]):
            drawn = rows_drawn(distance, s, t, [row], none)
            assert drawn == [other for other in range(12) if other != row]
    for same in (SAME, torch.rand(B), None):  # one label, a regression, no labels
        distance = contrastive(num_negatives=500)
        distance(s, t, index=INDEX, labels=same)
        for row in INDEX:
            drawn = rows_drawn(distance, s, t, row[None], None if same is None else same[:1])
            assert drawn == [other for other in range(12) if other != row]
    with pytest.raises(ValueError, match="index"):
        distance(s, t)


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_memory_bank_is_updated_in_training_alone(momentum):
    """Catches an update in eval mode, of the wrong rows, without momentum or normalising."""
    distance = contrastive(momentum=momentum)
    s, t = pooled()
    before = distance.bank.clone()
    distance.eval()(s, t, index=INDEX, labels=SAME + 1)
    assert torch.equal(distance.bank, before) and (distance.bank_labels == -1).all()
    distance.train()(s, t, index=INDEX, labels=SAME + 1)
    z = unit(mapped(distance.proj_s, to_numpy(s).reshape(B, -1)))
    expected = unit(momentum * to_numpy(before[INDEX]) + (1 - momentum) * z)
    assert np.allclose(distance.bank[INDEX], expected, atol=1e-5)
    assert (distance.bank_labels[INDEX] == 1).all()
    assert torch.equal(distance.bank[UNSEEN], before[UNSEEN])
    assert (distance.bank_labels[UNSEEN] == -1).all()


def test_maps_are_there_where_the_width_is_the_projection_s():
    """Catches a map left out as nothing changes its width, one for both sides where one is due."""
    for name in ("layerwise", "concat"):
        assert len([*R.DISTANCES[name](8, 8, 1, proj_dim=8).parameters()]) == 4  # one for each side
    for name in ("direct", "group", "attention"):
        assert not [*R.DISTANCES[name](8, 8, 2).parameters()]
        assert len([*R.DISTANCES[name](8, 9, 2).parameters()]) == 4  # one for each slot


@pytest.mark.parametrize("name", R.DISTANCES)
def test_what_goes_into_a_distance_and_comes_out(name):
    """Catches a layer or an example broadcast to many, a misspelt option taken for another;
    F.normalize of 16-bit values under autocast."""
    distance = R.DISTANCES[name](D_S, D_T, M, start="random", **options_of(name)).eval()
    s, t = pooled()
    torch.manual_seed(1)  # for the negatives
    expected = distance(s, t, index=INDEX)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(distance(s, t, index=INDEX), expected)
        assert distance(s.bfloat16(), t.bfloat16(), index=INDEX).dtype == torch.float32
    for bad in ((s[:, :1], t), (s, t[:, :1]), (s[..., :1], t), (s, t[..., :1]), (s, t[:1])):
        with pytest.raises(ValueError, match="need pooled"):
            distance(*bad, index=INDEX)
    for bad in ({"start": "rigid"}, {"teacher_proj": "thawed"}, {"alpha": [1] * 4}, {"alpha": 2}):
        with pytest.raises(ValueError):
            R.DISTANCES[name](D_S, D_T, M, **options_of(name), **bad)


# ---------------------------------------------------------------------------- the ridge start
def assert_ridge(linear, x, y):
    """The map is the ridge solution from x to y, in numpy."""
    centre = 0 if linear.bias is None else 1
    x0, y0 = x - centre * x.mean(0), y - centre * y.mean(0)
    penalty = 0.1 * np.trace(x0.T @ x0) / x.shape[1]
    weight = np.linalg.solve(x0.T @ x0 + penalty * np.eye(x.shape[1]), x0.T @ y0).T
    assert np.allclose(to_numpy(linear.weight), weight, atol=1e-5)
    if linear.bias is not None:
        bias = y.mean(0) - weight @ x.mean(0)
        assert np.allclose(to_numpy(linear.bias), bias, atol=1e-5)


def fitted_loss(method, epoch=None, **options):
    """An IntermediateLoss that was fitted with two batches, and the pooled vectors of each layer
    of these: [(40, d), ..] of the student and of the teacher, in numpy."""
    loss = R.IntermediateLoss(method, M + 1, N, D_S, D_T, seed=3, **options)
    hidden_s, hidden_t = hidden_states(M + 1, 40, 5, D_S), hidden_states(N, 40, 4, D_T)
    hidden_s = [h + 1 for h in hidden_s]  # a mean that a centring has to take away
    mask_s, mask_t = torch.ones(40, 5), torch.ones(40, 4)
    mask_s[:20, 3:] = 0
    mask_t[30:, 0] = 0
    batches = []
    for rows in (slice(0, 25), slice(25, 40)):
        states_s, states_t = [h[rows] for h in hidden_s], [h[rows] for h in hidden_t]
        batches.append((states_s, mask_s[rows], states_t, mask_t[rows]))
    if epoch is not None:
        loss.set_epoch(epoch)
    before, state, torch_state = loss.layers_t, random.getstate(), torch.get_rng_state()
    loss.fit(batches)
    assert loss.layers_t == before and random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    pool = R.METHODS[method].pool
    x = [to_numpy(pool(h, mask_s)) for h in hidden_s]
    return loss, x, [to_numpy(pool(h, mask_t)) for h in hidden_t]


@pytest.mark.parametrize("shared, bias", [(True, True), (False, True), (False, False)])
def test_ridge_start_of_equation_2(shared, bias):
    """Catches uncentred features, a centring no bias undoes, an absolute penalty, raw targets."""
    loss, x, h = fitted_loss("rail-l", shared=shared, bias=bias, proj_dim=8)
    maps_t = [loss.distance.proj_t] * M if shared else loss.distance.proj_t
    y = [sum(unit(mapped(maps_t[i], h[draw[i]])) for draw in DRAWS) / 40 for i in range(M)]
    if shared:
        assert_ridge(loss.distance.proj_s, np.concatenate(x[1 : M + 1]), np.concatenate(y))
    else:
        for i in range(M):
            assert_ridge(loss.distance.proj_s[i], x[i + 1], y[i])


@pytest.mark.parametrize("epoch", [None, 5])
def test_ridge_start_of_equation_3(epoch):
    """Catches the unit of the mean for the mean of units; a fit that depends on a draw."""
    loss, x, h = fitted_loss("rail-c", epoch, proj_dim=8)
    assert loss.layers_t == (epoch and R.sample_layers(N, M, 3, epoch))
    y = 0.0
    for draw in DRAWS:
        side_by_side = np.concatenate([h[layer] for layer in draw], axis=1)
        y = y + unit(mapped(loss.distance.proj_t, side_by_side)) / 40
    assert_ridge(loss.distance.proj_s, np.concatenate(x[1 : M + 1], axis=1), y)


@pytest.mark.parametrize("method", ["pkd-skip", "pkd-last", "cr-ild", "permuted"])
def test_ridge_start_of_fixed_layers(method):
    """Catches an off-by-one layer in the start, the pooling of another method."""
    loss, x, h = fitted_loss(method)
    assert loss.layers_t == R.select_layers(R.METHODS[method].select, N, len(loss.layers_s), 3)
    for i, (layer_s, layer_t) in enumerate(zip(loss.layers_s, loss.layers_t, strict=True)):
        assert_ridge(loss.distance.proj_s[i], x[layer_s], unit(h[layer_t]))


def test_ridge_start_of_the_others():
    """Catches a start towards another target than the formula's."""
    direct, x, h = fitted_loss("pkd-skip", select="random")
    for i in range(M):
        y = sum(unit(h[draw[i]]) for draw in DRAWS) / 40
        assert_ridge(direct.distance.proj_s[i], x[i + 1], y)
    group, x, h = fitted_loss("ckd")
    for i in range(M):
        y = unit(np.concatenate(h[2 * i + 1 : 2 * i + 3], axis=1))
        assert_ridge(group.distance.proj_s[i], x[i + 1], y)
    attention, x, h = fitted_loss("alp-kd")
    for i in range(M):
        assert_ridge(attention.distance.proj_s[i], x[i + 1], np.mean(h[1:N], axis=0))
    codir, x, h = fitted_loss("codir", num_examples=40, proj_dim=8)
    y = unit(mapped(codir.distance.proj_t, np.concatenate(h[1:N], axis=1)))
    assert_ridge(codir.distance.proj_s, np.concatenate(x[1 : M + 1], axis=1), y)


@pytest.mark.parametrize("name", R.DISTANCES)
def test_ridge_must_be_fitted_and_random_must_not(name):
    """Catches a silent start from random maps, a flag that is not in the state dict."""
    options = options_of(name)
    s, t = pooled(batch=12)
    more = {"index": torch.arange(12), "labels": torch.arange(12) % 2}
    distance = R.DISTANCES[name](D_S, D_T, M, **options)
    with pytest.raises(RuntimeError, match="fit"):
        distance(s, t, **more)
    loose = R.DISTANCES[name](D_S, D_T, M, start="random", **options)
    loose.fit(s, t)
    assert not loose.fitted and loose(s, t, **more).isfinite()
    distance.fit(s, t)
    assert distance.fitted
    if name not in ("contrastive", "attention"):  # for these the target is not the least loss
        assert distance(s, t) < 0.8 * loose(s, t)
    loaded = R.DISTANCES[name](D_S, D_T, M, **options)
    assert not loaded.fitted
    loaded.load_state_dict(distance.state_dict())
    assert loaded.fitted and loaded(s, t, **more).isfinite()


# ------------------------------------------------------------------- the loss object on models
def tiny(kind, layers, width):
    """A tiny random model of the kind."""
    options = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    options |= {"intermediate_size": 2 * width, "bos_token_id": 0, "eos_token_id": 0}
    options |= {"vocab_size": 100, "image_size": 16, "patch_size": 4, "num_channels": 1}
    if kind == "funnel":  # it counts its blocks itself, and its states get shorter
        options = {"vocab_size": 100, "d_model": width, "n_head": 2, "architectures": []}
    return hf.AutoModel.from_config(hf.AutoConfig.for_model(kind, **options)).eval()


def states(model, length, pad=0):
    """The hidden states and the mask of four inputs, always the same, with padding at their end."""
    generator = torch.Generator().manual_seed(0)
    if model.config.model_type == "vit":
        images = torch.randn(4, 1, 16, 16, generator=generator)
        return model(images, output_hidden_states=True).hidden_states, None
    ids = torch.randint(5, 60, (4, length), generator=generator)
    ids = F.pad(ids, (0, pad), value=1)
    mask = F.pad(torch.ones(4, length, dtype=torch.long), (0, pad))
    return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states, mask


ARCHITECTURES = ["bert distilbert rail-l", "mpnet roberta rail-c", "gpt2 gpt2 pkd-skip"]
ARCHITECTURES += ["bert roberta alp-kd", "bert roberta ckd", "vit vit rail-c"]


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_loss_works_on_every_architecture(case):
    """Catches what only one architecture has, a vector that depends on its batch mates."""
    kind_t, kind_s, method = case.split()
    teacher, student = tiny(kind_t, 6, 16), tiny(kind_s, 4, 12)
    loss = R.IntermediateLoss(method, 4, 6, 12, 16)
    loss.fit([(*states(student, 5), *states(teacher, 7))])
    loss.set_epoch(2)
    value = loss(*states(student, 5), *states(teacher, 7))
    padded = loss(*states(student, 5, pad=3), *states(teacher, 7, pad=2))
    assert torch.allclose(value, padded, atol=1e-5)
    assert value.ndim == 0 and 0 < value < 4 * 3
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("method", [name for name, row in R.METHODS.items() if row.distance])
@pytest.mark.parametrize("d_s", [12, 16])
def test_gradients_reach_all_they_should(method, d_s):
    """Catches a detached student, a teacher that learns, a map in a plain list or left out."""
    loss = R.IntermediateLoss(method, 4, 6, d_s, 16, **options_of(R.METHODS[method].distance))
    assert loss.layers_s == ([4] if method == "cr-ild" else [1, 2, 3])
    hidden_s, hidden_t = hidden_states(4, 4, 5, d_s), hidden_states(6, 4, 7, 16)
    for hidden in hidden_s + hidden_t:
        hidden.requires_grad_()
    batch = (hidden_s, torch.ones(4, 5), hidden_t, torch.ones(4, 7))
    loss.fit([batch])
    loss.set_epoch(1)
    loss(*batch, index=torch.arange(4), labels=torch.tensor([0, 1, 0, 1])).backward()
    for layer, hidden in enumerate(hidden_s):
        reached = hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)
        assert reached == (layer in loss.layers_s)
    assert all(hidden.grad is None for hidden in hidden_t)
    for name, p in loss.named_parameters():
        frozen = "proj_t" in name and method != "codir"
        assert p.requires_grad != frozen and (frozen or p.grad.abs().sum() > 0), name
    distance = R.LayerwiseDistance(D_S, D_T, M, teacher_proj="trained", start="random")
    distance(*pooled()).backward()
    assert distance.proj_t.weight.grad.abs().sum() > 0


def test_pairing_is_what_is_computed():
    """Catches an off-by-one layer on either side: only the drawn layers matter, each to its slot;
    the embedding output left out, which would shift all layers by one; a loss without a draw."""
    loss = R.IntermediateLoss("rail-l", 4, 9, 12, 12, start="random", seed=7)
    hidden_s, hidden_t = hidden_states(4, 4, 5, 12), hidden_states(9, 4, 5, 12)
    mask = torch.ones(4, 5)
    with pytest.raises(RuntimeError, match="set_epoch"):
        loss(hidden_s, mask, hidden_t, mask)
    loss.set_epoch(3)
    assert loss.layers_t == R.sample_layers(9, 3, 7, 3)
    before = loss(hidden_s, mask, hidden_t, mask)
    for layer in range(10):
        changed = [*hidden_t]
        changed[layer] = torch.randn(4, 5, 12)
        assert (loss(hidden_s, mask, changed, mask) != before) == (layer in loss.layers_t)
    pooled_s = torch.stack([R.mean_pool(hidden_s[i], mask) for i in loss.layers_s], 1)
    pooled_t = torch.stack([R.mean_pool(hidden_t[i], mask) for i in loss.layers_t], 1)
    assert torch.equal(loss.distance(pooled_s, pooled_t), before)
    assert torch.equal(loss(hidden_s, None, hidden_t, None), before)
    for bad_s, bad_t in ((hidden_s[1:], hidden_t), (hidden_s, hidden_t[1:])):
        with pytest.raises(ValueError, match=r"\[0\] is the embedding output"):
            loss(bad_s, None, bad_t, None)


@pytest.mark.parametrize("select", R.SELECTIONS)
@pytest.mark.parametrize("distance", R.DISTANCES)
def test_any_selection_goes_with_any_distance(select, distance):
    """Catches a method known by name; layerwise and direct say that slots need a layer each."""
    options = {"select": select, "distance": distance, "start": "random"} | options_of(distance)
    if select == "all" and distance in ("layerwise", "direct"):
        with pytest.raises(ValueError, match="slots"):
            R.IntermediateLoss("kd", 4, 9, 12, 16, **options)
        return
    loss = R.IntermediateLoss("kd", 4, 9, 12, 16, **options)
    loss.set_epoch(0)
    assert loss.layers_t == R.select_layers(select, 9, len(loss.layers_s))
    assert isinstance(loss.distance, R.DISTANCES[distance])
    hidden_s, hidden_t = hidden_states(4, 4, 5, 12), hidden_states(9, 4, 5, 16)
    assert loss(hidden_s, None, hidden_t, None, index=torch.arange(4)).isfinite()


def test_names_are_checked():
    """Catches a KeyError or a silent default for a name that does not exist."""
    unknown = [("rail", "random", "concat"), ("none", None, None), ("kd", "random", None)]
    unknown += [("rail-c", None, "far"), ("rail-c", "best", None)]
    for method, select, distance in unknown:
        with pytest.raises(ValueError, match="rail-c"):  # the known ones are named
            R.IntermediateLoss(method, 4, 9, 12, 16, select=select, distance=distance)
    with pytest.raises(ValueError, match="cannot draw"):
        R.IntermediateLoss("rail-c", 6, 5, 12, 16)  # a student deeper than its teacher


def quick(train, dev, models, folder, *more):
    """The flags of a run that has to succeed: one epoch, no teacher."""
    files = ["--train-file", str(train), "--validation-file", str(dev)]
    return [*files, *models, "--method", "none", "--epochs", "1", "--output-dir", folder, *more]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


# ----------------------------------------------------------------------------- the command line
ALONE = [  # a whole command line, what the line says
    ("", "--task"),
    ("--task sst3", "--task"),
    ("--train-file a.csv", "--validation-file"),
    ("--train-file no.csv --validation-file no.csv", "No such file or directory: 'no.csv'"),
    ("--train-file no.xlsx --validation-file no.xlsx", "no.xlsx: it is empty, or no csv"),
    ("--task qnli --data-root nowhere", "nowhere/nyu-mll/glue/qnli"),
    ("--report nowhere", "no finished run (results.json) below nowhere"),
    ("--task toy more", "more"),
    ("--task toy --overwrite=1", "--overwrite"),
    ("--task toy --weights a,b,c", "invalid float value"),  # no name of a function
]
OWN = [  # what is added to the command for own files
    ("--task sst2", "--task"),
    ("--method kd --weights 1,1,1", "--weights"),
    ("--method kd --select last", "--select"),
    ("--method kd --distance layerwise", "give --select"),
    ("--method kd --first-stage 1", "1 stage(s)"),
    ("--method cr-ild --epochs 1", "--first-stage"),
    ("--method cr-ild --first-stage 2", "0 < --first-stage < --epochs"),
    ("--max-temperature 5", "--method pro-kd"),
    ("--teacher a,b", "--method pro-kd"),
    ("--method rail-l --select all", "2 slots need as many teacher layers, not 3"),
    ("--method ckd --shared-proj", "one width"),
    ("--teacher {student} --student {teacher}", "cannot draw k = 3"),
    ("--student {teacher}", "one and the same model"),
    ("--output-dir {student}", "must lie elsewhere"),
    ("--output-dir {student}/config.json", "nothing can be written to"),
    ("--task ../x", "--task ../x: need"),
]
# values that a flag refuses; the last four are no flags: of earlier versions, cut short
VALUES = """--epochs 0 1.5 -1 many --patience 0 -3 --batch-size 0 x --lr fast -1 --teacher-epochs 0
    --teacher-lr x nan inf --weight-decay 2 nan --warmup 1.5 -0.1 --temperature 0 inf nan
    --max-temperature 0.5 nan --first-stage 0 x --proj-dim 0 1.5 --max-length 3 --amp int8
    --max-train-examples 0 all --seed -1 1e3 9223372036854775808 --teacher-seed -2
    --weights 1,1 0,0,0 nan,1,1 -1,1,1 inf,1,1 --start warm --teacher-proj no --select some
    --distance far --method rail --device meta tpu9 cpu:x --teacher-cache off
    --grad-accumulation 2 --checkpoint-minutes 5 --epoch 3 --teacher-label a"""
MISTAKES = [(False, *row) for row in ALONE] + [(True, *row) for row in OWN]
for name, *values in (part.split() for part in VALUES.split("--")[1:]):
    MISTAKES += [(True, f"--{name} {value}", f"--{name}") for value in values]


@pytest.mark.parametrize("own, flags, words", MISTAKES, ids=[row[1] or "none" for row in MISTAKES])
def test_mistakes_on_the_command_line(place, models, capsys, own, flags, words):
    """Catches a mistake that is not seen, seen after hours of work, or told in a traceback."""
    more = flags.format(teacher=models[1], student=models[3]).split()
    refused(command(place, models, *more) if own else more, capsys, words, kept=place)


# ----------------------------------------------------------------------------------------- files
HEAD = "text,label\n"
GOOD = HEAD + "a b,good\nc d,bad\ne f,good\n"
NUMBERS = HEAD + "a,0.5\nb,1.5\n"
NEEDED = "rows of label and one or two columns of text"
FILES = [  # name, train, dev, what the line says
    ("no label.csv", "text,target\na,x\nb,y\n", GOOD, NEEDED, "train", "'target'"),
    ("three texts.csv", "a,b,c,label\nx,x,x,good\ny,y,y,bad\n", GOOD, NEEDED, "'c'"),
    ("index.csv", ",text,label\n0,a,good\n1,b,bad\n", GOOD, "index.csv", "line 1"),
    ("semicolons.csv", "text;label\na;good\nb;bad\n", GOOD, NEEDED, "text;label"),
    ("header.csv", HEAD, GOOD, NEEDED, "train"),
    ("other columns.csv", GOOD, "sentence,label\na,good\n", NEEDED, "'sentence'"),
    ("null.jsonl", '{"text": null, "label": "x"}\n{"text": "b", "label": "y"}\n', GOOD, "NoneType"),
    ("list.jsonl", '{"text": "a", "label": ["x"]}\n{"text": "b", "label": ["y"]}\n', GOOD, "list"),
    ("nested.json", '{"data": [{"text": "a", "label": "x"}]}', GOOD, NEEDED, "'data'"),
    ("no label once.jsonl", '{"text": "a", "label": "good"}\n{"text": "b"}\n', GOOD, "NoneType"),
    ("empty.csv", "", GOOD, "empty.csv: it is empty"),
    ("blank.jsonl", "\n", GOOD, "blank.jsonl"),
    ("cut.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "la', GOOD, "cut.jsonl", "JSON"),
    ("cut off.parquet", "PAR1abcdef", GOOD, "cut off.parquet", "Parquet magic bytes"),
    ("latin.csv", HEAD + "caf\xe9,good\nx,bad\n", GOOD, "latin.csv", "utf-8"),
    ("open quote.csv", HEAD + '"a b,good\nc d,bad\n', GOOD, "open quote.csv", "line 3: unexpected"),
    ("quote.tsv", 'text\tlabel\n"a\tgood\nb"\tbad\nc\tgood\n', GOOD, "line 3: a quote is opened"),
    ("good.csv", GOOD, GOOD + "\na,good,x\n", "dev.csv", "line 6"),
    ("too few.csv", "label,text\ngood,a\nbad\ngood,c\n", GOOD, "too few.csv", "line 3: too"),
    ("one class.csv", HEAD + "a,good\nb,good\n", HEAD + "a,good\n", "train: no label but good"),
    ("no value.csv", HEAD + "a,\nb,good\nc,bad\n", GOOD, "train", "''"),
    ("new label.csv", GOOD, HEAD + "a,great\n", "validation", "'great'"),
    ("in dev alone.csv", HEAD + "a,good\nb,fine\n", GOOD, "validation", "'bad'"),
    ("words for numbers.csv", NUMBERS, GOOD, "validation", "'good'", "known labels are numbers"),
    ("no number.csv", HEAD + "a,0.5\nb,\nc,1.5\n", NUMBERS, "train: known labels", "not: ''"),
    ("infinite.csv", HEAD + "a,0.5\nb,inf\nc,1.5\n", NUMBERS, "'inf'", "numbers"),
    ("nan.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', NUMBERS, "'nan'"),
]


@pytest.mark.usefixtures("beside")  # starts what runs beside the tests early
@pytest.mark.parametrize("row", FILES, ids=[row[0] for row in FILES])
def test_mistakes_in_files(tmp_path, models, capsys, row):
    """Catches columns that shift, labels that are made up, a line that does not name the file."""
    name, train, dev, *words = row
    paths = tmp_path / name, tmp_path / "dev.csv"
    for path, content in zip(paths, (train, dev), strict=True):
        path.write_text(content, "latin-1")
    refused(quick(*paths, models, str(tmp_path / "runs")), capsys, *words, kept=tmp_path)


ODD = {  # must work: name -> content; the labels are good and bad
    "byte order mark.csv": "\ufefflabel,text\ngood,a b\nbad,c d\n",
    "quoted tab.tsv": 'label\ttext\ngood\t"a\tb"\nbad\tc "d\n',
    "empty text.csv": "label,text\ngood,\nbad,\n",
    "a million characters.csv": f"label,text\ngood,{'word ' * 200_000}\nbad,x\n",
    "emoji.csv": "label,text\ngood,\U0001f600\U0001f600\nbad,\x01\x02\x07\u200b\n",
    "blank lines.csv": "text,label\n\na,good\n\nb,bad\n\n",
    "a line's end in it.csv": 'text,label\n"a ""b"", c",good\n"x\ny",bad\n',
    "array.json": '[{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]',
    "number.csv": "id,text,idx,label\n1,a,7,good\n2,b,8,bad\n",
    "LARGE.CSV": "text,label\na,good\nb,bad\n",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_work(tmp_path, models, name):
    """Catches a mark in a column's name, a field split at a quoted tab, text that is no text."""
    path = tmp_path / name
    path.write_bytes(ODD[name].encode())
    results = R.main(quick(path, path, models, str(tmp_path / "runs")))
    assert results["labels"] == ["bad", "good"]


LABELS = [  # file, its labels, the classes in order; None: a regression
    (".csv", ["schlecht, sehr", "gut"], ["gut", "schlecht, sehr"]),
    (".tsv", [0, 1], ["0", "1"]),
    (".parquet", [5, 3], ["3", "5"]),
    (".csv", [10, 2, 1], ["1", "2", "10"]),
    (".csv", ["1", "02", "01", "+1", "2"], ["01", "1", "02", "2", "+1"]),
    (".csv", ["NA", "None", "nan"], ["NA", "None", "nan"]),
    (".jsonl", ["so so", "déjà vu ✓", "07", "null"], ["07", "déjà vu ✓", "null", "so so"]),
    (".csv", [1.5, 2.0, 0.5], None),
    (".jsonl", [1.5, 2.25], None),
]


@pytest.mark.parametrize("suffix, labels, names", LABELS)
def test_labels_of_own_files(tmp_path, models, capsys, suffix, labels, names):
    """Catches 10 before 2, words read as numbers or nothing, names that the model loses; a teacher
    of a regression that is asked for classes; a regression that is not told."""
    paths = [tmp_path / f"{split}{suffix}" for split in ("train", "dev")]
    for path, size in zip(paths, (24, 12), strict=True):
        write_table(path, {"text": R.toy_data(0, size)["text"], "label": (labels * size)[:size]})
    more = ["--task", "mine", "--teacher-epochs", "1", "--method", "none" if names else "kd"]
    results = R.main(quick(*paths, models, str(tmp_path / "runs"), *more))
    config = hf.AutoConfig.from_pretrained(results["model"])
    metrics = ["accuracy"] if names else ["pearson", "spearman"]
    told = f"text, {len(names)} classes\n" if names else "text, a regression\n"
    assert told in capsys.readouterr().out and results["labels"] == names
    assert [*results["history"][0]["metrics"]] == metrics and results["metric"] == metrics[0]
    assert config.id2label == dict(enumerate(names or ["score"])) and results["task"] == "mine"
    assert config.label2id == {name: i for i, name in config.id2label.items()}


def write_classes(path, names, numbers, **texts):
    """A parquet file as on the hub: numbers of classes, whose names are in the file, or floats."""
    texts = texts or {"text": ["the"] * len(numbers)}
    kinds = {name: Value("string") for name in texts}
    kinds["label"] = ClassLabel(names=list(names)) if names else Value("float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict(texts | {"label": numbers}, features=Features(kinds))
    table.add_column("idx", list(range(len(numbers)))).to_parquet(path)
    return path


def test_labels_of_dev_are_those_of_train(tmp_path, models):
    """Catches dev numbered by itself: 10 in a csv is "10" in json, files name classes differently.
    All texts are the same, so the student's answer is the most frequent label of train."""
    words = {"text": ["the"] * 60, "label": [2] * 10 + [10] * 50}
    few = {"text": ["the"] * 4, "label": ["10", "10", "2", "10"]}
    pair = write_table(tmp_path / "a.csv", words), write_table(tmp_path / "b.jsonl", few)
    named = write_classes(tmp_path / "a.parquet", "cab", [0] * 50 + [1] * 5 + [2] * 5)
    others = write_classes(tmp_path / "b.parquet", "abc", [0, 1, 1, 2, 2, 2])
    more = ["--lr", "0.02", "--batch-size", "4", "--warmup", "0", "--overwrite"]
    results = R.main(quick(*pair, models, str(tmp_path / "runs"), *more))
    assert results["best_score"] == 0.75 and results["labels"] == ["2", "10"]
    results = R.main(quick(named, others, models, str(tmp_path / "runs"), *more))
    assert results["best_score"] == 0.5 and results["labels"] == ["c", "a", "b"]


def test_the_subset_does_not_depend_on_the_seed(tmp_path, models, monkeypatch):
    """Catches seeds compared on other data, and a subset that is the file's beginning."""
    calls, subsets = spy(monkeypatch), []
    for seed in "12":
        calls.clear()
        few = ["--method", "none", "--epochs", "1", "--max-train-examples", "20", "--seed", seed]
        R.main(command(tmp_path, models, *few))
        rows = [row for x in calls if x["training"] for row in x["inputs"]["input_ids"].tolist()]
        subsets.append(sorted([x for x in row if x] for row in rows))
    beginning = [len(text.split()) + 2 for text in rows_of(120)["text"][:20]]  # [CLS], [SEP]
    assert subsets[0] == subsets[1] and sorted(map(len, subsets[0])) != sorted(beginning)
    assert len(subsets[0]) == 20


# ------------------------------------------------------------------------------------------ GLUE
MNLI = ("entailment", "neutral", "contradiction")


def make_glue(root, task="mnli", names=MNLI, splits=("validation_matched",), labels=None, size=60):
    """A local clone in the hub's layout; the text's first word follows from the label."""
    for i, split in enumerate(["train", *splits]):
        label = labels or [(row + i) % len(names) for row in range(size)]
        texts = {"premise": [f"word{10 * x} is word{x}" for x in label]}
        texts["hypothesis"] = ["the noun1"] * len(label)
        path = root / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet"
        write_classes(path, names, label, **texts)
    return ["--task", task, "--data-root", str(root)]


@pytest.mark.parametrize("splits", ["matched mismatched", "matched", "mismatched"])
def test_mnli_keeps_its_dev_sets_apart(tmp_path, models, monkeypatch, splits):
    """Catches two dev sets in one score, and the second one selecting the epoch; a second column of
    text that the student or the teacher never sees."""
    data = make_glue(tmp_path, splits=[f"validation_{split}" for split in splits.split()])
    names = {"matched": "accuracy", "mismatched": "accuracy_mismatched"}
    metrics = [names[split] for split in splits.split()]
    more = ["--method=kd", "--epochs=1", "--teacher-epochs=1", f"--output-dir={tmp_path}"]
    student, teacher = spy(monkeypatch), spy(monkeypatch, "BertForSequenceClassification")
    results = R.main([*data, *models, *more])
    for calls in (student, teacher):
        counts = [(call["inputs"]["input_ids"] == 3).sum(1) for call in calls]  # of [SEP]
        assert calls and all((count == 2).all() for count in counts)
    assert [*results["history"][0]["metrics"]] == metrics and results["metric"] == metrics[0]
    assert results["best_score"] == results["history"][0]["metrics"][metrics[0]]
    assert results["labels"] == list(MNLI)


STRANGE = [  # task, its names, its numbers, what the line says; all but the last have a dev set
    ("cola", None, [0.0, 0.5, 1.0], "labels numbers are not those of cola"),
    ("cola", "abc", [0, 1, 2], "labels ['a', 'b', 'c'] are not those of cola"),
    ("stsb", "abc", [0, 1, 2], "are not those of stsb"),
    ("mnli", "abc", [0, 1, 0], "known: ['a', 'b', 'c']"),
    ("sst2", "ab", [-1, -1, -1], "'-1'"),
    ("mnli", MNLI, [0, 1, 2], "mnli: no training or no validation data, only ['train']"),
]


@pytest.mark.parametrize("task, names, numbers, words", STRANGE)
def test_glue_that_is_not_the_task_s(tmp_path, models, capsys, task, names, numbers, words):
    """Catches another task's labels, a class that train lacks, -1s, an epoch selected on train."""
    splits = [] if "only" in words else ["validation"]
    args = [*make_glue(tmp_path, task, names, splits, numbers), *models]
    refused([*args, "--output-dir", str(tmp_path / "runs")], capsys, words, kept=tmp_path)


def test_teacher_with_its_labels_in_another_order(tmp_path, models, capsys):
    """Catches distilling against the labels, and the inverse order: three labels turned by one."""
    data, runs = make_glue(tmp_path / "hub", size=90), ["--output-dir", str(tmp_path / "runs")]
    learn = f"--method=none --epochs=6 --batch-size=6 --lr=0.01 --output-dir={tmp_path}".split()
    made = R.main([*data, *learn, "--student", models[1], "--device", "cpu"])
    assert made["best_score"] > 0.9
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(made["model"])
    with torch.no_grad():
        for values in teacher.classifier.parameters():
            values.copy_(values.roll(-1, 0))
    teacher.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    teacher.save_pretrained(made["model"])
    args = [*data, *models, *runs, "--epochs", "1", "--teacher", made["model"]]
    own = "neutral,contradiction,entailment"  # what its answers 0, 1, 2 mean
    refused([*args, "--method", "kd"], capsys, f"--teacher-labels {own}")
    for wrong in ("neutral,contradiction", "a,b,c", "neutral,neutral,entailment"):
        refused([*args, "--teacher-labels", wrong], capsys, "name each label once", kept=tmp_path)
    assert R.main([*args, "--teacher-labels", own])["teacher_score"] == made["best_score"]
    two = make_glue(tmp_path / "hub", "sst2", ("negative", "positive"), ["validation"])
    refused([*two, *args[4:]], capsys, "has 3 labels, the task has 2", kept=tmp_path)


def test_metrics():
    """By hand. Catches a macro mean, another order, rank and linear swapped, nan for constants."""
    labels, answers = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    for task in ("mrpc", "qqp"):  # the first selects the epoch
        scores = [*R.measure(task, answers, labels).items()]
        assert scores == [("f1", pytest.approx(2 / 3)), ("accuracy", pytest.approx(2 / 3))]
    assert R.measure("cola", answers, labels) == pytest.approx({"matthews": 1 / 3})
    assert R.measure("own", answers, labels) == pytest.approx({"accuracy": 2 / 3})
    labels, answers = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 9.0])
    # deviations -2 -1 0 3 and -3 -1 -2 6: 6 + 1 + 0 + 18 over the root of 14 * 50
    expected = {"pearson": 25 / 700**0.5, "spearman": 1 - 6 * 2 / (4 * 15)}
    for task in ("stsb", "own"):
        scores = R.measure(task, answers, labels)
        assert scores == pytest.approx(expected) and [*scores] == [*expected]
        assert set(R.measure(task, torch.ones(4), labels).values()) == {0.0}
        assert set(R.measure(task, answers[:1], labels[:1]).values()) == {0.0}
    wrong = torch.zeros(4), torch.tensor([0, 1, 1, 1])
    assert R.measure("cola", *wrong)["matthews"] == R.measure("mrpc", *wrong)["f1"] == 0.0


# ---------------------------------------------------------------------------------------- models
CODE = {"AutoConfig": "mine.Mine", "AutoModelForSequenceClassification": "mine.Mine"}
OWN_CODE = {"model_type": "mine", "architectures": ["Mine"], "auto_map": CODE}
THREE = {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate("abc"))}
WORDS = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(140))])
KINDS, LOAD = ("vit", "bart", "t5", "gpt2", "fnet", "funnel"), "cannot load the teacher"
BAD_MODELS = [  # what is wrong, the kind of model or the file, its content, what the line says
    *((f"of the kind {kind}", kind, "", LOAD) for kind in KINDS[:-1]),
    ("shorter states", "funnel", "", "does not work here: need hidden (B, L, d)"),
    ("config cut off", "config.json", '{"model_type": ', LOAD),
    ("an unknown kind", "config.json", '{"model_type": "mine"}', LOAD),
    ("code of its own", "config.json", json.dumps(OWN_CODE), LOAD),
    ("code in a pickle", "pytorch_model.bin", "cbuiltins\nopen\n(VRAN\nVw\ntR.", LOAD),
    ("tokenizer cut off", "tokenizer.json", '{"a"', LOAD),
    ("weights cut off", "model.safetensors", "\x00\x05", LOAD),
    ("no weights", "model.safetensors", None, "model.safetensors"),
    ("no tokenizer", "vocab.txt", None, "cannot load the "),
    ("more words than vectors", "vocab.txt", WORDS, "a tokenizer that does not fit"),
    ("a block missing", "config.json", {"num_hidden_layers": 5}, "16 weights missing"),
    ("another width", "config.json", {"intermediate_size": 40}, "12 weights missing"),
    ("another head", "config.json", THREE, "has 3 labels, the task has 2"),
    ("a file", "", "{}", LOAD),
    ("nothing", "", None, "--task toy"),
]


def damage(folder, name, content):
    """A file of a sound model's folder, or the folder, gets another content: None, it is gone; a
    dict, these entries change; RAN is a file that code would make. Or a model of another kind."""
    path, ran = folder / name, str(folder.parent / "ran")
    (folder / "mine.py").write_text(f"open({ran!r}, 'w')")
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    if name == "pytorch_model.bin":  # else nobody reads it
        (folder / "model.safetensors").unlink()
    if path == folder:
        shutil.rmtree(folder)
    if name in KINDS:
        tiny(name, 4, 16).save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    elif content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(content.replace("RAN", ran))


@pytest.mark.parametrize("row", BAD_MODELS, ids=[row[0] for row in BAD_MODELS])
def test_mistakes_in_models(place, models, capsys, monkeypatch, row):
    """Catches weights drawn at random, texts of [UNK] alone, code that is run, a bare traceback."""
    (what, name, content, words), folder = row, Path(shutil.copytree(models[1], place / "odd"))
    damage(folder, name, content)
    monkeypatch.setattr("builtins.input", "y".format)  # an answer to "run the custom code?"
    args = command(place, models, "--teacher", str(folder))
    refused(args, capsys, words, str(folder), kept=place)
    assert not (place / "ran").exists()
    if what == "no tokenizer":
        as_student = command(place, models, "--student", str(folder), "--method", "none")
        refused(as_student, capsys, words, "cannot load the student", kept=place)
    monkeypatch.setitem(sys.modules, "datasets", None)  # is not installed
    refused(args, capsys, "import of datasets halted", kept=place)


@pytest.mark.parametrize("tokenizer_knows", [None, 12, 512])
def test_positions_are_a_limit_of_length(tmp_path, models, monkeypatch, tokenizer_knows):
    """Catches an index error where the texts are longer than the model's positions."""
    short = shutil.copytree(models[3], tmp_path / "short")
    sizes = {"max_position_embeddings": 16, "ignore_mismatched_sizes": True}
    hf.AutoModelForMaskedLM.from_pretrained(models[3], **sizes).save_pretrained(short)
    if tokenizer_knows:
        limit = {"model_max_length": tokenizer_knows}
        (short / "tokenizer_config.json").write_text(json.dumps(limit))
    path = tmp_path / "long.csv"
    path.write_text(f"{HEAD}{'the noun1 is not ' * 20},good\nthe,bad\n")
    calls, lengths = spy(monkeypatch), [12] if tokenizer_knows == 12 else [14, 16]
    for student, expected in ((str(short), lengths), (models[3], [82])):
        calls.clear()
        more = ["--student", student, "--overwrite"]
        R.main(quick(path, path, models, str(tmp_path / "runs"), *more))
        assert max(call["inputs"]["input_ids"].shape[1] for call in calls) in expected


# --------------------------------------------------------------------------- places and results
def test_models_in_the_folder_of_results_are_refused(tmp_path, models, capsys):
    """Catches a run that clears away the model it reads; --overwrite makes it no better."""
    nest = tmp_path / "inside" / "own" / "rail-c-seed42" / "teacher" / "model"
    shutil.copytree(models[1], nest)
    inside = ["--teacher", str(nest), "--output-dir", str(tmp_path / "inside")]
    refused(command(tmp_path, models, *inside), capsys, "must lie elsewhere", kept=tmp_path)
    args = command(tmp_path, models, "--method", "none", "--epochs", "1")
    model = R.main(args)["model"]
    (tmp_path / "link").symlink_to(model)
    for name in (model, tmp_path / "link"):
        more = ["--student", str(name), "--overwrite"]
        refused([*args, *more], capsys, "must lie elsewhere", kept=tmp_path)


def test_results_of_another_version_or_command_are_left_alone(tmp_path, models, capsys):
    """Catches numbers of other settings given for those of the command, and results run over."""
    args = command(tmp_path, models, "--method", "none", "--epochs", "1")
    results = R.main(args)
    path = Path(results["model"]).parent / "results.json"
    refused([*args, "--lr", "0.5"], capsys, f"{path.parent} holds", "other lr;", kept=tmp_path)
    refused([*args, "--overwrite", "--train-file", "no.csv"], capsys, "no.csv", kept=tmp_path)
    del results["config"]["format"], results["floor"]
    path.write_text(json.dumps(results))
    refused(args, capsys, f"{path} is of", "other format: --overwrite", kept=tmp_path)
    for content in (b'{"task": "own", "met', b"[]", b"null", b"\xff\xfe{"):
        path.write_bytes(content)
        refused(args, capsys, f"{path} is damaged: delete it", kept=tmp_path)
    assert R.main([*args, "--overwrite"])["floor"] == 0.52
    path.unlink()
    for foreign, words in (({"epoch": 3}, "is of a run with other "), ([3], "is damaged: delete")):
        torch.save(foreign, path.with_name("checkpoint.pt"))
        refused(args, capsys, f"checkpoint.pt {words}", kept=tmp_path)
    for foreign in ("[]", "{}", '{"task": "own", "best_score": 0.5}'):  # of another program
        path.write_text(foreign)
        refused(["--report", str(tmp_path)], capsys, str(path), kept=tmp_path)


def test_report(tmp_path, capsys):
    """Catches the population's deviation, an average over the tasks that are there by chance."""
    scores = {"rte/kd-seed1": 0.5, "rte/kd-seed2": 0.6, "cola/kd-seed1": 0.3, "rte/none-seed1": 0.4}
    for name, score in scores.items():
        content = {"task": name.split("/")[0], "best_score": score, "config": {"format": R.FORMAT}}
        content["teacher_score"] = None if "none" in name else 0.7
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text("[]")  # of another program
    before = files_of(tmp_path)
    R.main(["--report", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| method | cola | rte | average |" in out
    assert "| kd | 30.0 (n=1) | 55.0 ± 7.1 (n=2) | 42.5 |" in out
    assert "| none | - | 40.0 (n=1) | - |" in out
    assert "| teacher | 70.0 (n=1) | 70.0 (n=1) | 70.0 |" in out and files_of(tmp_path) == before


# ------------------------------------------------------------------------------------ predictions
PREMISES = rows_of(50, seed=3)["text"]


def finished(folder, models, task="mnli", names=MNLI, tests=("test",), more=()):
    """A run on a clone of the task, whose tests have labels of -1. -> its folder."""
    glue, numbers = folder / "nyu-mll" / "glue" / task, None if names else [0.5, 2.0, 4.5] * 9
    data = make_glue(folder, task, names, ["validation"], numbers, size=30)
    for split in tests:
        table = {"premise": PREMISES, "hypothesis": [split] * 50}
        write_classes(glue / f"{split}-00000-of-00001.parquet", names, [-1] * 50, **table)
    args = [*data, *models, "--amp", "off", "--output-dir", str(folder / "runs"), "--lr", "0.01"]
    path = Path(R.main([*args, "--method", "none", "--epochs", "1", *more])["model"])
    model = hf.AutoModelForSequenceClassification.from_pretrained(path)
    torch.manual_seed(0)
    for parameter in model.parameters():  # now its answers differ
        parameter.data.normal_()
    model.save_pretrained(path)
    model.classifier.bias.data -= asked(path, PREMISES, PREMISES[::-1]).mean(0)
    model.save_pretrained(path)
    return path.parent


def asked(model, premises, hypotheses, **cut):
    return answers(model, zip(premises, hypotheses, strict=True), **cut)[0]


def table_of(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


SUBMITTED = [  # task, its names, its test splits, what it answers, the files
    ("mnli", MNLI, ["test_matched", "test_mismatched"], MNLI, ["MNLI-m.tsv", "MNLI-mm.tsv"]),
    ("mnli", MNLI, ["test_mismatched"], MNLI, ["MNLI-mm.tsv"]),
    ("rte", ("entailment", "not_entailment"), ["test"], None, ["RTE.tsv"]),
    ("qnli", ("entailment", "not_entailment"), ["test"], None, ["QNLI.tsv"]),
    ("wnli", ("not_entailment", "entailment"), ["test"], "01", ["WNLI.tsv"]),
    ("qqp", ("not_duplicate", "duplicate"), ["test"], "01", ["QQP.tsv"]),
    ("mrpc", ("not_equivalent", "equivalent"), ["test"], "01", ["MRPC.tsv"]),
    ("cola", ("unacceptable", "acceptable"), ["test"], "01", ["CoLA.tsv"]),
    ("sst2", ("negative", "positive"), ["test"], "01", ["SST-2.tsv"]),
    ("stsb", None, ["test"], None, ["STS-B.tsv"]),
]


@pytest.mark.parametrize("row", SUBMITTED, ids=[" ".join(row[4]) for row in SUBMITTED])
def test_submission_is_what_the_model_says(tmp_path, models, capsys, row):
    """Catches other names, numbers for words, another order, a score of 5.1, an unseen gap."""
    task, names, tests, words, files = row
    run = finished(tmp_path, models, task, names, tests)
    (run / "submission").mkdir()
    (run / "submission" / "old.tsv").touch()
    assert R.main(["--predict", str(run), "--device", "cpu"]) == {}
    assert sorted(path.name for path in (run / "submission").iterdir()) == files
    assert ("left out" in capsys.readouterr().out) == (task == "mnli" and len(tests) == 1)
    for split, file in zip(tests, files, strict=True):
        logits = asked(run / "model", PREMISES, [split] * 50)
        head, *rows = table_of(run / "submission" / file)
        assert head == ["index", "prediction"] and [x for x, _ in rows] == [*map(str, range(50))]
        said = [row[1] for row in rows]
        if names:
            assert said == [(words or names)[i] for i in logits.argmax(1)]
        else:
            assert all(re.fullmatch(r"\d\.\d{3}", score) for score in said)
            assert [*map(float, said)] == pytest.approx(logits[:, 0].clamp(0, 5), abs=0.0006)


def test_predictions_of_a_file(tmp_path, models, capsys):
    """Catches a map before the argmax, a label missed, other rows than the subset's, metrics of
    other rows, columns in the order of this file, a stale file."""
    run = finished(tmp_path, models)
    table = {"hypothesis": PREMISES[::-1], "premise": PREMISES}
    table["label"] = ["entails", "neutral"] * 25
    file = write_table(tmp_path / "other.tsv", table)
    args = ["--predict", str(run), "--test-file", file, "--device", "cpu"]
    named = "neutral=neutral,contradiction=neutral,entailment=entails"
    found = R.main([*args, "--label-map", named])
    logits = asked(run / "model", PREMISES, PREMISES[::-1])
    expected = [["entails", "neutral", "neutral"][i] for i in logits.argmax(1)]
    head, *rows = table_of(run / "predictions.tsv")
    assert head == ["index", "prediction", "probability"] and [row[1] for row in rows] == expected
    chances = logits.softmax(1).max(1).values.tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(chances, abs=0.0001)
    right = sum(x == y for x, y in zip(expected, table["label"], strict=True)) / 50
    assert found == {"file": file, "n": 50, "metrics": {"accuracy": right}}
    assert json.loads((run / "predictions.json").read_text()) == found
    assert f"student  accuracy {right:.4g}\n" in capsys.readouterr().out
    few = R.main([*args, "--label-map", named, "--max-test-examples", "7"])
    some = table_of(run / "predictions.tsv")[1:]
    assert few["n"] == len(some) == 7 and all(row in rows for row in some)
    assert some != rows[:7] and [int(row[0]) for row in some] == sorted(int(row[0]) for row in some)
    del table["label"]
    for hidden in ({}, {"label": [-1] * 50}):  # as GLUE's
        write_table(tmp_path / "other.tsv", table | hidden)
        assert R.main(args) == {"file": file, "n": 50} and not (run / "predictions.json").exists()
        assert {row[1] for row in table_of(run / "predictions.tsv")[1:]} == {*MNLI}


@pytest.mark.parametrize("length", [8, 12])
def test_predictions_at_the_length_of_the_run(tmp_path, models, length):
    """Catches the default's length for the run's, the run's for one that is given, a teacher's
    answers in its own order, the student's scores for the teacher's."""
    more, teacher = ["--max-length", "8", "--teacher-labels", "a,b,c"], tmp_path / "teacher"
    run = finished(tmp_path, models, more=more)
    shutil.copytree(run / "model", teacher)
    head = load_file(teacher / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        head[name] = -head[name]
    save_file(head, teacher / "model.safetensors", {"format": "pt"})
    cut = {"truncation": True, "max_length": length}
    logits_s = asked(run / "model", PREMISES, PREMISES[::-1], **cut)
    logits_t = asked(teacher, PREMISES, PREMISES[::-1], **cut)[:, [2, 1, 0]]
    labels = [MNLI[answer] for answer in logits_s.argmax(1)]
    table = {"a": PREMISES, "label": labels, "b": PREMISES[::-1]}
    args = ["--predict", str(run), "--test-file", write_table(tmp_path / "a.csv", table)]
    assert R.parse([*args, "--teacher", models[1]]).teacher_labels == "a,b,c"  # the run's own
    args += ["--max-length", str(length)] * (length != 8) + ["--teacher", str(teacher)]
    assert R.parse(args).teacher_labels is None
    found = R.main([*args, "--teacher-labels", ",".join(MNLI[::-1]), "--device", "cpu"])
    assert found["metrics"] == {"accuracy": 1.0}
    right = (logits_t.argmax(1) == logits_s.argmax(1)).double().mean().item()
    assert found["teacher_metrics"] == {"accuracy": right} and right < 0.9


PAIRED = "a,b,label\n" + "a,b,entailment\n" * 4
UNFIT = [  # what is added to the command, the file, what the line says
    ("--student {teacher}", PAIRED, "no --student"),
    ("--predict nowhere", PAIRED, "no finished run in nowhere"),
    ("--label-map entailment=entailment,neutral=y", PAIRED, "ANSWER=LABEL", "contradiction"),
    ("--label-map entailment=entailment,neutral=b,contradiction=", PAIRED, "ANSWER=LABEL"),
    ("--label-map entailment=a,neutral=b,contradiction=c", PAIRED, "['a', 'b', 'c']"),
    ("--task rte", PAIRED, "is a run of mnli"),
    ("--teacher {teacher}", PAIRED, "has no head"),
    ("", "a,label\nx,entailment\n", "columns of text ['premise', 'hypothesis']", "['a']"),
    ("", "a,b\n", "rows of label and one or two columns of text"),
    ("", PAIRED + "a,b,maybe\n", "'maybe'"),
    ("--teacher {teacher}", "a,b\nx,y\n", "has no labels, which --teacher needs"),
    ("--test-file=", PAIRED, "--test-file: nothing is given"),
    ("--test-file no.csv", PAIRED, "No such file or directory: 'no.csv'"),
]


def test_mistakes_in_predictions(place, models, capsys):
    """Catches a label or an answer that is left out in silence, answers of another task, a file of
    another kind, a result of another version; nothing is written."""
    run = finished(place, models, tests=())
    for more, content, *words in UNFIT:
        (place / "file.csv").write_text(content)
        args = ["--predict", str(run), "--test-file", "file.csv", "--device", "cpu"]
        refused([*args, *more.format(teacher=models[1]).split()], capsys, *words, kept=place)
    refused(args[:2], capsys, "mnli: no test split", "validation", kept=place)
    for more in (["--max-test-examples", "5"], ["--label-map", "a=b"], ["--teacher", models[1]]):
        refused([*args[:2], *more], capsys, "need --test-file", kept=place)
    refused(["--task", "sst2", *args[2:4]], capsys, "need --predict RUN", kept=place)
    own = Path(R.main(command(place, models, "--method", "none", "--epochs", "1"))["model"]).parent
    refused(["--predict", str(own)], capsys, "own has no test split", kept=place)
    refused(command(place, models, "--teacher", str(run)), capsys, f"is it {run / 'model'}?")
    weights = load_file(run / "model" / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, run / "model" / "model.safetensors", {"format": "pt"})
    refused(args, capsys, "no whole head", kept=place)
    (run / "model" / "config.json").write_text("{}")
    refused(args, capsys, "cannot load the model", str(run / "model"), kept=place)
    (run / "results.json").write_text('{"task": "mnli"}')
    refused(args, capsys, "results.json is of a run with other format", kept=place)


# ----------------------------------------------------------------------------------- the training
STEPS = 4  # of an epoch on 120 examples
LONG = ["--epochs", "9", "--patience", "9", "--teacher-epochs", "6", "--lr", "0.003"]
RANKS = """if 1:
    import os, sys, torch
    sys.path.insert(0, sys.argv[1])
    import railkd as R

    def run(name, *more):
        try:
            R.main([*sys.argv[3:], "--output-dir", f"{sys.argv[2]}/{name}", *more])
        except SystemExit as stop:
            print(f"{name} exit {stop.code}", file=sys.stderr, flush=True)

    def die(*args, **options):
        raise SystemError("rank 1 dies")

    toy = "--task toy --method none --epochs 1 --max-train-examples 60 --device cpu".split()
    R.main([*toy, "--output-dir", sys.argv[2]])  # its models, by one rank: the other writes none
    run("even", "--batch-size", "15")
    run("uneven", "--batch-size", "16")
    run("bank", "--method", "codir")
    if os.environ["RANK"] == "1":
        torch.optim.AdamW.step = die
    run("dying")
    print("all is over", file=sys.stderr)"""
SCRIPT = "import os, sys; os.execvp('bash', ['bash', *sys.argv[1:]])"
# seed -> method and size of the largest file: less than a model, a checkpoint, a teacher's cache
FULL = {"1": ("none", 3000), "2": ("none", 80_000), "3": ("rail-c", 3000)}
KEYS = """task method seed metric best_score best_epoch last_score teacher_score teacher_metrics
    teacher labels columns floor params_s params_t collapsed model config versions device history"""
ROW = "epoch stage layers_t loss ce kd ild mix cosine_s seconds examples_per_s metrics score"
CASES = [*R.METHODS, "rail-l --select=last", "pkd-skip --distance=concat"]
CASES += [f"rail-c --select=random --distance={name}" for name in ("contrastive", "attention")]
CASES += ["kd --select=final --distance=layerwise", "codir --select=all --distance=group"]
# method, a signal, and what the line of the second epoch begins with, of the teacher, the student;
# or what is called, the how many-th time: the teacher makes 8 steps, 2 checkpoints, 1 model
STOPS = """rail-c/SIGKILL/loss rail-c/SIGKILL/layers_t rail-c/SIGTERM/layers_t
    rail-c/SIGINT/layers_t rail-c/step/6 rail-c/step/18 rail-c/write_bytes/5 rail-c/__exit__/5
    rail-c/save_pretrained/2 codir/step/23 cr-ild/step/14 cr-ild/write_bytes/5 cr-ild/__init__/3
    pro-kd/step/16 pro-kd/step/22 pro-kd/__init__/3""".split()
USE = """import random, sys, torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing import NamedTuple
for library in ("transformers", "datasets", "sklearn", "pandas", "tqdm"):
    sys.modules[library] = None
{method}
ild = IntermediateLoss('rail-l', 4, 6, 8, 10, start='random')
ild.set_epoch(1)
s, t = [torch.ones(2, 3, 8)] * 5, [torch.ones(2, 3, 10)] * 7
print(ild(s, None, t, None).item() >= 0)"""
TEXTS, GOLD = rows_of(120)["text"], torch.tensor(rows_of(120, (0, 1))["label"])
ARRAYS = ("pooled.npy", "logits.npy")
LOADED = """torch pandas scipy.stats sklearn.metrics datasets pytest railkd transformers
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert
    transformers.models.distilbert.modeling_distilbert transformers.data.data_collator"""
FAKE = """#!{python} -ES
import os, pathlib, sys
args = sys.argv[2:]
with open("{folder}/calls " + os.environ["TASKS"], "a") as file:
    print(*args, file=file)
if args[0] == "--task":
    folder = pathlib.Path(args[args.index("--output-dir") + 1], args[1], "teacher-x", "model")
    folder.mkdir(parents=True, exist_ok=True)
    sys.exit(130 if "stop" in args else "kd" in args and "2" in args)
"""


def weights_of(model):
    return load_file(Path(model) / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def bits(results):
    """All that must not depend on an interruption: the history without timings, the weights."""
    times = {"seconds", "examples_per_s"}
    rows = [{name: row[name] for name in row if name not in times} for row in results["history"]]
    weights = {name: tensor.tolist() for name, tensor in weights_of(results["model"]).items()}
    return rows, results["best_epoch"], weights


def leftovers(folder):
    """What only an unfinished run may have there."""
    names = ("*.partial", "checkpoint*", "stage-*", "teacher", "*/model/model")
    return [path for name in names for path in Path(folder).rglob(name)]


def count_calls(patch, look=None, owner=torch.optim.AdamW, name="step"):
    """How many there were so far, in a list; before each of them look(its arguments) is called."""
    original, count = getattr(owner, name), [0]

    @functools.wraps(original)
    def call(*args, **options):
        if look:
            look(*args)
        count[0] += 1
        return original(*args, **options)

    patch.setattr(owner, name, call)
    return count


def spy(patch, model_class="DistilBertForSequenceClassification"):
    """Every forward of a model class: after how many steps, in which mode, from what to what."""
    owner, calls, count = getattr(hf, model_class), [], count_calls(patch)
    original = owner.forward

    @functools.wraps(original)
    def forward(self, **inputs):
        output = original(self, **inputs)
        call = {"steps": count[0], "training": self.training, "grad": torch.is_grad_enabled()}
        call |= {"inputs": inputs, "output": output, "model": self}
        call["weights"] = {name: value.clone() for name, value in self.state_dict().items()}
        calls.append(call)
        return output

    patch.setattr(owner, "forward", forward)
    return calls


def spy_on_distances(patch):
    """What the distance of a method is given, and its value."""
    original, calls = R.Distance.forward, []

    def forward(self, pooled_s, pooled_t, index=None, labels=None):
        value = original(self, pooled_s, pooled_t, index=index, labels=labels)
        call = {"s": pooled_s.detach(), "t": pooled_t.float(), "value": value.item()}
        calls.append(call | {"index": index, "labels": labels, "distance": self})
        return value

    patch.setattr(R.Distance, "forward", forward)
    return calls


def script_scores(patch, scores):
    """The dev accuracies, epoch by epoch: the steps that were made tell which."""
    count = count_calls(patch)

    def accuracy(labels, answers):
        return scores[min(max(1, count[0] // STEPS), len(scores)) - 1]

    patch.setattr("sklearn.metrics.accuracy_score", accuracy)


def die_at(name, number):
    """SIGKILL at the number-th call, half of what it writes is there; Ctrl-C where torch saves."""
    owners = {"write_bytes": Path, "save_pretrained": hf.PreTrainedTokenizerBase}
    owners["__exit__"] = torch.serialization._open_zipfile_writer_buffer

    def die(*args):
        if count[0] != number - 1:
            return
        if name == "__exit__":
            raise KeyboardInterrupt
        if name == "write_bytes":
            args[0].write_text("half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

    count = count_calls(pytest.MonkeyPatch(), die, owners.get(name, torch.optim.AdamW), name)


def answers(folder, texts, **cut):
    """An independent pass, unpadded, as texts or pairs of one length are read together: logits
    (N, C), and each layer's mean and first token, (N, layers, d)."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    pairs = [[text] if isinstance(text, str) else text for text in texts]
    tokens = [tokenizer(*pair, **cut)["input_ids"] for pair in pairs]
    rows = {}
    for length in {*map(len, tokens)}:
        where = [i for i, ids in enumerate(tokens) if len(ids) == length]
        with torch.no_grad():
            output = model(torch.tensor([tokens[i] for i in where]), output_hidden_states=True)
        layers = torch.stack(output.hidden_states, dim=1)  # (B, layers, L, d)
        columns = output.logits, layers.mean(2), layers[:, :, 0]
        rows |= dict(zip(where, zip(*columns, strict=True), strict=True))
    return [torch.stack(column) for column in zip(*(rows[i] for i in sorted(rows)), strict=True)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, models):
    """Flags: a teacher with a head, sure of itself, and a student, as wide, without dropout."""
    folder = tmp_path_factory.mktemp("calm")
    sure = shutil.copytree(models[1], folder / "sure")
    torch.manual_seed(0)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    teacher = hf.AutoModelForSequenceClassification.from_pretrained(sure, **names)
    teacher.classifier.weight.data *= 200
    teacher.save_pretrained(sure)
    still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    odd = {"attn_implementation": "eager", "output_attentions": True, "return_dict": False}
    flags = two_models(sure, folder / "student", 16, **still, **odd)
    return [*flags, "--teacher-labels", "bad,good", "--amp", "off"]


# Processes beside the tests, whose fork server has all libraries loaded already.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LOADED.split())


def child(commands, output, limit, how, when):
    """The file as a program; no file may grow beyond the limit, and it may die at a call."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if when.isdigit():
        die_at(how, int(when))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a shell's "&"
    for args in commands:
        sys.argv = ["railkd.py", *args]
        runpy.run_path(str(HERE / "railkd.py"), run_name="__main__")


def process(commands, output, limit=None, stop="//"):
    """-> exit code and stderr. The signal comes at a random moment after a line of its output."""
    Path(f"{output}.out").touch()
    _, how, when = stop.split("/")
    running = SERVER.Process(target=child, args=(commands, str(output), limit, how, when))
    running.start()
    if how in vars(signal):
        while f"epoch 2  {when}" not in Path(f"{output}.out").read_text():
            assert running.is_alive(), f"it never came to {when}"
            time.sleep(0.005)
        time.sleep(random.random() / 20)
        os.kill(running.pid, getattr(signal, how))
    running.join(100)
    assert not running.is_alive(), "it hangs"
    return running.exitcode, Path(f"{output}.err").read_text()


def flags_of(stop):
    method, _, when = stop.split("/")
    short = f"--method={method} --epochs=4 --lr=0.003 --teacher-lr=0.003 --teacher-epochs=2"
    return short.split() if when.isdigit() else LONG


WHOLE = [*dict.fromkeys(tuple(flags_of(stop)) for stop in STOPS)]


def stopped(folder, models, stop):
    """-> what `process` says of a run that is stopped, what it leaves, what the next try says."""
    again = [command(folder, models, *flags_of(stop))]
    first = process(again, folder / "first", stop=stop)
    return first, [path.name for path in folder.rglob("*")], process(again, folder / "again")


def hub_cache(folder):
    """The default models as the hub's library keeps them, and a clone of sst2."""
    for name, layers in (("google-bert--bert", 4), ("distilbert--distilbert", 3)):
        cached = folder / "hf" / "hub" / f"models--{name}-base-uncased"
        R.toy_model(cached / "snapshots" / "abc", layers, 16)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
    make_glue(folder / "data", "sst2", ["negative", "positive"], ["validation"])


@pytest.fixture(scope="module")
def beside(tmp_path_factory, models, calm):
    """Whole commands that run beside the tests, from the first request on -> folder, results."""
    folder = tmp_path_factory.mktemp("beside")
    hub_cache(folder / "hub")
    (folder / "ranks.py").write_text(RANKS)
    R.main(command(folder / "full", calm, "--method", "none", "--epochs", "1"))
    before = files_of(folder / "full" / "runs")
    file, quick = str(HERE / "railkd.py"), ["--epochs", "1", "--teacher-epochs", "1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += [str(folder / "ranks.py"), str(HERE), str(folder / "ranks")]
    torchrun += command(folder / "ranks", calm, "--lr", "0.001", "--seed", "3")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    toy = {"TASKS": "toy", "METHODS": "kd", "SEEDS": "5", "PATH": path, "PYTHONIOENCODING": "ascii"}
    script = ["-c", SCRIPT, "run_glue.sh", "--output-dir"]
    hub = {"cwd": folder / "hub", "HF_HOME": str(folder / "hub" / "hf"), "HF_HUB_OFFLINE": "1"}
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(FAKE.format(python=sys.executable, folder=folder))
    (folder / "bin" / "python3").chmod(0o755)
    grid = {"METHODS": "none kd", "SEEDS": "1 2", "SEARCH": "1", "PATH": f"{folder}/bin:{path}"}
    with ThreadPoolExecutor(2) as pool:
        jobs = {}
        whole = [command(folder / f"whole{i}", models, *x) for i, x in enumerate(WHOLE)]
        jobs["whole"] = pool.submit(process, whole, folder / "whole")
        for stop in STOPS:
            jobs[stop] = pool.submit(stopped, folder / stop.replace("/", "-"), models, stop)
        flags = [["--epochs=4", "--method", *case.split()] for case in CASES]
        cases = [command(folder, models, *more) for more in flags]
        jobs["cases"] = pool.submit(process, cases, folder / "cases")
        for seed in ("1", "2"):
            args = command(folder / "two", models, "--seed", seed)
            jobs["two", seed] = pool.submit(process, [args], folder / f"two{seed}")
        for seed, (method, limit) in FULL.items():
            args = command(folder / "full", calm, "--method", method, "--seed", seed)
            jobs["full", seed] = pool.submit(process, [args], folder / f"full{seed}", limit)
        jobs["ranks"] = pool.submit(python, *torchrun)
        dead = {"HF_HOME": str(folder / "dead"), "HF_ENDPOINT": "http://127.0.0.1:9"}
        jobs["no hub"] = pool.submit(python, file, "--task=sst2", cwd=folder, timeout=60, **dead)
        jobs["hub"] = pool.submit(python, file, "--task=sst2", "--data-root=data", *quick, **hub)
        small = [*script, str(folder / "glü"), *quick, "--max-train-examples=60"]
        jobs["glue"] = pool.submit(python, *small, **toy)
        for tasks in ("cola rte", "stop rte"):
            jobs[tasks] = pool.submit(python, *script, folder, "--epochs=3", **grid, TASKS=tasks)
        part = Path(file).read_text(encoding="utf-8").split("== the method\n")[1].split("# ===")[0]
        for name, method in {"imported": "from railkd import *", "copied": part}.items():
            jobs[name] = pool.submit(python, "-c", USE.format(method=method))
        yield folder, jobs, before


def test_results_come_back_and_the_model_answers(tmp_path, models, capsys):
    """Catches a second training, another command's results, an unseeded generator (the first run
    makes the teacher, the second loads it), a teacher that is changed, a student without names."""
    args = command(tmp_path, models, "--lr", "0.003")
    first = R.main(args)
    one, teacher = bits(first), Path(first["teacher"]).parent
    before = files_of(teacher)
    assert first["model"] in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        count = count_calls(patch)
        assert R.main(args) == json.loads(json.dumps(first)) and not count[0]
    torch.manual_seed(5)
    assert bits(R.main([*args, "--overwrite"])) == one
    again = R.main([*args, "--lr", "0.001", "--overwrite"])
    assert again["config"]["lr"] == 0.001 and bits(again)[0] != one[0]
    other = R.main([*args, "--seed", "1"])
    assert bits(other)[0] != one[0] and other["teacher_score"] == first["teacher_score"]
    assert [*(tmp_path / "runs" / "own").glob("teacher-*")] == [teacher]
    assert files_of(teacher) == before and not leftovers(tmp_path)
    answer = hf.pipeline("text-classification", model=again["model"])("the noun1 is word3")
    assert answer[0]["label"] in ("bad", "good")
    write_table(tmp_path / "dev.csv", rows_of(49, seed=1))  # other data under the same name
    refused([*args, "--lr", "0.001"], capsys, "a run with other file contents;", kept=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, models, monkeypatch, capsys):
    """Catches hours of NaN, a best model that is lost, a message without its place and terms."""
    original, count = F.cross_entropy, [0]

    def broken(*args, **options):
        count[0] += 1
        return original(*args, **options) * (float("nan") if count[0] == 127 else 1)

    monkeypatch.setattr(F, "cross_entropy", broken)
    args = command(tmp_path, models, "--method", "none", "--batch-size", "1", "--lr", "0.001")
    refused(args, capsys, "epoch 2, step 50: loss nan ce nan")
    weights = weights_of(tmp_path / "runs" / "own" / "none-seed42" / "model")
    assert count[0] == 170 and all(x.isfinite().all() for x in weights.values())
    assert not [*tmp_path.rglob("results.json")]
    count[0] = 124
    refused([*args, "--batch-size", "32", "--seed", "1"], capsys, "epoch 1, step 4: loss nan")


def test_a_foreign_checkpoint_is_refused(tmp_path, models, capsys):
    """Catches a run that goes on from other settings, other data or half a file."""
    args = command(tmp_path, models)

    def die(*unused):
        if count[0] == 4 + 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        count = count_calls(patch, die)
        R.main(args)
    path = next(tmp_path.rglob("checkpoint.pt"))
    good = path.read_bytes()
    refused([*args, "--lr", "0.5"], capsys, f"{path} is of a run with other lr:")
    for content in (good[:1000], b"", b"{}"):
        path.write_bytes(content)
        refused(args, capsys, f"{path} is damaged: delete it")
    path.write_bytes(good)
    write_table(tmp_path / "dev.csv", rows_of(49, seed=1))
    refused(args, capsys, f"{path} is of a run with other file contents, data")
    assert len(R.main(command(tmp_path, models))["history"]) == 2


def test_what_is_trained(tmp_path, models, monkeypatch):
    """Catches a teacher in train mode or trained, maps left out, weight decay on biases, norms."""
    optimizers = []
    count_calls(monkeypatch, optimizers.append)
    distances = spy_on_distances(monkeypatch)
    students = spy(monkeypatch)
    teachers = spy(monkeypatch, "BertForSequenceClassification")
    results = R.main(command(tmp_path, models, "--weight-decay", "0.02"))
    teacher, distance = teachers[-1]["model"], distances[-1]["distance"]
    high, low = optimizers[-1].param_groups
    ids = [id(p) for p in high["params"] + low["params"]]
    trained = [*students[-1]["model"].parameters(), *distance.proj_s.parameters()]
    assert sorted(ids) == sorted(id(p) for p in trained)
    assert not any(p.requires_grad for p in distance.proj_t.parameters())
    assert all(p.ndim >= 2 for p in high["params"]) and all(p.ndim < 2 for p in low["params"])
    assert (high["weight_decay"], low["weight_decay"]) == (0.02, 0.0)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert same(teacher.state_dict(), weights_of(results["teacher"]))
    for calls in (students, teachers):  # dropout and gradients are on in training alone
        modes = [(call["training"], call["grad"]) for call in calls]
        assert {*modes} == {(True, True), (False, False)}
        assert modes.count((True, True)) == (2 * STEPS if calls is students else STEPS)


@pytest.mark.parametrize("case", ["rail-c/off/20", "rail-c/fp16/20", "cr-ild/off/8,12"])
def test_gradients_and_rates_of_every_step(tmp_path, calm, monkeypatch, case):
    """Catches clipping before fp16's scale is taken away, a schedule over all stages together."""
    (method, amp, parts), norms, rates, expected = case.split("/"), [], [], []

    def look(optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        scale = getattr(optimizer, "grad_scale", None) or 1  # of a scaler that has still to unscale
        norms.append(sum((x / scale).square().sum() for x in grads if x is not None).item() ** 0.5)
        rates.append(optimizer.param_groups[0]["lr"])

    count_calls(monkeypatch, look)
    more = ["--method", method, "--epochs", "5", "--lr", "0.001", "--warmup", "0.25", "--amp", amp]
    heavy = ["--weights", "50,50,50"] if method == "rail-c" else []
    results = R.main(command(tmp_path, calm, *more, *heavy))
    assert ("float16" in results["device"]) == (amp == "fp16")
    for size in map(int, parts.split(",")):
        warm = size // 4
        expected += [0.001 * step / warm for step in range(warm)]
        expected += [0.001 * (size - step) / (size - warm) for step in range(warm, size)]
    assert rates == pytest.approx(expected)
    finite = [x for x in norms if x < float("inf")]  # fp16 leaves out the others
    assert len(finite) >= 15 and max(finite) < 1.01 and (min(finite[-4:]) > 0.9 or not heavy)


@pytest.mark.parametrize("method", ["rail-c", "codir", "pkd-skip", "alp-kd", "cr-ild", "reverse"])
def test_terms_are_those_of_the_two_models(tmp_path, calm, method, monkeypatch):
    """Catches a row of another example, an off-by-one layer, the wrong pooling, a temperature or a
    label that does not arrive: at lr 0, against an independent pass."""
    calls, row, orders = spy_on_distances(monkeypatch), R.METHODS[method], []
    more = ["--method", method, "--lr=0", "--temperature=3", "--epochs=4"]
    results = R.main(command(tmp_path, calm, *more))
    logits_s, mean_s, first_s = answers(results["model"], TEXTS)
    logits_t, mean_t, first_t = answers(calm[1], TEXTS)
    pooled_s, pooled_t = (mean_s, mean_t) if row.pool is R.mean_pool else (first_s, first_t)
    ce = F.cross_entropy(logits_s, GOLD).item()
    kd = R.kd_loss(logits_s, logits_t, 3.0).item()
    assert kd > 0.1
    for x in results["history"]:
        assert x["ce"] == pytest.approx(ce, abs=1e-5)
        assert x["kd"] is None or x["kd"] == pytest.approx(kd, rel=1e-4)
        if x["ild"] is None:
            continue
        steps = calls[(x["epoch"] - 1) * STEPS : x["epoch"] * STEPS]
        index = torch.cat([call["index"] for call in steps])
        orders.append(index.tolist())
        assert sorted(orders[-1]) == [*range(120)]  # in the memory bank too: each row once
        assert torch.equal(torch.cat([call["labels"] for call in steps]), GOLD[index])
        layers_s = [3] if method == "cr-ild" else [1, 2]
        given_s, given_t = (torch.cat([call[side] for call in steps]) for side in "st")
        assert torch.allclose(given_s, pooled_s[index][:, layers_s], atol=1e-4)
        assert torch.allclose(given_t, pooled_t[index][:, x["layers_t"]], atol=2e-3, rtol=2e-3)
        total = sum(call["value"] * len(call["index"]) for call in steps) / 120
        assert x["ild"] == pytest.approx(total, rel=1e-5)
        if method in ("pkd-skip", "reverse", "cr-ild"):  # both are as wide: no maps
            unit_s = unit(to_numpy(pooled_s[:, layers_s]))
            unit_t = unit(to_numpy(pooled_t[:, x["layers_t"]]))
            assert x["ild"] == pytest.approx(((unit_s - unit_t) ** 2).sum() / 120, rel=1e-2)
    assert len({*map(tuple, orders)}) == len(orders)  # another order in each epoch


def test_mixed_inputs(tmp_path, calm, monkeypatch):
    """Catches an unmixed text, a mask of one text alone, a share that is always the same, a
    consistency that is not applied or does not grow."""
    calls = spy(monkeypatch)
    more = ["--method", "cr-ild", "--lr", "0", "--epochs", "4", "--batch-size", "8"]
    results = R.main(command(tmp_path, calm, *more))
    calls = [call for call in calls if call["training"]]
    pairs = [*zip(calls[:60:2], calls[1:60:2], strict=True)]  # 15 steps in each of two epochs
    assert not any("inputs_embeds" in call["inputs"] for call in calls[60:])
    shares, values = [], []
    for clean, mixed in pairs:
        mask, ids = clean["inputs"]["attention_mask"], clean["inputs"]["input_ids"]
        words = clean["model"].get_input_embeddings()(ids)
        other = words.flip(0)
        given, both = mixed["inputs"]["inputs_embeds"], mixed["inputs"]["attention_mask"]
        share = (((given - other) * (words - other)).sum() / (words - other).square().sum()).item()
        assert torch.allclose(given, share * words + (1 - share) * other, atol=1e-5)
        assert torch.equal(both, mask.maximum(mask.flip(0)))
        assert mask.sum(1).max() == mask.shape[1] and mask.float().mean() > 0.8  # little padding
        state_m = R.mean_pool(mixed["output"].hidden_states[3], both)[:, None]
        state = R.mean_pool(clean["output"].hidden_states[3], mask)[:, None]
        shares.append(share)
        values.append(R.mixup_loss(state_m, state, share).item())
    assert 0.5 <= min(shares) < 0.6 and 0.9 < max(shares) <= 1.0001
    means = [sum(values[:15]) / 15 / 2, sum(values[15:]) / 15]  # its weight grows by e / E
    assert [row["mix"] for row in results["history"][:2]] == pytest.approx(means, rel=1e-3)


def test_workers_give_the_same_results(tmp_path, models, monkeypatch):
    """Catches a worker that lives on with the layers or the rows of the first epoch."""
    original, made = torch.utils.data.DataLoader.__init__, []

    def with_workers(self, *args, **options):
        made.append(1)
        original(self, *args, **(options | {"num_workers": 2, "persistent_workers": True}))

    draws = [R.select_layers("random", 4, 2, 42, epoch) for epoch in (1, 2, 3, 4)]
    assert draws[3] not in draws[:3]
    args = command(tmp_path, models, "--lr", "0.003", "--epochs", "4")
    plain = bits(R.main(args))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", with_workers)
    assert bits(R.main([*args, "--overwrite"])) == plain and made
    assert [row["layers_t"] for row in plain[0]] == draws


def test_cache_is_what_the_teacher_says(tmp_path, calm, monkeypatch, capsys):
    """Catches rows in another order, an off-by-one layer, the wrong pooling, a second pass; a
    traceback, or rows of nonsense, from a file that was cut or written over."""
    R.main(command(tmp_path, calm, "--epochs", "1"))
    cache = tmp_path / "runs" / "teacher-cache"
    before, expected = files_of(cache), answers(calm[1], TEXTS)
    (file,) = cache.rglob("pooled.npy")
    pooled, logits = (torch.from_numpy(np.load(file.with_name(x))) for x in ARRAYS)
    assert pooled.dtype == torch.float16 and pooled.shape == (120, 4, 16)
    assert torch.allclose(pooled.float(), expected[1][:, 1:], atol=2e-3, rtol=2e-3)
    assert torch.allclose(logits, expected[0], atol=1e-3)
    (other,) = (x for x in cache.iterdir() if x != file.parent)
    assert [x.name for x in other.iterdir()] == ["logits.npy"]
    dev = answers(calm[1], rows_of(50, seed=1)["text"])[0]
    assert torch.allclose(torch.from_numpy(np.load(other / "logits.npy")), dev, atol=1e-3)
    calls = spy(monkeypatch, "BertForSequenceClassification")
    for more in (["--seed", "1"], ["--method", "kd"], ["--method", "ckd", "--lr", "0.001"]):
        R.main(command(tmp_path, calm, "--epochs", "1", *more))
    assert not calls and files_of(cache) == before
    R.main(command(tmp_path, calm, "--epochs", "1", "--method", "pkd-skip"))
    (first,) = {*cache.rglob("pooled.npy")} - {file}
    assert np.allclose(np.load(first), expected[2][:, 1:], atol=2e-3, rtol=2e-3)
    for path in (file.with_name(x) for x in ARRAYS):
        good = path.read_bytes()
        for content in (b"no array" * 99, b"", good[:200]):
            path.write_bytes(content)
            refused(command(tmp_path, calm, "--seed", "2"), capsys, f"{path} is damaged: delete")
        path.write_bytes(good)


def test_what_the_cache_depends_on(tmp_path, calm):
    """Catches a cache that serves another teacher, text, length, tokenizer or pooling."""
    head, words, moved = (shutil.copytree(calm[1], tmp_path / x) for x in ("head", "words", "else"))
    weights = weights_of(head)
    weights["classifier.bias"] += 1e-3
    save_file(weights, head / "model.safetensors", {"format": "pt"})
    other_ids(words, words)
    table = rows_of(120)
    table["text"][7] += " not"
    text = write_table(tmp_path / "text.csv", table)
    # the first changes nothing
    new = f"--device=cpu --max-length=8 --method=pkd-last --teacher={head} --teacher={words}"
    new += f" --amp=bf16 --train-file={text}"
    known = f"--seed=2 --lr=0.1 --batch-size=9 --teacher={moved}"
    for i, flag in enumerate([*new.split(), *known.split()], 1):
        R.main(command(tmp_path, calm, "--epochs", "1", "--overwrite", flag))
        assert len([*tmp_path.rglob("pooled.npy")]) == min(i, len(new.split())), flag


def results_in(folder):
    return json.loads(next(folder.rglob("results.json")).read_text())


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_started_again_gives_the_same_bits(beside, stop):
    """Catches a memory bank, a schedule, a best score, an epoch or a stage that is lost; half a
    file; a signal that some library swallows, a traceback, an abort."""
    (code, error), left, again = beside[1][stop].result()
    how = stop.split("/")[1]
    assert code == {"SIGTERM": 143, "SIGINT": 130, "__exit__": 130}.get(how, -9), error
    assert "results.json" not in left and again == (0, "")
    if code > 0:
        assert error.startswith("railkd.py: stopped") and error.count("\n") == 1
        assert not [name for name in left if name.endswith(".partial")]
    folder, number = beside[0] / stop.replace("/", "-"), WHOLE.index(tuple(flags_of(stop)))
    assert beside[1]["whole"].result() == (0, "") and not leftovers(folder)
    assert bits(results_in(folder)) == bits(results_in(beside[0] / f"whole{number}"))
    told, again = ((folder / f"{x}.out").read_text() for x in ("first", "again"))
    last = [0, *map(int, re.findall(r"\nepoch (\d+) ", told.split("\nmethod ")[-1]))][-1]
    assert int(re.findall(r"resumed after epoch (\d+)", again)[-1]) >= last


@pytest.mark.parametrize("case", CASES)
def test_every_method_runs(case, beside):
    """Catches a missing key, a term without its weight, another draw, a file that is left over; a
    --select or --distance that does not arrive."""
    assert beside[1]["cases"].result() == (0, "")
    name = re.sub(" --[a-z]+=", "-", case) + "-seed42"
    folder, row = beside[0] / "runs" / "own" / name, R.METHODS[case.split()[0]]
    assert sorted(x.name for x in folder.iterdir()) == ["log.jsonl", "model", "results.json"]
    results = results_in(folder)
    assert results["model"] == str(folder / "model")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == results["history"] and {*KEYS.split()} == {*results}
    assert (results["teacher_score"] is None) == (case == "none")
    halves = [1, 1, 2, 2] if len(row.stages) == 2 else [1, 1, 1, 1]
    assert [(x["epoch"], x["stage"]) for x in log] == [*enumerate(halves, 1)]
    for x in log:
        stage, layers = row.stages[x["stage"] - 1], None
        weights = {name: getattr(stage, name) for name in ("ce", "kd", "ild", "mix")}
        if "kd --select" in case:  # a distance makes it a method of three terms
            weights = {"ce": 1 / 3, "kd": 1 / 3, "ild": 1 / 3, "mix": 0}
        used = [name for name in weights if weights[name] or name == "ce"]
        assert {*ROW.split()} == {*x} and used == [name for name in weights if x[name] is not None]
        total = sum(weights[name] * x[name] for name in used)
        assert x["loss"] == pytest.approx(total, rel=1e-4, abs=1e-6)
        if weights["ild"]:
            select = results["config"]["select"] or row.select
            slots = 1 if select == "final" else 2
            layers = R.select_layers(select, 4, slots, 42, x["epoch"])
        assert x["layers_t"] == layers
    best = max((x for x in log if x["stage"] == halves[-1]), key=lambda x: x["score"])
    assert (results["best_epoch"], results["best_score"]) == (best["epoch"], best["score"])


def test_two_runs_at_once_do_no_harm(beside):
    """Catches a folder that two write to: both tune the teacher and fill the cache."""
    assert [beside[1]["two", seed].result() for seed in "12"] == [(0, ""), (0, "")]
    runs = beside[0] / "two" / "runs"
    found = [json.loads(path.read_text()) for path in runs.rglob("results.json")]
    assert len(found) == 2 and len({x["teacher_score"] for x in found}) == 1
    assert len([*(runs / "own").glob("teacher-*")]) == 1
    assert len([*(runs / "teacher-cache").iterdir()]) == 2 and not leftovers(runs)


def test_a_full_disk_is_one_line(beside):
    """Catches a crash without a word, half a file that takes up room, earlier results lost."""
    folder, jobs, before = beside
    for seed in FULL:
        code, error = jobs["full", seed].result()
        assert code == 1 and error.startswith("railkd.py: error: ") and error.count("\n") == 1
    assert not [*(folder / "full").rglob("*.partial")]
    assert before and before.items() <= files_of(folder / "full" / "runs").items()


def test_two_processes_do_what_one_does(tmp_path, calm, beside):
    """Catches a loss or a gradient that is the sum or the share of one process. (Sums in another
    order differ in the last bits, which AdamW's first steps turn into parts of lr.)"""
    more = ["--lr", "0.001", "--seed", "3", "--batch-size", "30"]
    one = R.main(command(tmp_path, calm, *more))
    assert beside[1]["ranks"].result()
    two = results_in(beside[0] / "ranks" / "even")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["layers_t"] == b["layers_t"] and a["score"] == pytest.approx(b["score"])
        for name in ("loss", "ce", "kd", "ild"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    w, v = weights_of(one["model"]), weights_of(two["model"])
    assert all(torch.allclose(w[name], v[name], atol=2e-4) for name in w)


def test_what_two_processes_may_and_may_not(beside):
    """Catches unequal shares where the batch does not divide the data, memory banks that differ, a
    run that hangs, or ends well, when one of its processes dies."""
    done, folder = beside[1]["ranks"].result(), beside[0] / "ranks"
    for row in results_in(folder / "uneven")["history"]:
        assert row["seconds"] * row["examples_per_s"] == pytest.approx(128)
    assert done.stdout.count("epoch 2  layers_t") == 2  # two runs, and one rank alone speaks
    lines = [line for line in done.stderr.splitlines() if "railkd.py: error: " in line]
    assert 1 <= len(lines) <= 2 and all("memory bank" in line for line in lines)
    assert done.stderr.count("bank exit 2") == 2
    assert done.returncode != 0 and "rank 1 dies" in done.stderr
    assert "all is over" not in done.stderr and not [*(folder / "dying").rglob("results.json")]


def assert_annealed(results, checkpoints, temperatures):
    """-> KD: MSE of the student's logits, which lr 0 leaves alone, and phi(T) checkpoint's."""
    logits_s = answers(results["model"], TEXTS)[0]
    known = {name: answers(name, TEXTS)[0] for name in {*checkpoints}}
    pairs = zip(checkpoints, temperatures, strict=True)
    expected = [R.kd_loss(logits_s, known[name], t, 7.0).item() for name, t in pairs]
    rows = results["history"][: len(expected)]
    assert [row["kd"] for row in rows] == pytest.approx(expected, rel=1e-3)
    return expected


def test_pro_kd_follows_the_teacher(tmp_path, models, calm, capsys):
    """Catches a checkpoint or a temperature that is off by one epoch, weights of the wrong stage,
    and in the last stage, which follows the last checkpoint, a return to the first."""
    more = "--method=pro-kd --teacher-epochs=3 --teacher-lr=0.03 --lr=0 --epochs=7 --first-stage=4"
    more += f" --amp=off --weights=0.5,0.5,0 --teacher={models[1]}"
    results = R.main(command(tmp_path, calm[2:6], *more.split()))
    assert "3 checkpoint(s) of the teacher" in capsys.readouterr().out
    folder, history = Path(results["teacher"]).parent, results["history"]
    checkpoints = [folder / f"epoch-00{i}" for i in (1, 1, 2, 3)]
    expected = assert_annealed(results, checkpoints, [7, 5, 3, 1])
    assert len({f"{x:.2g}" for x in expected}) == 4
    assert [row["loss"] for row in history[:4]] == pytest.approx(expected, rel=1e-3)
    logits_s, logits_t = (answers(x, TEXTS)[0] for x in (results["model"], checkpoints[3]))
    last = R.kd_loss(logits_s, logits_t, 2.0).item()
    assert [row["kd"] for row in history[4:]] == pytest.approx([last] * 3, rel=1e-3)
    half = [(row["ce"] + row["kd"]) / 2 for row in history[4:]]
    assert [row["loss"] for row in history[4:]] == pytest.approx(half, rel=1e-5)


def test_pro_kd_with_given_checkpoints(tmp_path, calm, capsys):
    """Catches a list in another order, Annealing-KD with a fixed teacher, one without a head."""
    other = tmp_path / "other"
    shutil.copytree(calm[1], other)
    weights = weights_of(other)
    weights["classifier.weight"] *= -1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    args = command(tmp_path, calm, "--method", "pro-kd", "--lr", "0", "--epochs", "4")
    results = R.main([*args, "--teacher", f"{other},{calm[1]}"])
    out = capsys.readouterr().out
    assert "2 checkpoint(s) of the teacher" in out and "Annealing" not in out
    assert_annealed(results, [other, calm[1]], [7, 1])
    results = R.main([*args, "--max-temperature", "7", "--overwrite"])
    assert "Annealing-KD" in capsys.readouterr().out
    assert_annealed(results, [calm[1], calm[1]], [7, 1])
    toy = R.toy_model(tmp_path / "no-head", 4, 16)
    refused([*args, "--seed=1", "--teacher", f"{toy},{calm[1]}"], capsys, "has no head for the")


@pytest.mark.parametrize("method, epoch", [("pro-kd", 1), ("cr-ild", 4)])
def test_stages_and_early_stopping(tmp_path, calm, method, epoch, monkeypatch, capsys):
    """Catches a second stage that starts from another epoch, early stopping in the first one, a
    best epoch that is not of the last, a tie that replaces it, patience that is off by one."""
    script_scores(monkeypatch, [0.9, 0.8, 0.7, 0.6, 0.2, 0.5, 0.5, 0.4, 0.7, 0.9])
    calls = spy(monkeypatch)

    def weights_at(*when):  # after so many steps, in training or not: at the first forward
        return next(x["weights"] for x in calls if (x["steps"], x["training"]) == when)

    more = ["--method", method, "--epochs", "10", "--first-stage", "4", "--patience", "2"]
    results = R.main(command(tmp_path, calm, *more, "--lr", "0.01"))
    begin = weights_at(4 * STEPS, True)
    for other in (1, 2, 3, 4):
        assert same(begin, weights_at(other * STEPS, False)) == (other == epoch)
    rows = [(row["epoch"], row["stage"], row["score"]) for row in results["history"]]
    first = [(1, 1, 0.9), (2, 1, 0.8), (3, 1, 0.7), (4, 1, 0.6)]
    assert rows == [*first, (5, 2, 0.2), (6, 2, 0.5), (7, 2, 0.5), (8, 2, 0.4)]
    assert "stopped: nothing better for 2 epochs" in capsys.readouterr().out
    found = results["best_epoch"], results["best_score"], results["last_score"]
    assert found == (6, 0.5, 0.4) and not leftovers(tmp_path)
    assert same(weights_of(results["model"]), weights_at(6 * STEPS, False))


def test_a_collapse_and_a_run_that_learns_nothing_are_told(tmp_path, models, monkeypatch, capsys):
    """Catches an alarm that never rings, or always; a stored result that forgets it."""
    model = hf.DistilBertForSequenceClassification
    script_scores(monkeypatch, [0.5])  # as the majority baseline
    args = command(tmp_path, models, "--method", "none")
    assert not R.main(args)["collapsed"]
    assert "WARNING: the student has learned nothing" in capsys.readouterr().out
    original, count = model.forward, count_calls(monkeypatch)

    @functools.wraps(original)
    def alike(self, **inputs):
        output = original(self, **inputs)
        if count[0] and output.hidden_states:
            output.hidden_states = tuple(x * 1e-3 + 1 for x in output.hidden_states)
        return output

    monkeypatch.setattr(model, "forward", alike)
    for more in (["--overwrite"], []):
        results = R.main([*args, *more])
        assert results["collapsed"] and results["history"][0]["cosine_s"] > 0.99
        assert "WARNING: the student has collapsed" in capsys.readouterr().out


def test_first_commands(beside):
    """Catches default names that no hub has, words on stderr, a script behind the file's flags."""
    done, script = (beside[1][name].result() for name in ("hub", "glue"))
    assert (done.returncode, done.stderr) == (script.returncode, script.stderr) == (0, "")
    config = results_in(beside[0] / "hub" / "runs" / "sst2" / "rail-c-seed42")["config"]
    assert config["teacher"] == "google-bert/bert-base-uncased"
    assert "== toy kd seed 5" in script.stdout and "student  accuracy" in script.stdout
    assert "| method | toy | average |" in script.stdout and "| kd | " in script.stdout


def test_script_runs_the_whole_grid(beside):
    """Catches a run that is left out, a failure that stops the rest or is not told, a grid that
    tunes a teacher for each point, one that goes on after Ctrl-C."""
    root, jobs, _ = beside
    done, stopped = jobs["cola rte"].result(), jobs["stop rte"].result()
    expected, points = [], itertools.product(("1e-5", "2e-5", "5e-5", "4e-6"), (8, 16, 32))
    runs = [*itertools.product(("cola", "rte"), ("none", "kd"), "12")]
    for (lr, batch), (task, method, seed) in itertools.product(points, runs):
        folder = root / f"lr{lr}-batch{batch}"
        line = f"--task {task} --method {method} --seed {seed} --output-dir {folder} "
        line += f"--teacher-cache {root}/teacher-cache --lr {lr} --batch-size {batch} --epochs=3"
        expected.append(line)
        assert (folder / task / "teacher-x").resolve().parts[-3] == "lr1e-5-batch8"
    calls = (root / "calls cola rte").read_text().splitlines()
    assert calls == [*expected, f"--report {root}"]
    failures = [line for line in done.stderr.splitlines() if " kd seed 2" in line]
    assert done.returncode == 1 and len(failures) == len(expected) // 4
    assert stopped.returncode == 130 and stopped.stdout.count("== ") == 1


# ----------------------------------------------------------------------- the command and its README
STUDY = HERE / ".github" / "STUDY.md"
README = (HERE / "README.md").read_text(encoding="utf-8")
SHARED = HERE.parent / "shared" / "hub"


def test_defaults_are_the_documented_ones():
    """Catches a default that was changed for a try; toy's own are for the toy task alone."""
    config = R.parse(["--task", "sst2"])
    expected = {"method": "rail-c", "epochs": 40, "patience": 5, "batch_size": 32, "lr": 2e-5}
    expected |= {"temperature": 2.0, "max_length": 128, "seed": 42, "teacher_epochs": 3}
    expected |= {"teacher": "google-bert/bert-base-uncased", "weights": None}
    expected |= {"student": "distilbert/distilbert-base-uncased"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert R.parse(["--task", "sst2", "--output-dir", "toy"]).lr == 2e-5
    assert R.parse(["--task=toy"]).lr == R.parse(["--task", "toy"]).lr == 1e-3
    assert R.parse(["--task", "toy", "--lr", "0.5"]).lr == 0.5
    with pytest.raises(AttributeError):
        config.lr = 1.0


def test_help_names_each_flag_with_its_source(capsys):
    """Catches a flag without help or source, a group without a title."""
    with pytest.raises(SystemExit):
        R.main(["--help"])
    text = capsys.readouterr().out
    for title in ("task and models", "data", "training", "loss", "teacher", "output"):
        assert f"\n\n{title}:\n" in text
    for entry in dataclasses.fields(R.Config):
        assert f"--{entry.name.replace('_', '-')}" in text
    for part in text.split("\n  --")[1:]:
        assert "paper" in part or "ours" in part, part


def test_readme_names_what_there_is():
    """Catches a method or an equation that the README forgets, a flag that does not exist."""
    names = [*R.METHODS, *(distance.__name__ for distance in R.DISTANCES.values())]
    assert all(f"`{name}`" in README or f"`{name}`," in README for name in names)
    for epoch in range(1, 4):  # of the picture of the draw
        drawn = " ".join(map(str, R.sample_layers(12, 5, 42, epoch)))
        assert re.search(rf"^epoch {epoch} .* {drawn}$", README, re.M)
    flags = {entry.name.replace("_", "-") for entry in dataclasses.fields(R.Config)}
    flags |= {"help", "no-shared-proj", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}
    text = README.split("**Removed**")[0]
    assert set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", text)) <= flags


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_code_runs(block, tmp_path, models, monkeypatch):
    """Catches a method left out, two kinds of device in a table, a self-likeness that is not 1."""
    monkeypatch.chdir(tmp_path)
    lines, rows = [], itertools.product(("cola", "mrpc"), ("", "--select skip"), ["gpu"])
    for task, options, device in [*rows, ("stsb", "", "cpu")]:
        line = {"task": task, "method": "rail-c", "options": options, "device": device}
        lines.append(json.dumps(line | {"last": 0.4, "teacher_score": 0.6, "cosine_s": [0.5] * 5}))
    (tmp_path / ".github").mkdir()
    (tmp_path / ".github" / "study.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts").write_text("\n".join(TEXTS[:30]))
    monkeypatch.setattr(sys, "argv", ["", "texts", models[1], models[1], models[3]])
    if "matplotlib" in block:
        pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    for name in re.findall(r'savefig\("(.*?)"', block):
        words = (">rail-c skip<", "cola") if "study" in name else (">100<", ">student<")
        picture = (tmp_path / name).read_text()
        assert all(word in picture for word in words) and "stsb" not in picture


def test_loop_of_the_study(tmp_path, calm, monkeypatch, capsys):
    """Catches names in the study's protocol that are not the file's any more."""
    loop, lines = re.findall(r"```python\n(.*?)```", STUDY.read_text(), re.S)[:2]
    loop = loop.replace("BLOCKS = 12", "BLOCKS = 4").replace("range(1, 6)", "[7]")
    args = command(tmp_path, calm, "--task", "own", "--epochs", "1", "--lr", "0.01")
    expected = R.main([*args, "--seed", "7"])
    for name in ("IntermediateLoss", "TrainingSet"):
        monkeypatch.setattr(R, name, getattr(R, name))  # the loop replaces them
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), *args])
    exec(compile(loop, "STUDY.md", "exec"), {"__name__": "study"})
    capsys.readouterr()
    exec(compile(lines, "STUDY.md", "exec"), {"__name__": "study"})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["options"]: row["cosine_s"] for row in rows}
    assert found["draw epoch"] == [round(row["cosine_s"], 4) for row in expected["history"]]
    assert len(found) == 6 and len({*map(tuple, found.values())}) > 3


@pytest.mark.parametrize("code", ["copied", "imported"])
def test_torch_alone_is_enough(beside, code):
    """For the method part, copied between its two comments, and to import the file. Catches an
    import of transformers or another library at the top."""
    done = beside[1][code].result()
    assert done.stdout == "True\n" and not done.stderr, done.stderr


def test_no_hub_is_one_line(beside):
    """Catches minutes of retries, or a traceback, where the hub cannot be reached."""
    done = beside[1]["no hub"].result()
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--task toy" in done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the GLUE clones in ../shared/hub")
@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "stsb", "rte", "wnli", "mnli", "qqp"])
def test_real_glue_is_read(task):
    """Catches a renamed column, test labels of -1 that come in, label names that get lost."""
    args = ["--task", task, "--data-root", str(SHARED), "--max-train-examples", "50"]
    data = R.load_data(R.parse(args))
    names = {"sst2": ["negative", "positive"], "mnli": ["entailment", "neutral", "contradiction"]}
    assert data.names == names.get(task, data.names) and bool(data.names) == (task != "stsb")
    assert len(data.labels["train"]) == 50 and data.labels[data.dev[0]].min() >= 0
    assert len(data.texts["train"]) == (1 if task in ("sst2", "cola") else 2)
