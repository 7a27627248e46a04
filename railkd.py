# SPDX-License-Identifier: MIT
"""RAIL-KD, random intermediate layer mapping for distillation (arXiv 2109.10164), in one file.

A fine-tuned encoder of 12 or 24 layers, the teacher, is compressed into a student of 6. Besides the
teacher's logits the student matches its mean-pooled intermediate layers; which of them is drawn at
random, sorted, in every epoch: `sample_layers`, `LayerwiseDistance` (Eq. 2), `ConcatDistance`
(Eq. 3), `Objective` (Eq. 4).

    python railkd.py --task toy        no download, about a minute on a laptop's CPU
    python railkd.py --task sst2       BERT-base -> DistilBERT, both from the hub
    python railkd.py --help

Measured (CoLA, 5 epochs, MPNet-12 -> MiniLM-6, dev Matthews of the last epoch, n = 5, an H100): no
teacher 28.8 +- 1.8, kd 30.7 +- 2.7, rail-l 35.4 +- 2.1, rail-c 31.3 +- 1.7; to the letter, with
both maps random and trained, 0.0 and 25.0 +- 4.4. Two other tasks, and what was learned: README.md.
"""

import argparse
import contextlib
import csv
import ctypes
import errno
import hashlib
import inspect
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


# ================================================================================== the method
# Copy it down to "end of the method", with imports of random, NamedTuple, torch, F, Tensor and nn.
# Shapes: B batch, L tokens, d_s and d_t hidden widths, n blocks of the teacher, m slots (layers of
# the student in use), k teacher layers in use, u width of the maps, C classes, N examples.
# hidden_states[0] is the output of the embedding, hidden_states[i] that of block i.
def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1: mean over each example's tokens, (B, L, d) and (B, L) -> (B, d), in 32 bits.
    Padding, of which the paper says nothing, never matters, not even NaN in it; an example without
    tokens gives zeros. ValueError for other shapes."""
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"need hidden (B, L, d), mask (B, L), not {hidden.shape}, {mask.shape}")
    is_token = mask.bool().unsqueeze(-1)  # (B, L, 1)
    total = hidden.float().masked_fill(~is_token, 0).sum(1)  # (B, d)
    return total / is_token.sum(1).clamp(min=1)


def sample_layers(num_layers: int, k: int, seed: int, epoch: int) -> list[int]:
    """The draw of section 3: k of the intermediate layers 1..num_layers-1, sorted, for one epoch.
    All subsets are equally likely. A function of its arguments alone: the same on every rank and
    after a restart, untouched by dropout. ValueError where there are no k layers to draw."""
    if not 1 <= k <= num_layers - 1:
        raise ValueError(f"cannot draw k = {k} layers from num_layers = {num_layers} blocks")
    return sorted(random.Random(f"layers {seed} {epoch}").sample(range(1, num_layers), k))


def unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)  # x / |x|


def make_maps(widths, widths_out, shared, bias):
    """One nn.Linear for all vectors of a model (shared), else an nn.ModuleList, one for each."""
    if not shared:
        return nn.ModuleList(nn.Linear(*x, bias) for x in zip(widths, widths_out, strict=True))
    if len({*widths}) > 1 or len({*widths_out}) > 1:
        raise ValueError(f"one map for all needs one width, not {widths} -> {widths_out}")
    return nn.Linear(widths[0], widths_out[0], bias)


def project(maps, vectors):
    """Each vector (B, d_i) through its own map, through the one for all, or as it is (None)."""
    if isinstance(maps, nn.ModuleList):
        return [linear(vector) for linear, vector in zip(maps, vectors, strict=True)]
    return maps(torch.stack(vectors)).unbind() if maps else vectors  # fewer calls, for a GPU


def fit_ridge(linear: nn.Linear, x: Tensor, y: Tensor, penalty: float = 0.1) -> None:
    """Set a map to the ridge solution from x (N, d) to y (N, u), computed in 64 bits. The penalty
    is relative to the variance of the features: their scale does not matter."""
    x, y = x.cpu().double(), y.cpu().double()
    centre = 0.0 if linear.bias is None else 1.0  # without a bias nothing could undo a centring
    mean_x, mean_y = centre * x.mean(0), centre * y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x  # (d, d)
    gram.diagonal().add_((penalty * gram.trace() / len(gram)).clamp(min=1e-12))
    weight = torch.linalg.solve(gram, x.T @ y).T  # (u, d)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(mean_y - weight @ mean_x)


class Distance(nn.Module):
    """What all distances share, maps and their start; a subclass writes its formula in `compare`.
    distance(pooled_s (B, m, d_s), pooled_t (B, k, d_t)) -> scalar, in 32 bits.
    proj_dim: width u that proj_s and proj_t lead to. None: proj_t is None, and proj_s leads to the
        teacher's width, or is None where that is the student's own.
    teacher_proj: "frozen" as drawn, or "trained" (the letter of the paper).
    start: "ridge", `fit` sets proj_s by least squares, or "random" (the letter; Eq. 2 collapses).
    alpha: weights of the terms; attention and contrastive have but one, and ignore it.
    ValueError: bad options, shapes. RuntimeError: no `fit` yet."""

    def __init__(
        self,
        d_s: int,
        d_t: int,
        num_slots: int,
        num_targets: int | None = None,
        proj_dim: int | None = None,
        shared: bool = False,
        bias: bool = True,
        teacher_proj: str = "frozen",
        start: str = "ridge",
        alpha: list[float] | None = None,
    ):
        super().__init__()
        if teacher_proj not in ("frozen", "trained") or start not in ("ridge", "random"):
            raise ValueError(f"no such teacher_proj or start: {teacher_proj!r}, {start!r}")
        self.shape_s, self.shape_t = (num_slots, d_s), (num_targets or num_slots, d_t)
        widths_s, widths_t = self.widths(*self.shape_s), self.widths(*self.shape_t)
        widths_u = [proj_dim] * len(widths_t) if proj_dim else widths_t  # what the maps lead to
        self.proj_s = self.proj_t = None
        if proj_dim or widths_s != widths_u[: len(widths_s)]:  # attention: m slots, k targets
            self.proj_s = make_maps(widths_s, widths_u[: len(widths_s)], shared, bias)
        if proj_dim:
            self.proj_t = make_maps(widths_t, widths_u, shared, bias)
            self.proj_t.requires_grad_(teacher_proj == "trained")
        alpha = torch.ones(len(widths_s)) if alpha is None else torch.as_tensor(alpha).float()
        if alpha.shape != (len(widths_s),):
            raise ValueError(f"alpha: {len(widths_s)} weights needed, not {alpha.tolist()}")
        self.register_buffer("alpha", alpha)
        self.register_buffer("fitted", torch.tensor(False))  # in the state dict: `fit` was called
        self.start, self.ready = start, start == "random"

    def widths(self, num_layers, d):
        return [vector.shape[1] for vector in self.vectors(torch.empty(1, num_layers, d))]

    def vectors(self, pooled):
        """What the maps are given: of (B, k, d) each layer, k of (B, d)."""
        return pooled.unbind(1)

    def forward(self, pooled_s, pooled_t, index=None, labels=None) -> Tensor:
        """index (B,), numbers of the rows, and labels (B,) are for ContrastiveDistance alone."""
        if pooled_s.shape[1:] != self.shape_s or pooled_t.shape != (len(pooled_s), *self.shape_t):
            wanted = f"(B, *{self.shape_s}) and (B, *{self.shape_t})"
            raise ValueError(f"need pooled {wanted}, not {pooled_s.shape} and {pooled_t.shape}")
        self.ready = self.ready or self.proj_s is None or bool(self.fitted)  # read on a GPU once
        if not self.ready:
            raise RuntimeError(f"{type(self).__name__}, start='ridge': call fit before training")
        with torch.autocast(pooled_s.device.type, enabled=False):  # 16 bits are too few for norms
            pooled_s, pooled_t = pooled_s.float(), pooled_t.detach().float()
            return self.compare(pooled_s, pooled_t, index=index, labels=labels)

    def targets(self, pooled_t):
        """What the student's maps should hit before training; here the teacher's unit vectors."""
        return [unit(t_i) for t_i in project(self.proj_t, self.vectors(pooled_t))]

    @torch.no_grad()
    def fit(self, pooled_s: Tensor, pooled_t: Tensor, draws: list[list[int]] | None = None) -> None:
        """Start proj_s at the ridge solution from the student's vectors to the targets: pooled_s
        (N, m, d_s), pooled_t (N, k, d_t); or (N, K, d_t) and `draws`, each k of the K positions,
        and the target is the mean over them. With start="random" nothing happens."""
        if self.proj_s is None or self.start == "random":
            return
        maps, x = self.proj_s, self.vectors(pooled_s.float())
        y = [0.0] * len(x)
        draws = draws or [list(range(self.shape_t[0]))]
        for draw in draws:
            for i, target in enumerate(self.targets(pooled_t[:, draw].float())):
                y[i] = y[i] + target / len(draws)
        if isinstance(maps, nn.Linear):  # for a shared map each slot is N more examples
            maps, x, y = [maps], [torch.cat(x)], [torch.cat(y)]
        for linear, x_i, y_i in zip(maps, x, y, strict=True):
            fit_ridge(linear, x_i, y_i)
        self.fitted.fill_(True)


class LayerwiseDistance(Distance):
    """RAIL-KD^l, Eq. 2, in [0, 4 sum alpha]."""

    def __init__(self, d_s, d_t, num_slots, num_targets=None, proj_dim=128, shared=True, **more):
        super().__init__(d_s, d_t, num_slots, num_targets, proj_dim, shared, **more)
        if self.shape_t[0] != num_slots:
            raise ValueError(f"{num_slots} slots need as many teacher layers, not {num_targets}")

    def compare(self, pooled_s, pooled_t, **unused):
        """L = sum_i alpha_i |t_i/|t_i| - s_i/|s_i||^2, mean over the batch."""
        s = torch.stack(project(self.proj_s, pooled_s.unbind(1)))  # s_i = W_s h_s,i: (m, B, u)
        t = torch.stack(project(self.proj_t, pooled_t.unbind(1)))  # t_i = W_t h_t,i: (m, B, u)
        distances = (unit(t) - unit(s)).square().sum(-1)  # |t_i/|t_i| - s_i/|s_i||^2: (m, B)
        return (self.alpha * distances.mean(1)).sum()


class ConcatDistance(Distance):
    """RAIL-KD^c, Eq. 3, in [0, 4]: all slots side by side, and one distance."""

    def __init__(self, d_s, d_t, num_slots, num_targets=None, proj_dim=128, shared=True, **more):
        super().__init__(d_s, d_t, num_slots, num_targets, proj_dim, True, **more)

    def vectors(self, pooled):
        return [pooled.flatten(1)]  # [h_1; ..; h_k]: (B, k d)

    def compare(self, pooled_s, pooled_t, **unused):
        """L = |t/|t| - s/|s||^2, mean over the batch."""
        s = project(self.proj_s, self.vectors(pooled_s))[0]  # s = W_s [h_s,1; ..; h_s,m]: (B, u)
        t = project(self.proj_t, self.vectors(pooled_t))[0]  # t = W_t [h_t,1; ..; h_t,k]: (B, u)
        return self.alpha[0] * (unit(t) - unit(s)).square().sum(-1).mean()


def kd_loss(logits_s: Tensor, logits_t: Tensor, temperature: float, max_temperature=None) -> Tensor:
    """L_KD: T^2 KL(teacher || student), mean over the batch (Hinton et al., 2014), in 32 bits.
    (B, C) twice -> scalar; C = 1, a regression: mean squared error. With max_temperature that of
    logits_s and phi(T) logits_t, phi(T) = 1 - (T - 1) / max_temperature (Annealing-KD, Jafari et
    al., 2021). ValueError for other shapes and for T <= 0."""
    if logits_s.shape != logits_t.shape or logits_s.ndim != 2 or not temperature > 0:
        raise ValueError(f"need (B, C), T > 0: {logits_s.shape}, {logits_t.shape}, {temperature}")
    logits_s, logits_t = logits_s.float(), logits_t.detach().float()
    if max_temperature:
        phi = 1 - (temperature - 1) / max_temperature  # up to 1 as the temperature falls
        return F.mse_loss(logits_s, phi * logits_t)
    if logits_s.shape[1] == 1:
        return F.mse_loss(logits_s, logits_t)
    log_p_s = F.log_softmax(logits_s / temperature, dim=-1)
    log_p_t = F.log_softmax(logits_t / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class IntermediateLoss(nn.Module):
    """The intermediate term of a method, for any loop: which layers, pooled, and how far apart.
    Once ild.fit(batches), in every epoch ild.set_epoch(epoch), the draw, in every step
    ild(hidden_states_s, mask_s, hidden_states_t, mask_t) -> scalar. Hidden states as those of
    `output_hidden_states=True`, blocks + 1 tensors (B, L, d); masks (B, L) or None; L may differ.
    If pooled already: ild.distance(pooled_s, pooled_t). `select`, `distance` replace those of the
    method's row in METHODS, options go to the distance; the parameters go to the optimizer.
    ValueError: unknown names, shapes that do not fit. RuntimeError: no draw, no fit yet."""

    def __init__(
        self,
        method: str,
        num_layers_s: int,
        num_layers_t: int,
        d_s: int,
        d_t: int,
        seed: int = 0,
        select: str | None = None,
        distance: str | None = None,
        **options,
    ):
        super().__init__()
        row = METHODS.get(method, Method())
        select, distance = select or row.select, distance or row.distance
        if method not in METHODS or select not in SELECTIONS or distance not in DISTANCES:
            known = f"{', '.join(METHODS)}; {', '.join(SELECTIONS)}; {', '.join(DISTANCES)}"
            raise ValueError(f"no such row: {method!r}, {select!r}, {distance!r}; known: {known}")
        self.select, self.seed, self.pool_tokens = select, seed, row.pool
        self.num_layers_s, self.num_layers_t = num_layers_s, num_layers_t
        final = select == "final"  # all others leave the last block out, on both sides
        self.layers_s = [num_layers_s] if final else list(range(1, num_layers_s))
        slots, targets = len(self.layers_s), len(self.draw(0))  # any epoch: the number alone
        self.layers_t = None if select == "random" else self.draw(0)  # None: not drawn yet
        self.distance = DISTANCES[distance](d_s, d_t, slots, num_targets=targets, **options)

    def draw(self, epoch: int) -> list[int]:
        return select_layers(self.select, self.num_layers_t, len(self.layers_s), self.seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """The teacher's layers in this epoch: the selection "random" draws anew."""
        self.layers_t = self.draw(epoch)

    def pool(self, hidden_states, mask, layers, num_layers) -> Tensor:
        if len(hidden_states) != num_layers + 1:
            wanted = "[0] is the embedding output, [i] the output of block i"
            raise ValueError(f"{len(hidden_states)} hidden states, not {num_layers + 1}: {wanted}")
        mask = torch.ones_like(hidden_states[0][..., 0]) if mask is None else mask
        return torch.stack([self.pool_tokens(hidden_states[i], mask) for i in layers], dim=1)

    def forward(self, hidden_states_s, mask_s, hidden_states_t, mask_t, index=None, labels=None):
        if self.layers_t is None:
            raise RuntimeError("no layers drawn yet: call set_epoch(epoch) before every epoch")
        pooled_s = self.pool(hidden_states_s, mask_s, self.layers_s, self.num_layers_s)
        pooled_t = self.pool(hidden_states_t, mask_t, self.layers_t, self.num_layers_t)
        return self.distance(pooled_s, pooled_t, index=index, labels=labels)

    @torch.no_grad()
    def fit(self, batches) -> None:
        """Start the student's maps: batches of the four that forward takes."""
        layers_t = range(1, self.num_layers_t + 1)
        pooled_s, pooled_t = [], []
        for hidden_states_s, mask_s, hidden_states_t, mask_t in batches:
            pooled_s.append(self.pool(hidden_states_s, mask_s, self.layers_s, self.num_layers_s))
            pooled_t.append(self.pool(hidden_states_t, mask_t, layers_t, self.num_layers_t))
        self.fit_pooled(torch.cat(pooled_s), torch.cat(pooled_t))

    def fit_pooled(self, pooled_s: Tensor, pooled_t: Tensor) -> None:
        """The same from pooled vectors: (N, m, d_s), and (N, n, d_t) of the teacher's blocks 1..n.
        The maps aim at the mean target over the draws of the first 40 epochs."""
        epochs = range(1, 41) if self.select == "random" else [0]
        draws = [[layer - 1 for layer in self.draw(epoch)] for epoch in epochs]
        self.distance.fit(pooled_s, pooled_t, draws)


# ------------------------------------------------------------------------------- the baselines
def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token that is no padding, mostly [CLS]: (B, L, d), (B, L) -> (B, d), 32 bits."""
    return mean_pool(hidden, mask.bool() & (mask.bool().cumsum(1) == 1))


def select_layers(name: str, num_layers: int, k: int, seed: int = 0, epoch: int = 0) -> list[int]:
    """The teacher layers that a selection gives to k student slots, of 1..num_layers-1 ("final":
    the last block). ValueError for an unknown name and for more slots than layers."""
    if name not in SELECTIONS:
        raise ValueError(f"unknown selection {name!r}, known: {', '.join(SELECTIONS)}")
    if name == "final":  # CR-ILD
        return [num_layers]
    drawn = sample_layers(num_layers, k, seed, epoch)  # it checks k, for all names
    skip = [i * num_layers // (k + 1) for i in range(1, k + 1)]  # 2, 4, 6, 8, 10 of 12 blocks
    return {
        "random": drawn,  # RAIL-KD
        "skip": skip,  # PKD-skip
        "last": list(range(num_layers - k, num_layers)),  # PKD-last
        "reverse": skip[::-1],  # this one and the next two: controls of arXiv 2502.04499
        "middle": [num_layers // 2] * k,
        "permuted": random.Random(f"order {seed}").sample(skip, k),  # one order for all epochs
        "all": list(range(1, num_layers)),
    }[name]


class DirectDistance(LayerwiseDistance):
    """PKD (Sun et al., 2019): Eq. 2 without maps; where d_s != d_t each slot is mapped to d_t.
    The sum over the slots, where the authors' code takes the mean over the elements."""

    def __init__(self, d_s, d_t, num_slots, num_targets=None, proj_dim=None, shared=False, **more):
        super().__init__(d_s, d_t, num_slots, num_targets, proj_dim, shared, **more)


class GroupDistance(Distance):
    """CKD (Wu et al., 2020): teacher layers in m contiguous groups, sizes at most one apart. A slot
    is mapped up to the width of its group, side by side: the released code (the paper: down)."""

    def vectors(self, pooled):  # of the student's m vectors each is a group
        return [group.flatten(1) for group in pooled.tensor_split(self.shape_s[0], dim=1)]

    def compare(self, pooled_s, pooled_t, **unused):
        s = project(self.proj_s, pooled_s.unbind(1))
        t = project(self.proj_t, self.vectors(pooled_t))  # m of (B, size of the group x d_t)
        pairs = zip(self.alpha, s, t, strict=True)
        return sum(a * (unit(t_i) - unit(s_i)).square().sum(-1).mean() for a, s_i, t_i in pairs)


class AttentionDistance(Distance):
    """ALP-KD (Passban et al., 2021): mean squared error of s_i and sum_j a_ij t_j, a_ij = softmax_j
    <s_i, t_j>, unscaled as in the original (recalled). `weights` (B, m, k): a of the last call."""

    def compare(self, pooled_s, pooled_t, **unused):
        s = torch.stack(project(self.proj_s, pooled_s.unbind(1)), dim=1)  # (B, m, d_t)
        t = torch.stack(project(self.proj_t, pooled_t.unbind(1)), dim=1)  # (B, k, d_t)
        a = (s @ t.transpose(1, 2)).softmax(dim=-1)  # (B, m, k)
        self.weights = a.detach()
        return F.mse_loss(s, a @ t)

    def targets(self, pooled_t):  # there is no attention yet: the mean layer
        return [torch.stack(project(self.proj_t, pooled_t.unbind(1))).mean(0)] * self.shape_s[0]


class ContrastiveDistance(ConcatDistance):
    """CoDIR (Sun et al., 2020) as InfoNCE on the unit vectors of Eq. 3: the teacher's t has to find
    the student's s of its own example among num_negatives others, which a memory bank keeps:
    bank <- unit(momentum bank + (1 - momentum) s), num_examples rows, in training mode alone.
    Negatives, drawn by torch's global generator: rows met so far of another label, or all other
    rows where there is none or labels are float or None. Takes index (B,), the numbers of the
    rows (else ValueError), and labels (B,)."""

    def __init__(
        self,
        d_s,
        d_t,
        num_slots,
        num_examples,
        num_negatives=100,
        temperature=0.07,
        momentum=0.5,
        **more,
    ):
        more = {"teacher_proj": "trained", "proj_dim": 128} | more
        super().__init__(d_s, d_t, num_slots, **more)
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self.register_buffer("bank", unit(torch.randn(num_examples, more["proj_dim"])))
        self.register_buffer("bank_labels", torch.full((num_examples,), -1))  # -1: unknown

    def compare(self, pooled_s, pooled_t, index=None, labels=None):
        if index is None:
            raise ValueError("ContrastiveDistance needs index=, the row numbers of the batch")
        s = unit(project(self.proj_s, self.vectors(pooled_s))[0])  # (B, u)
        t = unit(project(self.proj_t, self.vectors(pooled_t))[0])  # (B, u)
        index = torch.as_tensor(index, device=s.device).long()
        classes = torch.full_like(index, -1)
        if labels is not None and not torch.as_tensor(labels).is_floating_point():
            classes = torch.as_tensor(labels, device=s.device).long()
        if self.training:
            self.bank_labels[index] = classes
        others = torch.arange(len(self.bank), device=s.device) != index[:, None]  # (B, N)
        unlike = others & (self.bank_labels >= 0) & (self.bank_labels != classes[:, None])
        use_labels = unlike.any(1, keepdim=True) & (classes[:, None] >= 0)
        chances = torch.where(use_labels, unlike, others).float()
        rows = torch.multinomial(chances, self.num_negatives, replacement=True)
        negatives = self.bank[rows]  # (B, K, u)
        if self.training:
            old = self.bank[index]
            self.bank[index] = unit(self.momentum * old + (1 - self.momentum) * s.detach())
        positive = (t * s).sum(-1, keepdim=True)  # (B, 1)
        scores = torch.cat([positive, torch.einsum("bu,bku->bk", t, negatives)], dim=1)
        return F.cross_entropy(scores / self.temperature, torch.zeros_like(index))


# ----------------------------------------------------------------------------------- the tables
class Stage(NamedTuple):
    """A stage of training: the weights of the terms of Eq. 4, and what is special in it."""

    ce: float = 0.0
    kd: float = 0.0
    ild: float = 0.0
    mix: float = 0.0  # CR-ILD's consistency; its weight grows to this by the last epoch
    anneal: bool = False  # Pro-KD: the temperature falls, the teacher's checkpoints take turns
    then: str = "best"  # the next stage starts from this stage's "best" epoch, or its "last"


class Method(NamedTuple):
    """All about a method: which teacher layers, how far apart, how pooled, how trained."""

    select: str | None = None
    distance: str | None = None
    pool: object = mean_pool
    stages: tuple = (Stage(ce=1 / 3, kd=1 / 3, ild=1 / 3),)  # Eq. 4: lambda_1, lambda_2, lambda_3


SELECTIONS = ("random", "skip", "last", "reverse", "middle", "permuted", "all", "final")
DISTANCES = {
    "layerwise": LayerwiseDistance,
    "concat": ConcatDistance,
    "direct": DirectDistance,
    "group": GroupDistance,
    "attention": AttentionDistance,
    "contrastive": ContrastiveDistance,
}
METHODS = {
    "none": Method(stages=(Stage(ce=1),)),
    "kd": Method(stages=(Stage(ce=0.5, kd=0.5),)),
    "rail-l": Method("random", "layerwise"),
    "rail-c": Method("random", "concat"),
    "pkd-skip": Method("skip", "direct", first_token),
    "pkd-last": Method("last", "direct", first_token),
    "ckd": Method("all", "group"),
    "alp-kd": Method("all", "attention"),
    "codir": Method("all", "contrastive"),
    "cr-ild": Method("final", "direct", stages=(Stage(ild=1, mix=0.1, then="last"), Stage(kd=1))),
    "pro-kd": Method(stages=(Stage(kd=1, anneal=True), Stage(ce=1))),
    "reverse": Method("reverse", "direct"),
    "permuted": Method("permuted", "direct"),
    "all-to-one": Method("middle", "direct"),
}
# =========================================================================== end of the method


# ------------------------------------------------------------------------------- configuration
FORMAT = 5  # of the files that a run writes; those of another format are refused by name
ADVICE = "; no such folder, no hub? Folders for --teacher, --student, --data-root; or --task toy"
# metrics as in GLUE, the first selects the epoch
TASKS = {"cola": ["matthews"], "mrpc": ["f1", "accuracy"], "qqp": ["f1", "accuracy"]}
TASKS |= {"stsb": ["pearson", "spearman"]}
TASKS |= dict.fromkeys(["sst2", "mnli", "qnli", "rte", "wnli", "toy"], ["accuracy"])
GROUPS = ("task and models", "data", "training", "loss", "teacher", "output", "prediction")
TASK, DATA, TRAIN, LOSS, TEACHER, OUTPUT, PREDICT = GROUPS  # of --help
# a task's test splits -> the files that the GLUE server takes
SERVER = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP"}
SERVER |= {"qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}
SERVER = {task: {"test": name} for task, name in SERVER.items()}
SERVER |= {"mnli": {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}}


class UserError(Exception):
    """A user's mistake: one line that says what is wrong and how to mend it. Exit code 2."""


@contextlib.contextmanager
def as_user_error(what, advice="", kind=Exception):
    """For libraries that fail on a user's input: their errors have no class in common."""
    try:
        yield
    except kind as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) == errno.ENOSPC:  # a full disk is no mistake of theirs
            raise cause from None
        reason = str(cause).strip() or repr(error)
        raise UserError(f"{what}: {reason.splitlines()[0][:300].rstrip(': ')}{advice}") from error


def number(kind, low, high=math.inf, count=1):
    """A type for argparse: so many numbers within [low, high], several of them not all 0."""

    def convert(text):
        values = [kind(value) for value in text.split(",")]
        in_range = all(low <= value <= high for value in values)
        if len(values) != count or not in_range or (count > 1 and not any(values)):
            wanted = f"{count} numbers" if count > 1 else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted} in [{low}, {high}]")
        return values if count > 1 else values[0]

    convert.__name__ = kind.__name__  # for argparse's own message
    return convert


COUNT, SHARE, SEED = number(int, 1, 10**7), number(float, 0, 1), number(int, 0, 2**63 - 1)
ON_OFF, PRECISIONS = argparse.BooleanOptionalAction, ("auto", "bf16", "fp16", "off")


def filled(text):
    """A type for argparse: "" would do what the command does without the flag, or worse."""
    if not text:
        raise argparse.ArgumentTypeError("nothing is given: a variable that is not set?")
    return text


def flag(group, default, text, kind=filled, **options):
    """A field of Config: its group and its line, with the source, in --help."""
    if "action" not in options:
        options["type"] = kind
    options["help"] = text if default is None else f"{text} [%(default)s]"
    return field(default=default, metadata={"group": group, "options": options})


@dataclass(frozen=True)
class Config:
    """All flags, as parsed. Nothing assigns to it; a stage, the teacher's training get a copy."""

    task: str = flag(TASK, "own", f"{', '.join(TASKS)} (no download); own files: any; paper: GLUE")
    method: str = flag(TASK, "rail-c", "a row of METHODS; ours", choices=METHODS)
    teacher: str = flag(TASK, "google-bert/bert-base-uncased", "paper: BERT-12; pro-kd: A,B,..")
    student: str = flag(TASK, "distilbert/distilbert-base-uncased", "paper: DistilBERT-6")
    data_root: str = flag(DATA, None, "DIR of clones, DIR/nyu-mll/glue; ours: the hub instead")
    train_file: str = flag(DATA, None, "csv, tsv, json lines, parquet: label, 1 or 2 of text; ours")
    validation_file: str = flag(DATA, None, "own data to evaluate on, the same columns; ours")
    max_length: int = flag(DATA, 128, "tokens of an example; ours", number(int, 4))
    max_train_examples: int = flag(DATA, 10**7, "random subset, one for all seeds; ours", COUNT)
    epochs: int = flag(TRAIN, 40, "of all stages; paper: 40", COUNT)
    first_stage: int = flag(TRAIN, None, "epochs of the first of two stages; ours: half", COUNT)
    patience: int = flag(TRAIN, 5, "epochs without a better score until it stops; ours", COUNT)
    batch_size: int = flag(TRAIN, 32, "in each process; paper: searched in 8, 16, 32", COUNT)
    lr: float = flag(TRAIN, 2e-5, "paper: searched in 1e-5, 2e-5, 5e-5, 4e-6", SHARE)
    weight_decay: float = flag(TRAIN, 0.01, "AdamW's, from two dimensions on; ours", SHARE)
    warmup: float = flag(TRAIN, 0.1, "share of a stage's steps, then linear decay; ours", SHARE)
    seed: int = flag(TRAIN, 42, "of draw, batches, dropout; paper: 5 seeds; 42: ours", SEED)
    amp: str = flag(TRAIN, "auto", "paper: mixed precision", choices=PRECISIONS)
    device: str = flag(TRAIN, None, "cpu, cuda, cuda:1, mps; ours: the fastest that is there")
    select: str = flag(LOSS, None, "instead of the method's; ours", choices=SELECTIONS)
    distance: str = flag(LOSS, None, "instead of the method's; ours", choices=DISTANCES)
    weights: list = flag(LOSS, None, "CE,KD,ILD; paper: 1/3; kd: ours", number(float, 0, 1e6, 3))
    temperature: float = flag(LOSS, 2.0, "of the KD term; ours", number(float, 1e-3, 1e3))
    max_temperature: float = flag(LOSS, None, "pro-kd's first; ours: 7", number(float, 1, 1e3))
    proj_dim: int = flag(LOSS, None, "width u of the maps; paper: 128", number(int, 1, 10**5))
    start: str = flag(LOSS, None, "of the student's maps; ours: ridge", choices=("ridge", "random"))
    shared_proj: bool = flag(LOSS, None, "one pair of maps for all; rail-l: ours", action=ON_OFF)
    teacher_proj: str = flag(LOSS, None, "its maps; ours: frozen", choices=("frozen", "trained"))
    teacher_epochs: int = flag(TEACHER, 3, "to fine-tune one without a head; ours", COUNT)
    teacher_lr: float = flag(TEACHER, 2e-5, "for the same; ours", SHARE)
    teacher_seed: int = flag(TEACHER, 42, "for the same, whatever --seed; ours", SEED)
    keep_teacher_epochs: bool = flag(TEACHER, False, "pro-kd: always; ours", action="store_true")
    teacher_labels: str = flag(TEACHER, None, "its labels in its own order, A,B,..; ours")
    teacher_cache: str = flag(TEACHER, None, "for its outputs; ours: OUTPUT_DIR/teacher-cache")
    output_dir: str = flag(OUTPUT, "runs", "results go to DIR/TASK/METHOD-seedN; ours")
    overwrite: bool = flag(OUTPUT, False, "a finished run anew; ours", action="store_true")
    report: str = flag(OUTPUT, None, "the table of the finished runs in this folder; ours")
    predict: str = flag(PREDICT, None, "a finished run's folder; answers GLUE's test split; ours")
    test_file: str = flag(PREDICT, None, "answers this instead, label not needed; ours")
    label_map: str = flag(PREDICT, None, "ANSWER=LABEL,..: what answers are called there; ours")
    max_test_examples: int = flag(PREDICT, 10**7, "random subset, one for all runs; ours", COUNT)

    @property
    def stages(self) -> list[Stage]:
        """The method's, the last one with the weights of the command line."""
        *earlier, last = METHODS[self.method].stages
        if self.distance and not METHODS[self.method].distance:  # then weights as in Eq. 4
            last = Method().stages[-1]
        if self.weights:
            last = last._replace(**dict(zip(("ce", "kd", "ild"), self.weights, strict=True)))
        return [*earlier, last]

    @property
    def stage_epochs(self) -> list[range]:
        """The epochs of each of one or two stages, counted through."""
        first = self.first_stage or self.epochs // len(self.stages)
        return [range(1, first + 1), range(first + 1, self.epochs + 1)][: len(self.stages)]

    def uses(self, *terms):
        """Is one of these fields set in any stage?"""
        return any(getattr(stage, term) for stage in self.stages for term in terms)

    @property
    def teacher_names(self):
        """A hub name, a folder, or several in training order."""
        if self.teacher is None:
            return []
        return [self.teacher] if os.path.exists(self.teacher) else self.teacher.split(",")

    @property
    def run_name(self):
        return "-".join(filter(None, (self.method, self.select, self.distance, f"seed{self.seed}")))

    @property
    def settings(self):
        """What results depend on."""
        elsewhere = ["overwrite", "report", "device", "output_dir", "teacher_cache"]
        elsewhere += [entry.name for entry in fields(self) if entry.metadata["group"] == PREDICT]
        settings = {x: y for x, y in asdict(self).items() if x not in elsewhere}
        if self.train_file:  # the same names may hold other data by now
            files = [Path(name) for name in (self.train_file, self.validation_file)]
            content = [path.read_bytes() for path in files if path.is_file()]
            settings["file contents"] = [hashlib.sha256(x).hexdigest()[:12] for x in content]
        return settings | {"format": FORMAT}


def parse(argv=None) -> Config:
    """The command line -> Config, with the toy task's own defaults. UserError: what cannot be."""
    about = {"usage": argparse.SUPPRESS, "description": __doc__.split("\n\n")[0]}  # errors: a line
    about["epilog"] = "paper: a value of the paper's; ours: it is silent there or we depart from it"
    parser = argparse.ArgumentParser("railkd.py", allow_abbrev=False, **about)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for entry in fields(Config):
        name, group = "--" + entry.name.replace("_", "-"), groups[entry.metadata["group"]]
        group.add_argument(name, default=entry.default, **entry.metadata["options"])
    known, _ = parser.parse_known_args(argv)
    if known.predict:
        parser.set_defaults(**flags_of_run(known))
    elif known.task == "toy":  # a minute instead of hours, and models of its own
        teacher, student = (str(Path(known.output_dir, "toy", x)) for x in ("teacher", "student"))
        epochs = 8 * len(METHODS[known.method].stages)
        parser.set_defaults(teacher=teacher, student=student, epochs=epochs, patience=8, lr=1e-3)
        parser.set_defaults(teacher_epochs=8, teacher_lr=1e-3)
    config = Config(**vars(parser.parse_args(argv)))
    if config.report is None:
        check_prediction(config)
    if config.report is None and config.predict is None:
        check_task(config)
        check_places(config)
        check_method(config)
    return replace(config, keep_teacher_epochs=config.keep_teacher_epochs or config.uses("anneal"))


def flags_of_run(known) -> dict:
    """For --predict: all as in that run, but no teacher."""
    config = read_results(Path(known.predict))["config"]
    flags = {x: y for x, y in config.items() if x not in ("format", "file contents")}
    if known.teacher != flags["teacher"]:  # its labels may have another order
        flags["teacher_labels"] = None
    return flags | {"student": str(Path(known.predict, "model")), "teacher": None}


def check_prediction(config):
    """What needs --predict, what needs --test-file, and what --predict does without."""
    more = config.label_map or config.max_test_examples < 10**7
    if config.predict is None:
        if config.test_file or more:
            raise UserError("--test-file, --label-map, --max-test-examples need --predict RUN")
        return
    if not config.test_file and (config.teacher or more):
        raise UserError("--label-map, --max-test-examples, --teacher need --test-file")
    if config.student != str(Path(config.predict, "model")):
        raise UserError("--predict RUN answers with the model of RUN: no --student")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--predict runs in one process: no torchrun")


def check_task(config):
    """What is to be learned: one of TASKS, or own files under a name for their folder."""
    files = (config.train_file, config.validation_file)
    is_name = re.fullmatch(r"\w[^/\\]*", config.task)
    if not is_name or any(files) != all(files) or any(files) == (config.task in TASKS):
        known = f"{', '.join(TASKS)} alone, or another name with --train-file and --validation-file"
        raise UserError(f"--task {config.task}: need {known}")


def check_places(config):
    """Teacher, student and results are in three places."""
    if config.teacher_cache == "off":
        raise UserError("--teacher-cache off is gone: the teacher's outputs are always kept")
    output = Path(config.output_dir).resolve()
    results = output / config.task / config.run_name
    student, *teachers = (Path(x).resolve() for x in (config.student, *config.teacher_names))
    if config.uses("kd", "ild") and student in teachers:
        raise UserError("teacher and student are one and the same model")
    if any(x == output or x.is_relative_to(results) for x in (student, *teachers)):
        raise UserError(f"{results} is where results go: models must lie elsewhere")


def check_method(config):
    """Combinations that cannot work."""
    row, stages, name = METHODS[config.method], config.stages, f"--method {config.method}"
    chosen = (config.select or row.select, config.distance or row.distance)
    if any((*chosen, stages[-1].ild)) and not all(chosen):
        raise UserError(f"{name}: give --select and --distance, or neither and no ILD in --weights")
    if not all(config.stage_epochs) or (config.first_stage and len(stages) == 1):
        raise UserError(f"{name} has {len(stages)} stage(s); of two, 0 < --first-stage < --epochs")
    if any((config.max_temperature, *config.teacher_names[1:])) and not config.uses("anneal"):
        raise UserError("several teachers and --max-temperature are for --method pro-kd alone")


# --------------------------------------------------------------------------------- the machine
class Machine:
    """What the machine decides: device, precision, and which of how many processes this is."""

    def __init__(self, config):
        """--device, or a GPU, Apple's mps, the CPU; under torchrun, the process group as well."""
        fastest = "mps" if torch.backends.mps.is_available() else "cpu"
        fastest = "cuda" if torch.cuda.is_available() else fastest
        name, backend = config.device or fastest, "gloo"
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        with as_user_error(f"--device {name}"):
            torch.ones(1, device=name).item()  # "meta", a device without values, has none
        self.device = torch.device(name)
        self.dtype = find_dtype(config.amp, self.device)
        self.rank = int(os.environ.get("RANK", 0))
        self.num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_num_threads(1)  # more of them wait for each other between short kernels
            backend = "cpu:gloo,cuda:nccl"
        if self.num_processes > 1 and not torch.distributed.is_initialized():
            hours = timedelta(hours=24)  # the others wait while the first one asks the teacher
            torch.distributed.init_process_group(backend, timeout=hours)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it

    def agree(self, value=None):
        """The first process's value, in all of them; the others wait for it here."""
        box = [value]
        if self.num_processes > 1:
            torch.distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]


def find_dtype(amp, device):
    """--amp; "auto": bf16 where the hardware has it, fp16 on older GPUs, else 32 bits."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if amp == "auto" and device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
        amp = "bf16" if any(abilities[name] for name in abilities if "bf16" in name) else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def keep_memory():
    """Linux: glibc gives blocks of 32 MB and more, as an embedding's gradient, back to the system
    after each step, and new pages made a step on a CPU 5 to 25 % longer. Elsewhere: nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or none
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def prepare_libraries(config):
    """Before transformers and datasets are imported: does the hub answer? And: no chatter."""
    data = config.test_file or config.data_root or config.train_file or ""
    local = all(map(os.path.exists, [data, config.student, *config.teacher_names]))
    if not local and config.task != "toy" and "HF_HUB_OFFLINE" not in os.environ:
        try:
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(hub, timeout=5).close()
        except Exception as error:  # of many kinds; 404, for one, is an answer
            if getattr(error, "code", 500) >= 500 and "CERTIFICATE" not in str(error):
                os.environ["HF_HUB_OFFLINE"] = "1"  # else they try again for minutes
    version("scikit-learn")  # an ImportError now, not after the first epoch
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else they warn of the loader's fork
    import datasets
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of each new try
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is told in one line
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


# --------------------------------------------------------------------------------------- files
def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(target, owner="", once=False):
    """A path to write a file or folder to, which replaces `target` when it is whole. `owner` keeps
    runs apart that write at once; once: if another run was first, its target stays."""
    unfinished = target.with_name(f"{target.name}{owner}.partial")
    remove(unfinished)  # of a killed run
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if unfinished.is_dir() and not once:  # a folder, unlike a file, is not replaced
            remove(target)
        try:
            unfinished.replace(target)
        except OSError:
            if not once or not target.exists():
                raise
    finally:
        remove(unfinished)  # of a full disk, of a signal


def check_writable(*folders):
    """Before hours of work. A folder need not be there yet; None is passed over."""
    for folder in map(Path, filter(None, folders)):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(f"{there}/.", os.W_OK):  # or it is a file
            raise UserError(f"{folder}: nothing can be written to {there}")


def read_results(folder):
    """results.json of a finished run."""
    path = folder / "results.json"
    if not path.exists():
        raise UserError(f"no finished run in {folder}: there is no results.json")
    with as_user_error(f"{path} is damaged: delete it and start again"):
        results = {} | json.loads(path.read_text(encoding="utf-8"))
    check_settings(f"{path} is of", {"format": FORMAT}, results.get("config"), ": --overwrite it")
    return results


def check_settings(what, now, then, advice):
    """UserError names those that differ; `then` is read from a file."""
    then = then if isinstance(then, dict) else {}
    changed = [name for name in now if name not in then or now[name] != then[name]]
    if changed:
        raise UserError(f"{what} a run with other {', '.join(changed)}{advice}")


# ---------------------------------------------------------------------------------------- data
class TaskData(NamedTuple):
    """Splits are "train" and those of `dev`."""

    task: str
    texts: dict  # split -> one or two columns, each a list of N texts
    labels: dict  # split -> (N,): class numbers, or 32-bit floats
    columns: list  # names of those of text
    names: list  # of the classes; [] for a regression
    dev: list
    fingerprint: str

    def score(self, answer) -> dict:
        """answer(split) -> logits (N, C). All metrics of all dev sets, that which selects the epoch
        first; MNLI's second set adds "_mismatched" to the names."""
        scores = {}
        for split in self.dev:
            logits, suffix = answer(split), split.removeprefix("validation").replace("_matched", "")
            answers = logits.argmax(dim=1) if self.names else logits[:, 0]
            metrics = measure(self.task, answers, self.labels[split])
            scores |= {name + suffix: value for name, value in metrics.items()}
        return scores

    @property
    def floor(self):
        """The majority baseline: the score of one answer for all."""
        labels = self.labels[self.dev[0]]
        scores = measure(self.task, labels.mode().values.expand(len(labels)), labels)
        return next(iter(scores.values()))


def toy_data(split, size):
    """Made-up reviews: the last clause decides, "not" turns it round."""
    rng, texts, labels = random.Random(f"toy {split}"), [], []
    for _ in range(size):
        clauses = []
        for _ in range(rng.randint(1, 3)):
            noun, negated, word = rng.randrange(20), rng.randrange(2), rng.randrange(60)
            clauses.append(f"the noun{noun} is {'not ' if negated else ''}word{word}")
        texts.append(" but ".join(clauses))
        labels.append("good" if (negated + word) % 2 else "bad")
    return {"text": texts, "label": labels}


def toy_model(folder, layers, width, owner=""):
    """An untrained BERT in the words of the toy task -> its folder."""
    from transformers import BertConfig, BertForMaskedLM

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the is not but".split()
    words += [f"noun{i}" for i in range(20)] + [f"word{i}" for i in range(60)]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), num_attention_heads=4, **sizes))
    with whole(Path(folder), owner, once=True) as unfinished:
        model.save_pretrained(unfinished)
        (unfinished / "vocab.txt").write_text("\n".join(words))
    return str(folder)


def read_csv(path, separator):
    """Fields are text as it stands there: "01", "NA". Blank lines are skipped. By hand, as pandas
    fills up a row with too few fields."""
    csv.field_size_limit(2**30)  # a text may be long
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for row in filter(None, reader):
                rows.append(row)
                if len(row) != len({*rows[0]} - {""}):
                    raise csv.Error("too many or too few fields, or columns of one name or none")
                if any("\t" in field and "\n" in field for field in row) and separator == "\t":
                    raise csv.Error("a quote is opened, and closed lines later")  # as in GLUE's own
        except csv.Error as error:
            advice = "a text with separators or quotes goes in quotes, its own doubled"
            raise ValueError(f"line {reader.line_num}: {error}; {advice}") from None
    return as_numbers({name: list(column) for name, *column in zip(*rows, strict=True)})


def as_numbers(table):
    """Labels of a csv that are all numbers, some with a point, are those of a regression."""
    if any("." in label for label in table.get("label", [])):
        with contextlib.suppress(ValueError):
            table["label"] = [float(label) for label in table["label"]]
    return table


def read_file(path):
    """Own data -> a `datasets.Dataset`, which keeps the names of a parquet file's classes."""
    from datasets import Dataset, load_dataset

    kind = Path(path).suffix.lower().replace(".jsonl", ".json")
    with as_user_error(f"cannot read {path}"):
        if kind not in (".csv", ".tsv", ".json", ".parquet") or not os.path.getsize(path):
            raise ValueError("it is empty, or no csv, tsv, json, jsonl, parquet file")
        if kind in (".csv", ".tsv"):
            return Dataset.from_dict(read_csv(path, "," if kind == ".csv" else "\t"))
        return load_dataset(kind[1:], data_files=path, split="train")


def read_splits(config) -> dict:
    """-> a `datasets.Dataset` for "train" and, after it, each set to evaluate on."""
    from datasets import Dataset

    if config.train_file:
        train, dev = read_file(config.train_file), read_file(config.validation_file)
        return {"train": train, "validation": dev}
    if config.task == "toy":
        train, dev = toy_data("train", 3000), toy_data("validation", 1000)
        return {"train": Dataset.from_dict(train), "validation": Dataset.from_dict(dev)}
    splits = read_glue(config)
    dev = sorted(split for split in splits if split.startswith("validation"))
    if "train" not in splits or not dev:
        raise UserError(f"{config.task}: no training or no validation data, only {[*splits]}")
    return {split: splits[split] for split in ["train", *dev]}


def read_glue(config):
    """All splits of a task: the hub's, or parquet files of a clone in --data-root."""
    from datasets import load_dataset

    folder = Path(config.data_root or "", "nyu-mll", "glue", config.task)
    advice = f"; is there {folder}/*.parquet?" if config.data_root else ADVICE
    with as_user_error(f"cannot load {config.task}", advice):
        if not config.data_root:
            return load_dataset("nyu-mll/glue", config.task)
        # left to itself the library takes both of MNLI's dev sets for one split
        names = {path.name.split("-")[0] for path in folder.glob("*.parquet")}
        files = {split: str(folder / f"{split}-*.parquet") for split in names}
        return load_dataset("parquet", data_files=files)


def load_data(config) -> TaskData:
    """Read, check and number a task's data; the training data is cut to --max-train-examples."""
    splits = read_splits(config)
    columns = text_columns(splits["train"])
    texts, words = {}, {}
    for split, dataset in splits.items():
        texts[split], words[split] = read_columns(split, dataset, columns)
    names = class_names(config.task, splits["train"].features["label"], words["train"])
    labels = {split: number_labels(split, words[split], names) for split in words}
    rows = subset(len(words["train"]), config.max_train_examples)
    texts["train"] = [[column[row] for row in rows] for column in texts["train"]]
    labels["train"] = labels["train"][rows]
    if len(labels["train"].unique()) < 2:
        raise UserError(f"train: no label but {words['train'][rows[0]]}, nothing to learn")
    kind = f"{len(names)} classes" if names else "a regression"
    print(f"data     {len(rows)} training examples of {' and '.join(columns)}, {kind}")
    content = json.dumps([texts, names, *(x.tolist() for x in labels.values())])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()[:12]
    return TaskData(config.task, texts, labels, columns, names, [*splits][1:], fingerprint)


def text_columns(dataset):
    return [name for name in dataset.column_names if name not in ("label", "idx", "id")]


def subset(size, most):
    """At most so many rows, drawn at random, the same in all runs, in the file's order."""
    return sorted(random.Random("subset").sample(range(size), min(size, most)))


def read_columns(split, dataset, columns):
    """-> the columns of text, and the labels, as words where the file numbers its classes."""
    table = dataset.to_dict()
    kinds = {name: sorted({type(x).__name__ for x in table[name]}) for name in table}
    is_label = {"str", "int", "float", "bool"}.issuperset(kinds.get("label") or ["none"])
    texts = [kinds.get(column) for column in columns]
    if not is_label or texts not in ([["str"]], [["str"], ["str"]]):
        wanted = "rows of label and one or two columns of text needed"
        raise UserError(f"{split}: {wanted}, not {kinds}")
    words = dict(enumerate(getattr(dataset.features["label"], "names", [])))
    return [table[column] for column in columns], [words.get(x, x) for x in table["label"]]


def class_names(task, feature, labels):
    """A file's own, or numbers by size, then words; [] for floats: a regression."""
    found = {str(label) for label in labels} - {""}
    numbers = sorted((x for x in found if x.isdecimal()), key=lambda x: (int(x), x))  # 1, 01
    names = [*numbers, *sorted(found.difference(numbers))]
    if any(isinstance(label, float) for label in labels):
        names = []
    names = getattr(feature, "names", names)
    if not found.issuperset(names):
        raise UserError(f"train: no label but {sorted(found)}; known: {names}")
    if task in TASKS and len(names) != {"stsb": 0, "mnli": 3}.get(task, 2):
        raise UserError(f"labels {names or 'numbers'} are not those of {task}")
    return names


def number_labels(split, labels, names):
    """-> (N,). UserError for a label that is not known."""
    with as_user_error(f"{split}: known labels are {str(names or 'numbers')[:200]}, not"):
        if names:
            numbers = {name: i for i, name in enumerate(names)}
            return torch.tensor([numbers[str(label)] for label in labels])
        values = torch.tensor([float(label) for label in labels])
        strange = values[~values.isfinite()].tolist()
        if strange:
            raise ValueError(f"'{strange[0]}'")
        return values


# -------------------------------------------------------------------------------------- models
class Encoder:
    """An encoder with a head for the task and its own tokenizer, from the hub or a folder. Role
    "student": its head is new unless it has one of this size; others are used as they are."""

    def __init__(self, role, name, labels, machine):
        """No code of a model is run. UserError: no encoder, or not whole."""
        import transformers as hf

        answers, options = labels or ["score"], {"trust_remote_code": False}
        advice = "" if os.path.exists(name) else ADVICE
        if os.path.exists(f"{name}/model"):  # of a run, or of a teacher we tuned
            advice = f"; is it {name}/model?"
        with as_user_error(f"cannot load the {role} {name}", advice):
            config = hf.AutoConfig.from_pretrained(name, **options)
            config.output_attentions, config.return_dict = False, True
            config._attn_implementation = None  # the library's own: a name may be that of code
            has_head = role != "student" and "SequenceClassification" in str(config.architectures)
            if not has_head:
                config.id2label = dict(enumerate(answers))
                config.label2id = {answer: i for i, answer in enumerate(answers)}
                config.problem_type = None if labels else "regression"
            tokenizer = hf.AutoTokenizer.from_pretrained(name, **options)
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            load = hf.AutoModelForSequenceClassification.from_pretrained
            model, info = load(name, config=config, **options)
            self.has_trained_head = check_encoder(model, tokenizer, info) and has_head
        if model.num_labels != len(answers):
            raise UserError(f"{name} has {model.num_labels} labels, the task has {len(answers)}")
        self.name, self.model, self.tokenizer = name, model.float().to(machine.device), tokenizer
        self.order = slice(None)  # of its labels
        self.collate = hf.DataCollatorWithPadding(tokenizer)  # pads to the longest of a batch
        self.inputs = inspect.signature(model.forward).parameters  # DistilBERT: no token_type_ids
        self.num_layers, self.width = model.config.num_hidden_layers, model.config.hidden_size
        self.num_params = model.num_parameters()
        size = f"{self.num_layers} x {self.width}, {self.num_params / 1e6:.2f} M parameters"
        self.title = f"{name} ({model.config.model_type}, {size})"

    def run(self, batch, machine, share=None):
        """Tokens -> logits (B, C) in 32 bits, hidden states (B, L, d) each, mask (B, L). Share: the
        word embeddings are mixed with those of the reversed batch, masks united (CR-ILD)."""
        inputs = {name: batch[name] for name in batch if name in self.inputs}
        with torch.autocast(machine.device.type, machine.dtype, machine.dtype != torch.float32):
            if share is not None:
                words = self.model.get_input_embeddings()(inputs.pop("input_ids"))  # (B, L, d)
                inputs["inputs_embeds"] = share * words + (1 - share) * words.flip(0)
                inputs["attention_mask"] = batch["attention_mask"] | batch["attention_mask"].flip(0)
            output = self.model(**inputs, output_hidden_states=True)
        return output.logits.float()[:, self.order], output.hidden_states, inputs["attention_mask"]


def check_encoder(model, tokenizer, info) -> bool:
    """Is nothing missing? ValueError: more than head and pooler is, or the tokenizer is wrong."""
    import transformers as hf

    config, base = model.config, f"{model.base_model_prefix}."
    fresh = [str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])]
    lost = [name for name in fresh if base in name and "pooler" not in name]
    known = type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    if not all((known, takes_mask)):
        raise ValueError(f"{config.model_type} is no encoder with a mask of its tokens")
    if lost:
        raise ValueError(f"{len(lost)} weights missing")
    few, words = len(tokenizer.all_special_ids), len(tokenizer)
    if not tokenizer.pad_token or not few < words <= config.vocab_size:
        raise ValueError(f"a tokenizer that does not fit: {words} words, not {config.vocab_size}")
    return not fresh


def tokenize(encoder, texts, max_length):
    """One or two columns of texts, cut to what the encoder allows -> a `datasets.Dataset`."""
    from datasets import Dataset

    positions = getattr(encoder.model.config, "max_position_embeddings", 10**9)
    longest = encoder.tokenizer.model_max_length
    if longest > positions:  # it knows of no limit; RoBERTa's positions begin at 2
        longest = positions - 2
    cut = {"truncation": True, "max_length": min(max_length, longest), "return_length": True}
    table = Dataset.from_dict({str(i): column for i, column in enumerate(texts)})
    options = {"input_columns": table.column_names, "remove_columns": table.column_names}
    options |= {"batched": True, "fn_kwargs": cut, "new_fingerprint": "cut"}  # no hash of its own
    return table.map(encoder.tokenizer, **options)


@torch.no_grad()
def read_all(encoder, tokens, machine, pool=None, layers=()):
    """In eval mode, on the CPU: logits (N, C), and those layers pooled (N, k, d)."""
    order = torch.tensor(tokens["length"][:]).argsort(stable=True)  # batches with little padding
    encoder.model.eval()
    logits, pooled = [], []
    for batch in order.split(64):
        inputs = encoder.collate(tokens[batch.tolist()]).to(machine.device)
        with as_user_error(f"{encoder.name} does not work here", kind=ValueError):
            batch_logits, hidden, mask = encoder.run(inputs, machine)
            states = [pool(hidden[i], mask).cpu() for i in layers]
        logits.append(batch_logits.cpu())
        pooled.append(torch.stack(states, dim=1) if states else torch.empty(len(batch), 0))
    back = order.argsort()
    return torch.cat(logits)[back], torch.cat(pooled)[back]


# ------------------------------------------------------------------------ the teacher's outputs
# What the frozen teacher says of a split is computed once, into a folder: logits.npy (N, C) in 32
# bits and, if its layers are wanted, pooled.npy (N, n, d_t) in 16 bits, of blocks 1..n.
def read_outputs(folder, rows, layers=None) -> Tensor:
    """Logits (B, C), or pooled states (B, k, d_t) of those layers; nothing else is read."""
    import numpy as np

    path, where = folder / "logits.npy", rows.numpy()
    if layers is not None:
        path, where = folder / "pooled.npy", np.ix_(where, np.array(layers) - 1)
    with as_user_error(f"{path} is damaged: delete its folder"):
        # opened anew each time, for 0.1 ms: a memory map sent to a worker copies its data
        return torch.from_numpy(np.load(path, mmap_mode="r")[where])


def ask_teacher(teacher, texts, pool, config, machine) -> Path:
    """The folder of its outputs, which the first process makes, unless an earlier run has. Its name
    is a hash of all that they depend on: what has changed never meets old outputs."""
    tokens = tokenize(teacher, texts, config.max_length)
    content = [FORMAT, pool and pool.__name__, str(machine.dtype), str(teacher.model.config)]
    content += [teacher.tokenizer.padding_side, str(teacher.order)]
    key = hashlib.sha256(json.dumps(content).encode())
    for batch in tokens.iter(1000):
        key.update(json.dumps(batch).encode())
    for tensor in teacher.model.state_dict().values():
        key.update(tensor.cpu().contiguous().numpy())
    cache = config.teacher_cache or Path(config.output_dir, "teacher-cache")
    folder = Path(cache, key.hexdigest()[:16])
    if machine.rank == 0 and not folder.exists():
        run = os.path.realpath(config.output_dir) + config.task + config.run_name
        owner = "-" + hashlib.sha256(os.fsencode(run)).hexdigest()[:8]
        with whole(folder, owner, once=True) as unfinished:
            write_outputs(unfinished, teacher, tokens, pool, machine)
    machine.agree()
    read_outputs(folder, torch.arange(1), [1] if pool else None)  # damage is told here
    return folder


def write_outputs(folder, teacher, tokens, pool, machine):
    """By ordinary writes: through a memory map a full disk is a crash without a word."""
    import numpy as np
    from tqdm import tqdm

    logits, layers = [], range(1, teacher.num_layers + 1) if pool else ()
    shape = len(tokens), len(layers), teacher.width
    if pool:
        print(f"cache    {math.prod(shape) * 2 / 1e6:.1f} MB for {folder.parent}", flush=True)
    folder.mkdir()
    with open(folder / "pooled.npy" if pool else os.devnull, "wb") as file:  # no layers: to nowhere
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(tokens), 2048), "teacher", leave=False, disable=None):
            chunk = tokens.select(range(start, min(start + 2048, len(tokens))))
            chunk_logits, pooled = read_all(teacher, chunk, machine, pool, layers)
            logits.append(chunk_logits)
            file.write(pooled.clamp(-65504, 65504).half().numpy().tobytes())  # 16 bits' range
    np.save(folder / "logits.npy", torch.cat(logits).numpy())


# ------------------------------------------------------------------------------------- batches
class TrainingSet(Dataset):
    """Request -> a step's batch, on the CPU. A request is rows (B,), the teacher's layers, or None,
    and its checkpoint, or None: a worker that lives on sees what has changed from it alone."""

    def __init__(self, student, tokens, data, outputs=()):
        self.tokens, self.collate, self.outputs = tokens, student.collate, outputs
        self.labels, self.fingerprint = data.labels["train"], data.fingerprint
        self.lengths = torch.tensor(tokens["length"][:])  # (N,)

    def __getitem__(self, request):
        rows, layers_t, checkpoint = request
        batch = {**self.collate(self.tokens[rows.tolist()]), "rows": rows}
        batch["gold"] = self.labels[rows]  # to "labels" the model would add a loss of its own
        if checkpoint is not None:
            batch["logits_t"] = read_outputs(self.outputs[checkpoint], rows)
        if layers_t is not None:
            batch["pooled_t"] = read_outputs(self.outputs[-1], rows, layers_t)
        return batch

    def draw(self, size, seed, epoch, machine):
        """Rows in batches of like length, in an order that depends on seed and epoch alone -> this
        process's share of each. Shares are equal: the epoch's start fills up the last batch."""
        key = random.Random(f"batches {seed} {epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(key)
        rows = torch.randperm(len(self.lengths), generator=generator)
        if machine.num_processes > 1:
            num_rows = math.ceil(len(rows) / size) * size  # whole batches alone
            rows = rows.repeat(math.ceil(num_rows / len(rows)))[:num_rows]
        batches = []
        for part in rows.split(50 * size):
            batches += part[self.lengths[part].argsort(stable=True)].split(size)
        order = torch.randperm(len(batches), generator=generator)
        return [batches[i][machine.rank :: machine.num_processes] for i in order]


def reset_signals(worker):
    """The training process decides what Ctrl-C means, and ends its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_loader(training_set, requests, machine):
    """One for all epochs, as starting workers takes seconds: the list `requests` is refilled."""
    options = {"sampler": requests, "batch_size": None}  # a request is a batch
    options["generator"] = torch.Generator()  # else every epoch draws from the global one
    if machine.device.type == "cuda":  # training on a CPU needs all its cores
        options |= {"num_workers": 2, "persistent_workers": True, "pin_memory": True}
    return DataLoader(training_set, worker_init_fn=reset_signals, **options)


# ------------------------------------------------------------------------------------ training
def mixup_loss(mixed: Tensor, clean: Tensor, share: float) -> Tensor:
    """CR-ILD's consistency (Ko et al., 2023): squared distance of unit states (B, m, d) of mixed
    inputs, a share of each text and the rest of the reversed batch's, from both clean ones."""
    mixed, clean = unit(mixed), unit(clean).detach()
    to_own = (mixed - clean).square().sum(-1).mean()
    to_other = (mixed - clean.flip(0)).square().sum(-1).mean()
    return share * to_own + (1 - share) * to_other  # as near to each text as it has of it


class Objective(nn.Module):
    """What a stage trains, and Eq. 4: loss = w_ce CE + w_kd KD + w_ild ILD (+ w_mix MIX)."""

    def __init__(self, number, stage, epochs, student, config, machine, num_checkpoints, ild):
        super().__init__()
        self.number = number  # of the stage, for the log
        self.student, self.stage, self.epochs, self.machine = student, stage, epochs, machine
        self.model, self.ild = student.model, ild if stage.ild else None
        self.temperature, self.num_checkpoints = config.temperature, num_checkpoints
        self.max_temperature = (config.max_temperature or 7.0) if stage.anneal else None
        self.checkpoint = num_checkpoints - 1 if stage.kd else None  # the last in training order
        self.layers_t = None

    def set_epoch(self, epoch):
        """All that changes by epoch: the draw, whose logits are followed, how softly, mix-up."""
        past, length = epoch - self.epochs.start, len(self.epochs)  # past: 0..E-1
        self.progress = (past + 1) / length  # CR-ILD: e / E
        if self.stage.anneal:  # Pro-KD: checkpoints in order; the temperature falls to 1
            self.checkpoint = past * self.num_checkpoints // length
            self.temperature = 1 + (self.max_temperature - 1) * (1 - past / max(1, length - 1))
        if self.ild:
            self.ild.set_epoch(epoch)
            self.layers_t = self.ild.layers_t

    def forward(self, batch):
        """A batch of TrainingSet -> the loss and, detached, its terms, unweighted."""
        logits_s, hidden_s, mask_s = self.student.run(batch, self.machine)
        labels = batch["gold"]
        fit = F.mse_loss if labels.is_floating_point() else F.cross_entropy
        terms = {"ce": fit(logits_s.squeeze(1), labels)}  # a regression's (B, 1) -> (B,)
        if "logits_t" in batch:
            logits_t = batch["logits_t"]
            terms["kd"] = kd_loss(logits_s, logits_t, self.temperature, self.max_temperature)
        if self.ild:
            slots = self.ild.layers_s, self.ild.num_layers_s
            pooled_s = self.ild.pool(hidden_s, mask_s, *slots)
            terms["ild"] = self.ild.distance(pooled_s, batch["pooled_t"], batch["rows"], labels)
        if self.ild and self.stage.mix:
            share = 0.5 + abs(torch.rand(()).item() - 0.5)  # max(b, 1 - b), b of Beta(1, 1)
            _, hidden, mask = self.student.run(batch, self.machine, share)
            mixed = self.ild.pool(hidden, mask, *slots)
            terms["mix"] = self.progress * mixup_loss(mixed, pooled_s, share)
        weights = self.stage._asdict()
        loss = sum(weights[name] * terms[name] for name in terms if weights[name])  # Eq. 4
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def make_parts(objective, config, machine, num_steps):
    """All that has a state. No weight decay for biases and norms, of one dimension."""
    from transformers import get_linear_schedule_with_warmup

    params = [p for p in objective.parameters() if p.requires_grad]
    flat = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
    other = {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW([other, flat], lr=config.lr, fused=True)
    warmup = round(config.warmup * num_steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, num_steps)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    return {"objective": objective, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}


def load_checkpoint(path, facts, parts) -> list:
    """The state after the last whole epoch -> its rows. Each epoch has a random seed of its own."""
    if not path.exists():
        return []
    with as_user_error(f"{path} is damaged: delete it and start again"):
        content = {} | torch.load(path, map_location="cpu", weights_only=True)
    check_settings(f"{path} is of", facts, content.get("facts"), ": pass the same, or delete it")
    with as_user_error(f"{path} does not fit: delete it and start again"):
        for name, part in parts.items():
            part.load_state_dict(content[name])
    print(f"resumed after epoch {content['rows'][-1]['epoch']}", flush=True)
    return content["rows"]


def save_checkpoint(folder, log, checkpoint):
    """In this order: a run that is killed in between makes the epoch again."""
    with whole(folder / "log.jsonl") as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in log))
    buffer = io.BytesIO()  # straight to a file torch.save aborts, where Ctrl-C meets its end
    torch.save(checkpoint, buffer)
    with whole(folder / "checkpoint.pt") as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def save_models(folder, student, rows, keep, machine):
    """The last epoch's, if it is the best or all are kept. After its checkpoint, and first of all
    in a run that goes on: it may have been killed in between."""
    if not rows or machine.rank > 0:
        return
    best = max(rows, key=lambda row: row["score"])
    wanted = {"model": best is rows[-1], f"epoch-{rows[-1]['epoch']:03}": keep}
    for name in wanted:
        if wanted[name]:
            with whole(folder / name) as unfinished:
                student.model.save_pretrained(unfinished)
                student.tokenizer.save_pretrained(unfinished)


def train_epoch(net, loader, parts, machine, epoch):
    """One pass over the training data -> loss and terms, means over all examples, and the time."""
    from tqdm import tqdm

    optimizer, scaler = parts["optimizer"], parts["scaler"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    began, sums, count = time.perf_counter(), 0.0, 0
    pinned = machine.device.type == "cuda"  # else a copy that does not wait may read freed memory
    net.train()
    bar = tqdm(loader, f"epoch {epoch}", leave=False, disable=machine.rank > 0 or None)
    for step, batch in enumerate(bar, 1):
        batch = {name: x.to(machine.device, non_blocking=pinned) for name, x in batch.items()}
        terms = net(batch)
        scaler.scale(terms["loss"]).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        parts["schedule"].step()
        optimizer.zero_grad()
        sums = sums + torch.stack([*terms.values()]).detach() * len(batch["rows"])
        count += len(batch["rows"])
        is_checked = step % 50 == 0 or step == len(loader)  # not always: the device is waited for
        if is_checked and not sums.isfinite().all():
            found = describe(dict(zip(terms, (sums / count).tolist(), strict=True)))
            where = f"epoch {epoch}, step {step}"
            raise UserError(f"{where}: {found}: lower --lr? The best epoch so far stays")
    if machine.num_processes > 1:  # of equal shares
        torch.distributed.all_reduce(sums)
        count *= machine.num_processes
    means = dict(zip(terms, (sums / count).tolist(), strict=True))
    seconds = time.perf_counter() - began
    times = {"seconds": seconds, "examples_per_s": count / seconds}
    return dict.fromkeys(["loss", "ce", "kd", "ild", "mix"]) | means | times


def train(objective, training_set, evaluate, config, machine, folder, earlier=(), keep=False):
    """One stage: for each epoch draw, train, evaluate, save: the best model (keep: each), the log,
    and checkpoint.pt, from which the same call goes on. -> the rows of all stages so far."""
    net, requests = objective, []
    if machine.num_processes > 1:
        # static: what has no gradient, as the head in a stage of no logits, never has one
        net = nn.parallel.DistributedDataParallel(objective, static_graph=True)
    loader = make_loader(training_set, requests, machine)
    size = config.batch_size * machine.num_processes
    num_steps = math.ceil(len(training_set.lengths) / size) * len(objective.epochs)
    parts = make_parts(objective, config, machine, num_steps)
    facts = config.settings | {"data": training_set.fingerprint, "precision": str(machine.dtype)}
    facts["processes"] = machine.num_processes
    facts["teacher's outputs"] = [path.name for path in training_set.outputs]
    rows = load_checkpoint(folder / "checkpoint.pt", facts, parts)
    save_models(folder, objective.student, rows, keep, machine)
    for epoch in objective.epochs[len(rows) :]:
        best = max(rows, key=lambda row: row["score"], default={"score": -math.inf, "epoch": epoch})
        if epoch - best["epoch"] > config.patience:
            print(f"stopped: nothing better for {config.patience} epochs", flush=True)
            break
        torch.manual_seed(random.Random(f"{config.seed} {epoch} {machine.rank}").getrandbits(63))
        objective.set_epoch(epoch)
        batches = training_set.draw(size, config.seed, epoch, machine)
        requests[:] = [(batch, objective.layers_t, objective.checkpoint) for batch in batches]
        row = {"epoch": epoch, "stage": objective.number, "layers_t": objective.layers_t}
        row |= train_epoch(net, loader, parts, machine, epoch)
        row = machine.agree(row | evaluate() if machine.rank == 0 else None)
        rows.append(row)
        if machine.rank == 0:
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            checkpoint |= {"facts": facts, "rows": rows}
            save_checkpoint(folder, [*earlier, *rows], checkpoint)
        save_models(folder, objective.student, rows, keep, machine)
        told = describe(row | row["metrics"], ("stage", "examples_per_s", "metrics", "score"))
        print(told, "*" if row["score"] > best["score"] else "", flush=True)
    return [*earlier, *rows]


def describe(values, without=()):
    """One line: what is there, rounded."""
    shown = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in values.items()}
    return "  ".join(f"{x} {shown[x]}" for x in shown if shown[x] is not None and x not in without)


# ---------------------------------------------------------------------------------- evaluation
def measure(task, answers, labels) -> dict:
    """The task's metrics of answers (N,) against labels (N,), that which selects the epoch first;
    0 where one is undefined (constant answers)."""
    import pandas
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if labels.is_floating_point():
        table = pandas.DataFrame({"label": labels.numpy(), "answer": answers.numpy()})
        tables = {name: table.corr(name, min_periods=len(table)) for name in TASKS["stsb"]}
        return {name: float(tables[name].fillna(0.0).loc["label", "answer"]) for name in tables}
    scores = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
    names = TASKS.get(task, ["accuracy"])
    return {name: float(scores[name](labels.numpy(), answers.numpy())) for name in names}


def mean_cosine(encoder, tokens, machine, pool, layers):
    """The alarm for a collapse: mean cosine of the pooled states of different examples, over the
    layers in use; 1 where all point one way. On up to 256 examples; 0 if there is but one."""
    tokens = tokens.select(range(0, len(tokens), math.ceil(len(tokens) / 256)))
    states = unit(read_all(encoder, tokens, machine, pool, layers)[1])  # (n, m, d)
    n = len(states)
    all_pairs = states.mean(0).square().sum(-1).mean().item()
    return (n * all_pairs - 1) / max(1, n - 1)  # without those of an example with itself


# --------------------------------------------------------------------------------- the teacher
def load_teacher(name, labels, config, machine) -> Encoder:
    """One of the command line; --teacher-labels puts its logits into the task's order."""
    teacher, theirs = Encoder("teacher", name, labels, machine), config.teacher_labels
    if (config.predict or config.teacher_names[1:]) and not teacher.has_trained_head:
        raise UserError(f"the teacher {teacher.title} has no head for the task")
    if theirs and teacher.has_trained_head and name in config.teacher_names:
        if sorted(theirs.split(",")) != sorted(labels):
            raise UserError(f"--teacher-labels: name each label once, they are {labels}")
        teacher.order = [theirs.split(",").index(label) for label in labels]
    return teacher


def plan_tuning(data, config, machine):
    """-> the flags that fine-tuning a teacher depends on, and the folder that all runs share. A
    model that is changed under the same name is not noticed."""
    common = ("teacher", "max_length", "weight_decay", "warmup", "keep_teacher_epochs")
    options = {name: getattr(config, name) for name in common}
    options |= {"epochs": config.teacher_epochs, "patience": config.teacher_epochs}
    options |= {"lr": config.teacher_lr, "seed": config.teacher_seed}
    tuning = Config(method="none", **options)
    content = json.dumps([tuning.settings, data.fingerprint, str(machine.dtype)])
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    name = f"teacher-{Path(config.teacher_names[-1]).name}-{key}"
    return tuning, Path(config.output_dir, config.task, name)


def tune_teacher(teacher, data, tuning, machine, work, folder) -> Encoder:
    """Give it a head for the task. A training that was stopped goes on in its folder `work`."""
    print(f"teacher  {teacher.title} has no head: fine-tuned for {folder}", flush=True)
    if machine.rank == 0 and not (work / "checkpoint.pt").exists():
        remove(work)  # without a checkpoint nothing can go on
    tuning = replace(tuning, batch_size=max(1, tuning.batch_size // machine.num_processes))
    train_stages(teacher, data, tuning, machine, work, keep=tuning.keep_teacher_epochs)
    if machine.rank == 0:
        remove(work / "checkpoint.pt")
        with contextlib.suppress(OSError):  # another run was faster
            work.rename(folder)
    machine.agree()
    return Encoder("teacher", str(folder / "model"), data.names, machine)


def check_label_order(answers, labels, names):
    """UserError where the teacher would be right far more often with its labels reordered: 0 may be
    contradiction to a hub teacher for MNLI, and is entailment in GLUE. answers, labels: (N,)."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import confusion_matrix

    share = confusion_matrix(labels, answers, labels=range(len(names))) / len(labels)
    rows, columns = linear_sum_assignment(-share)  # for label rows[i] it answers columns[i]
    now, then = share.trace(), share[rows, columns].sum()
    if then > now + 0.1 and len(answers.unique()) > 1:
        order = ",".join(names[row] for row in columns.argsort())
        found = f"the teacher's dev accuracy is {now:.3f}, with its labels reordered {then:.3f}"
        raise UserError(f"{found}: pass --teacher-labels {order} (or the right order)")


def score_teacher(teacher, data, config, machine) -> dict:
    """What results.json says of it. On dev the order of a given teacher's labels is checked."""
    answers, dev = {}, data.dev[0]
    for split in data.dev:
        folder = ask_teacher(teacher, data.texts[split], None, config, machine)
        answers[split] = read_outputs(folder, torch.arange(len(data.labels[split])))
    metrics = data.score(answers.get)
    told = f"{describe(metrics)}; majority baseline {data.floor:.4f}"
    print(f"teacher  {teacher.title}; {told}", flush=True)
    if data.names and not config.teacher_labels and teacher.name in config.teacher_names:
        check_label_order(answers[dev].argmax(dim=1), data.labels[dev], data.names)
    score = next(iter(metrics.values()))
    if score <= data.floor + 0.01:
        print("WARNING: the teacher is no better than the majority baseline; untrained?")
    facts = {"teacher": teacher.name, "params_t": teacher.num_params}
    return facts | {"teacher_score": score, "teacher_metrics": metrics}


def ask_checkpoints(teacher, data, config, machine) -> list[Path]:
    """Its outputs on the training data or, for Pro-KD, those of each of its checkpoints in training
    order, the epochs of our own fine-tuning or the models of the command line."""
    names, pool = [*config.teacher_names[:-1], teacher.name], METHODS[config.method].pool
    if config.uses("anneal"):
        if teacher.name not in config.teacher_names:  # of our own fine-tuning
            names = sorted(map(str, Path(teacher.name).parent.glob("epoch-*"))) or names
        alone = "" if names[1:] else ", alone: Annealing-KD"
        print(f"{len(names)} checkpoint(s) of the teacher{alone}", flush=True)
        pool = pool if config.uses("ild") else None  # else with states: one cache for all methods
    folders = []
    for name in names:
        encoder = teacher
        if name != teacher.name:
            encoder = load_teacher(name, data.names, config, machine)
        folders.append(ask_teacher(encoder, data.texts["train"], pool, config, machine))
    return folders


def make_loss(student, teacher, num_examples, config, machine) -> IntermediateLoss:
    """The method's, with the options of the command line."""
    names = ("select", "distance", "proj_dim", "teacher_proj", "start")
    options = {name: getattr(config, name) for name in names} | {"shared": config.shared_proj}
    options = {name: value for name, value in options.items() if value is not None}
    if DISTANCES[config.distance or METHODS[config.method].distance] is ContrastiveDistance:
        options["num_examples"] = num_examples
        if machine.num_processes > 1:
            raise UserError("a memory bank works in one process alone: no torchrun")
    blocks, widths = (student.num_layers, teacher.num_layers), (student.width, teacher.width)
    torch.manual_seed(config.seed)
    what = f"--method {config.method}, {blocks[1]} blocks to {blocks[0]}"
    with as_user_error(what, kind=ValueError):
        return IntermediateLoss(config.method, *blocks, *widths, config.seed, **options)


def start_maps(ild, student, outputs, data, config, machine):
    """The ridge start, on up to 2,000 training examples."""
    size = len(data.labels["train"])
    rows = random.Random("ridge").sample(range(size), min(2000, size))
    texts = [[column[row] for row in rows] for column in data.texts["train"]]
    tokens = tokenize(student, texts, config.max_length)
    pooled_s = read_all(student, tokens, machine, ild.pool_tokens, ild.layers_s)[1]
    pooled_t = read_outputs(outputs, torch.tensor(rows), range(1, ild.num_layers_t + 1))
    ild.fit_pooled(pooled_s, pooled_t.float())
    ild.to(machine.device)


def consult_teacher(student, data, config, machine, work):
    """-> what results.json says of it, its outputs on the training data (of each checkpoint), and
    the loss between layers, ready to train."""
    if not config.uses("kd", "ild"):
        none = {"teacher": None, "params_t": None, "teacher_score": None, "teacher_metrics": {}}
        return none, [], None
    tuning, folder = plan_tuning(data, config, machine)
    is_tuned = machine.agree(folder.exists())
    torch.manual_seed(config.teacher_seed)  # draws the head, if there is none
    name = str(folder / "model") if is_tuned else config.teacher_names[-1]
    teacher, ild = load_teacher(name, data.names, config, machine), None
    if config.uses("ild"):  # before hours of tuning: teacher and student may not fit
        ild = make_loss(student, teacher, len(data.labels["train"]), config, machine)
    if not teacher.has_trained_head:
        teacher = tune_teacher(teacher, data, tuning, machine, work, folder)
    results = score_teacher(teacher, data, config, machine)
    outputs = ask_checkpoints(teacher, data, config, machine)
    teacher.model.requires_grad_(False).to("cpu")  # from here on its outputs are all we need
    if ild:
        start_maps(ild, student, outputs[-1], data, config, machine)
    return results, outputs, ild


# --------------------------------------------------------------------------------- predictions
def predict(config) -> dict:
    """A finished student's answers to --test-file, else to its task's test split. -> the content of
    predictions.json, or nothing."""
    prepare_libraries(config)
    machine, results = Machine(config), read_results(Path(config.predict))
    task = results["task"]
    if config.task != task:
        raise UserError(f"{config.predict} is a run of {task}")
    labels = results["labels"] or []  # none: a regression
    student = Encoder("model", config.student, labels, machine)
    if not student.has_trained_head:
        raise UserError(f"{config.student} is damaged: it has no whole head")
    if config.test_file:
        return predict_file(student, labels, results["columns"], config, machine)
    if task not in SERVER:
        raise UserError(f"{task} has no test split: give --test-file")
    return predict_test(student, labels, config, machine)


def predict_test(student, names, config, machine) -> dict:
    """submission/, as the GLUE server takes it: words for mnli, qnli, rte, else numbers."""
    files, splits, folder = SERVER[config.task], read_glue(config), Path(config.predict)
    if not files.keys() & splits.keys():
        raise UserError(f"{config.task}: no test split, only {[*splits]}")
    called = names if config.task in ("mnli", "qnli", "rte") else range(len(names))
    with whole(folder / "submission") as unfinished:
        unfinished.mkdir()
        for split, name in files.items():
            if split not in splits:
                print(f"left out {name}.tsv: there is no {split}")
                continue
            texts = read_columns(split, splits[split], text_columns(splits[split]))[0]
            table = answer(student, texts, called, config, machine)
            table = table[["prediction"]] if names else table.clip(0, 5)
            path = unfinished / f"{name}.tsv"
            table.to_csv(path, sep="\t", index_label="index", float_format="%.3f")
    print(f"answers  {folder / 'submission'}")
    return {}


def predict_file(student, names, columns_train, config, machine) -> dict:
    """predictions.tsv: to each example the model's answer, as the file calls it, and that answer's
    own probability. With labels in the file predictions.json, the metrics, and --teacher's."""
    path, folder = config.test_file, Path(config.predict)
    rows, texts, words = read_test_file(path, columns_train, config.max_test_examples)
    if config.teacher and not words:
        raise UserError(f"{path} has no labels, which --teacher needs")
    called = read_label_map(config.label_map, names)
    classes = list(dict.fromkeys(called))  # several answers may share a label
    labels = number_labels(f"{path} (--label-map?)", words, classes) if words else None
    encoders = {"student": student}
    if config.teacher:
        encoders["teacher"] = load_teacher(config.teacher, names, config, machine)
    tables = {x: answer(encoders[x], texts, called, config, machine) for x in encoders}
    remove(folder / "predictions.json")  # of another file
    with whole(folder / "predictions.tsv") as unfinished:
        table = tables["student"].set_axis(rows)
        table.to_csv(unfinished, sep="\t", index_label="index", float_format="%.4f")
    print(f"answers  {folder / 'predictions.tsv'}")
    found = {"file": path, "n": len(rows)}
    if words:
        for role, table in tables.items():
            answers = number_labels(path, table["prediction"], classes)
            metrics = measure(config.task, answers, labels)
            found["metrics" if role == "student" else "teacher_metrics"] = metrics
            print(f"{role}  {describe(metrics)}")
        with whole(folder / "predictions.json") as unfinished:
            unfinished.write_text(json.dumps(found, indent=1))
    return found


def read_test_file(path, columns_train, most):
    """-> numbers of the rows, the columns of text, and the labels; None: there are none, or hidden
    ones, which GLUE calls -1."""
    dataset = read_file(path)
    columns = text_columns(dataset)
    if sorted(columns) == sorted(columns_train):
        columns = columns_train  # in their order
    if len(columns) != len(columns_train):
        raise UserError(f"{path}: columns of text {columns_train} needed, not {columns}")
    if "label" not in dataset.column_names:
        dataset = dataset.add_column("label", [-1] * len(dataset))
    rows = subset(len(dataset), most)
    texts, words = read_columns(path, dataset.select(rows), columns)
    return rows, texts, None if {*words} <= {-1, "-1"} else words


def read_label_map(text, names) -> list:
    """--label-map -> what each of the model's answers, in their order, is called in the file."""
    if text is None:
        return names
    pairs = [pair.strip().partition("=")[::2] for pair in text.split(",")]
    if sorted(x for x, _ in pairs) != sorted(names) or not all(label for _, label in pairs):
        raise UserError(f"--label-map: ANSWER=LABEL,.. for each of {names or 'none'}")
    return [dict(pairs)[name] for name in names]


def answer(encoder, texts, called, config, machine):
    """-> a `pandas.DataFrame`: prediction and, unless it is a regression, its probability."""
    import pandas

    logits = read_all(encoder, tokenize(encoder, texts, config.max_length), machine)[0]
    if not called:
        return pandas.DataFrame({"prediction": logits[:, 0].tolist()})
    chances, numbers = logits.softmax(dim=1).max(dim=1)
    words = [called[number] for number in numbers]
    return pandas.DataFrame({"prediction": words, "probability": chances.tolist()})


# ------------------------------------------------------------------------------------- the run
def run(config) -> dict:
    """Distil, or, where that is done already, tell the stored results again."""
    folder = Path(config.output_dir, config.task, config.run_name)
    if config.overwrite or not (folder / "results.json").exists():
        distil(config, folder)
    results = read_results(folder)
    advice = "; another --output-dir (own files: --task NAME), or --overwrite it"
    check_settings(f"{folder} holds", config.settings, results["config"], advice)
    if os.environ.get("RANK", "0") == "0":
        clear(folder)
    metric, score, floor = results["metric"], results["best_score"], results["floor"]
    if results["teacher_score"] is not None:
        print(f"teacher  {metric} {results['teacher_score']:.4f}")
    print(f"student  {metric} {score:.4f} in epoch {results['best_epoch']}")
    if score <= floor + 0.01:
        print(f"WARNING: the student has learned nothing: baseline {floor:.4f}")
    if results["collapsed"]:
        print("WARNING: the student has collapsed, its states are all alike")
    print(f"model    {results['model']}; to train it anew: --overwrite")
    return results


def clear(folder, *more):
    """What is of no use once a run is finished, or is to be overwritten."""
    names = "checkpoint.pt* model.partial log.jsonl.partial results.json.partial stage-* teacher"
    for pattern in (*names.split(), *more):
        for path in folder.glob(pattern):
            remove(path)


def distil(config, folder):
    """From the data to the finished student in its folder."""
    check_writable(folder, config.teacher_cache)
    prepare_libraries(config)
    keep_memory()
    machine = Machine(config)
    if config.task == "toy" and machine.rank == 0:  # models where `parse` expects them
        toy, owner = Path(config.output_dir, "toy"), f"-{config.run_name}"
        toy_model(toy / "teacher", 4, 96, owner)
        toy_model(toy / "student", 3, 16, owner)
    machine.agree()
    data = load_data(config)
    torch.manual_seed(config.seed)  # draws the student's head
    student = Encoder("student", config.student, data.names, machine)
    if config.uses("mix") and "inputs_embeds" not in student.inputs:
        raise UserError(f"{config.student} takes no inputs_embeds, which mix-up needs")
    results, outputs, ild = consult_teacher(student, data, config, machine, folder / "teacher")
    device = f"{machine.device}, {machine.dtype}"
    print(f"student  {student.title}")
    print(f"method   {config.run_name}; {device}", flush=True)
    if machine.rank == 0 and (folder / "results.json").exists():  # --overwrite, and all is loaded
        clear(folder, "results.json", "predictions.*", "submission")
    machine.agree()
    results |= train_stages(student, data, config, machine, folder, outputs, ild)
    results |= {"task": config.task, "method": config.method, "seed": config.seed}
    results |= {"labels": data.names or None, "columns": data.columns}
    results |= {"floor": data.floor, "params_s": student.num_params}
    results |= {"model": str(folder / "model"), "config": config.settings, "device": device}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "datasets")}
    if machine.rank == 0:
        with whole(folder / "results.json") as unfinished:
            unfinished.write_text(json.dumps(results, indent=1))
    machine.agree()


def train_stages(student, data, config, machine, folder, outputs=(), ild=None, keep=False):
    """The method's stages, one call of `train` after the other -> what results.json says of them.
    All but the last work in a folder of their own and are not stopped early."""
    tokens = {x: tokenize(student, data.texts[x], config.max_length) for x in data.texts}
    pool, layers, history = mean_pool, range(1, max(2, student.num_layers)), []
    if ild:
        pool, layers = ild.pool_tokens, ild.layers_s

    def cosine():
        return mean_cosine(student, tokens[data.dev[0]], machine, pool, layers)

    def evaluate():
        metrics = data.score(lambda split: read_all(student, tokens[split], machine)[0])
        score = next(iter(metrics.values()))  # selects the epoch
        return {"metrics": metrics, "score": score, "cosine_s": cosine()}

    before, training_set = cosine(), TrainingSet(student, tokens["train"], data, outputs)
    for i, (stage, epochs) in enumerate(zip(config.stages, config.stage_epochs, strict=True), 1):
        path, flags = folder, config
        if i < len(config.stages):
            path, flags = folder / f"stage-{i}", replace(config, patience=config.epochs)
        objective = Objective(i, stage, epochs, student, config, machine, len(outputs), ild)
        history = train(objective, training_set, evaluate, flags, machine, path, history, keep)
        if i < len(config.stages) and stage.then == "best":
            machine.agree()  # the first process has saved it
            best = Encoder("student", str(path / "model"), data.names, machine)
            student.model.load_state_dict(best.model.state_dict())
    best = max(history, key=lambda row: (row["stage"], row["score"]))  # of the last stage
    scores = {"metric": next(iter(best["metrics"])), "best_score": best["score"]}
    scores |= {"best_epoch": best["epoch"], "last_score": history[-1]["score"]}
    scores["collapsed"] = 1 - best["cosine_s"] < 0.1 * (1 - before)
    return scores | {"history": history}


def report(folder) -> dict:
    """Print the table of all finished runs below a folder: mean and sample deviation over seeds."""
    scores = {}  # (row, task) -> run -> score x 100; a teacher counts once for all seeds
    for path in sorted(Path(folder).rglob("*-seed*/results.json")):
        results = read_results(path.parent)
        task, score_t = results["task"], results["teacher_score"]
        point = Path(*path.relative_to(folder).parts[:-3])  # of a grid, or "."
        row = str(point / path.parent.name.split("-seed")[0])
        scores.setdefault((row, task), {})[path] = 100 * results["best_score"]
        if score_t is not None:
            scores.setdefault(("teacher", task), {})[score_t] = 100 * score_t
    if not scores:
        raise UserError(f"no finished run (results.json) below {folder}")
    tasks = list(dict.fromkeys(task for _, task in scores))
    print(f"| method | {' | '.join(tasks)} | average |\n|---{'|---' * len(tasks)}|---|")
    for row in sorted({row for row, _ in scores}, key=lambda row: (row != "teacher", row)):
        runs = [list(scores.get((row, task), {}).values()) for task in tasks]
        average = f"{statistics.mean(map(statistics.mean, runs)):.1f}" if all(runs) else "-"
        print("|", " | ".join([row, *map(describe_scores, runs), average]), "|")
    return scores


def describe_scores(values):
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if values[1:] else ""
    return f"{statistics.mean(values):.1f}{deviation} (n={len(values)})"


def explain(error):
    """-> exit code, line. What is none of these is a bug, and is raised again."""
    chain = [error]  # a library that is interrupted may fail in turn, as torch.save does
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    stop = {type(link): link for link in chain}.get(KeyboardInterrupt)
    if stop is not None:
        code = 143 if stop.args else 130  # `terminate` says what it was
        return code, "stopped; the same command goes on, after the last whole epoch of training"
    if isinstance(error, (UserError, ImportError)):  # a package of requirements.txt is missing
        return 2, f"error: {error}"
    if isinstance(error, OSError) or "os error" in str(error):  # safetensors has one of its own
        reason = next((link for link in chain if isinstance(link, OSError)), error)
        return 1, f"error: reading or writing failed: {reason}"
    raise error


def main(argv=None) -> dict:
    """Run a command line -> the results, --report's scores, or what --predict found. SystemExit,
    with one line: 2 a user's mistake, 1 a disk that is full or closed, 130 Ctrl-C, 143 SIGTERM."""
    is_first = os.environ.get("RANK", "0") == "0"  # it speaks for all
    try:
        with contextlib.nullcontext() if is_first else contextlib.redirect_stdout(None):
            config = parse(argv)
            if config.report:
                return report(config.report)
            return predict(config) if config.predict else run(config)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
    message = re.sub(r"\x1b\[\d*m", "", message)  # a library's colours
    print(f"railkd.py: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def terminate(number, frame):
    raise KeyboardInterrupt("SIGTERM")  # not an Exception: `as_user_error` lets it pass


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # not all are UTF-8
    main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        os._exit(0)  # torch's threads may abort a normal end
