# SPDX-License-Identifier: MIT
"""RAIL-KD, random intermediate layer mapping for knowledge distillation (arXiv 2109.10164).

A fine-tuned encoder of 12 or 24 layers, the teacher, is compressed into a student of 6. The student
learns from the labels, from the teacher's logits, and from its intermediate layers, averaged over
the tokens. Which of these layers it sees is drawn at random, and sorted, in every epoch.

    python railkd.py --task toy        needs no download and takes about a minute on a laptop
    python railkd.py --task sst2       distils BERT-base into DistilBERT, both from the hub
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


# ==== the method
# To copy it, take the imports of random, NamedTuple, torch, F, Tensor and nn as well. Shapes: B
# examples, L tokens, d_s and d_t hidden sizes, m student layers in use ("slots"), k teacher layers
# in use, n teacher blocks, u width of the maps, C classes, N training examples. hidden_states[0]
# is the output of the embeddings, hidden_states[i] that of block i.
def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1: hidden (B, L, d), mask (B, L) -> the mean over the tokens (B, d), in 32 bits. Padding
    never matters, not even NaN in it; without tokens the mean is 0. ValueError for other shapes."""
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"need hidden (B, L, d), mask (B, L), not {hidden.shape}, {mask.shape}")
    is_token = mask.bool().unsqueeze(-1)  # (B, L, 1)
    total = hidden.float().masked_fill(~is_token, 0.0).sum(dim=1)  # (B, d)
    return total / is_token.sum(dim=1).clamp(min=1)


def sample_layers(num_layers: int, k: int, seed: int, epoch: int) -> list[int]:
    """Section 3: draw k of the intermediate layers 1 .. num_layers - 1 for one epoch, sorted.
    The draw depends on (seed, epoch) alone. Raises ValueError unless 1 <= k < num_layers."""
    if not 1 <= k < num_layers:
        raise ValueError(f"cannot draw k = {k} layers from num_layers = {num_layers} blocks")
    generator = random.Random(f"layers {seed} {round(epoch)}")  # a Trainer's epoch is a float
    return sorted(generator.sample(range(1, num_layers), k))


def unit_distance(s: Tensor, t: Tensor) -> Tensor:
    """|| t / ||t|| - s / ||s|| ||^2, the distance in Eq. 2 and 3: (..., u) twice -> (...)."""
    return (F.normalize(t, dim=-1) - F.normalize(s, dim=-1)).square().sum(dim=-1)


class Distance(nn.Module):
    """Base of all distances: distance(states_s (B, m, d_s), states_t (B, k, d_t)) -> scalar.
    `proj_s`, one linear map or one for each slot, maps the student's states; `index`: see CoDIR."""

    def targets(self, states_t: Tensor) -> Tensor:  # what `fit` starts proj_s at
        return F.normalize(self.proj_t(states_t), dim=-1)


class LayerwiseDistance(Distance):
    """RAIL-KD^l, Eq. 2: the sum over the slots of the distance between the projected states.
    `shared`: one pair of maps for all slots, or one for each. `alpha`: a weight for each slot."""

    def __init__(self, d_s, d_t, num_slots, num_targets, proj_dim=128, shared=True, alpha=None):
        super().__init__()
        if num_targets != num_slots:
            raise ValueError(f"{num_slots} slots need as many teacher layers, not {num_targets}")
        self.register_buffer("alpha", torch.tensor([1.0] * num_slots if alpha is None else alpha))
        self.proj_s = nn.Linear(d_s, proj_dim) if shared else SlotLinear(num_slots, d_s, proj_dim)
        self.proj_t = nn.Linear(d_t, proj_dim) if shared else SlotLinear(num_slots, d_t, proj_dim)
        self.proj_t.requires_grad_(False)  # if both are trained, the student can collapse

    def forward(self, states_s: Tensor, states_t: Tensor, index=None) -> Tensor:
        s = self.proj_s(states_s)  # (B, m, u)
        t = self.proj_t(states_t)  # (B, m, u)
        return (self.alpha * unit_distance(s, t)).sum(dim=1).mean()  # Eq. 2, mean over the batch


class ConcatDistance(Distance):
    """RAIL-KD^c, Eq. 3: the distance between the projections of the concatenated layers."""

    def __init__(self, d_s, d_t, num_slots, num_targets, proj_dim=128):
        super().__init__()
        self.proj_s = nn.Linear(num_slots * d_s, proj_dim)
        self.proj_t = nn.Linear(num_targets * d_t, proj_dim).requires_grad_(False)

    def forward(self, states_s: Tensor, states_t: Tensor, index=None) -> Tensor:
        s = self.proj_s(states_s.flatten(1))  # (B, u)
        t = self.proj_t(states_t.flatten(1))  # (B, u)
        return unit_distance(s, t).mean()  # Eq. 3, mean over the batch

    def targets(self, states_t: Tensor) -> Tensor:
        return super().targets(states_t.flatten(1))


def kd_loss(logits_s, logits_t, temperature: float, max_temperature: float | None = None) -> Tensor:
    """L_KD of Eq. 4: T^2 KL(teacher || student), mean over the batch (Hinton et al., 2014).
    Logits are (B, C). For C = 1, a regression, it is the mean squared error. With max_temperature
    it is that of logits_s and phi(T) logits_t, where phi(T) = 1 - (T - 1) / max_temperature
    (Annealing-KD, Jafari et al., 2021). Raises ValueError for other shapes and unless T > 0."""
    if logits_s.shape != logits_t.shape or logits_s.ndim != 2 or not temperature > 0:
        raise ValueError(f"need (B, C), T > 0: {logits_s.shape}, {logits_t.shape}, {temperature}")
    logits_s, logits_t = logits_s.float(), logits_t.detach().float()
    if max_temperature is not None:
        phi = 1 - (temperature - 1) / max_temperature  # it grows to 1 as the temperature falls
        return F.mse_loss(logits_s, phi * logits_t)
    if logits_s.shape[1] == 1:
        return F.mse_loss(logits_s, logits_t)
    log_p_s = F.log_softmax(logits_s / temperature, dim=-1)
    log_p_t = F.log_softmax(logits_t / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


class IntermediateLoss(nn.Module):
    """The intermediate term of a method: which layers, how pooled, and how far apart.

        ild.fit(states_s, states_t)                      # once; states_t of all blocks, (N, n, d_t)
        ild.set_epoch(epoch)                                            # in every epoch: the draw
        loss = ild(ild.pool_s(hidden_s, mask_s), ild.pool_t(hidden_t, mask_t))     # in every step

    `select`, `distance` and `teacher_proj` ("trained" or "frozen") replace those of the method, and
    further options go to the distance. `layers_s` and `layers_t` are the layers in use."""

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
        teacher_proj: str | None = None,
        **distance_options,
    ):
        super().__init__()
        row = METHODS.get(method, Method())
        select, distance = select or row.select, distance or row.distance
        if method not in METHODS or select not in SELECTIONS or distance not in DISTANCES:
            known = f"{', '.join(METHODS)}; {', '.join(SELECTIONS)}; {', '.join(DISTANCES)}"
            raise ValueError(f"cannot use {method!r}, {select!r}, {distance!r}; known: {known}")
        self.select, self.seed, self.pool = select, seed, row.pool
        self.num_layers_s, self.num_layers_t = num_layers_s, num_layers_t
        # All but CR-ILD leave out the last block, on both sides.
        self.layers_s = [num_layers_s] if select == "final" else list(range(1, num_layers_s))
        self.set_epoch(1)
        num_slots, num_targets = len(self.layers_s), len(self.layers_t)
        self.distance = DISTANCES[distance](d_s, d_t, num_slots, num_targets, **distance_options)
        if teacher_proj is not None:
            proj_t = getattr(self.distance, "proj_t", nn.Identity())
            if isinstance(proj_t, nn.Identity) or teacher_proj not in ("trained", "frozen"):
                raise ValueError(f"{distance} has no teacher_proj {teacher_proj!r}")
            proj_t.requires_grad_(teacher_proj == "trained")

    def draw(self, epoch: int) -> list[int]:
        return select_layers(self.select, self.num_layers_t, len(self.layers_s), self.seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the teacher's layers for this epoch; they change with the selection "random"."""
        self.layers_t = self.draw(epoch)

    def pool_s(self, hidden_states, mask: Tensor | None = None) -> Tensor:
        """All num_layers_s + 1 hidden states (B, L, d_s) -> those in use, pooled, (B, m, d_s)."""
        return self.pool_layers(hidden_states, mask, self.layers_s, self.num_layers_s)

    def pool_t(self, hidden_states, mask: Tensor | None = None) -> Tensor:
        """All num_layers_t + 1 hidden states (B, L, d_t) -> this epoch's, pooled, (B, k, d_t)."""
        return self.pool_layers(hidden_states, mask, self.layers_t, self.num_layers_t)

    def pool_layers(self, hidden_states, mask, layers, num_layers):
        if len(hidden_states) != num_layers + 1:
            raise ValueError(f"need {num_layers + 1} hidden states, not {len(hidden_states)}")
        if mask is None:  # there is no padding
            mask = torch.ones_like(hidden_states[0][..., 0])
        return torch.stack([self.pool(hidden_states[i], mask) for i in layers], dim=1)

    def forward(self, states_s: Tensor, states_t: Tensor, index: Tensor | None = None) -> Tensor:
        """Pooled states (B, m, d_s), (B, k, d_t) -> scalar, in 32 bits even under autocast, with no
        gradient for the teacher. ContrastiveDistance needs index (B,), the rows of the batch."""
        m, k = len(self.layers_s), len(self.layers_t)
        if states_s.shape[1] != m or states_t.shape[:2] != (len(states_s), k):
            raise ValueError(f"need {m} and {k} layers, not {states_s.shape}, {states_t.shape}")
        with torch.autocast(states_s.device.type, enabled=False):  # 16 bits are too few for norms
            return self.distance(states_s.float(), states_t.detach().float(), index)

    @torch.no_grad()
    def fit(self, states_s: Tensor, states_t: Tensor) -> None:
        """Start the student's maps by ridge regression on the mean target of 40 draws; after a
        random start the first steps destroy the pretrained student. states_s (N, m, d_s) are of
        some training examples, states_t (N, n, d_t) of all the teacher's blocks."""
        maps, x = self.distance.proj_s, states_s.float()
        draws = [self.draw(epoch) for epoch in (range(1, 41) if self.select == "random" else [1])]
        states = [states_t[:, [layer - 1 for layer in draw]].float() for draw in draws]
        y = sum(self.distance.targets(drawn) for drawn in states) / len(draws)
        if isinstance(maps, nn.Linear):  # a shared map: slots count as further examples
            fit_ridge(maps, x.reshape(-1, maps.in_features), y.reshape(-1, maps.out_features))
        if isinstance(maps, nn.ModuleList):
            y = y.flatten(1).split([linear.out_features for linear in maps], dim=1)
            for i, linear in enumerate(maps):
                fit_ridge(linear, x[:, i], y[i])


def fit_ridge(linear: nn.Linear, x: Tensor, y: Tensor, penalty: float = 0.1) -> None:
    """Least squares from x (N, d) to y (N, u); the penalty is relative to the variance of x."""
    x, y = x.cpu().double(), y.cpu().double()
    centred_x, centred_y = x - x.mean(dim=0), y - y.mean(dim=0)
    gram = centred_x.T @ centred_x  # (d, d)
    gram.diagonal().add_((penalty * gram.trace() / len(gram)).clamp(min=1e-12))
    weight = torch.linalg.solve(gram, centred_x.T @ centred_y).T  # (u, d)
    linear.weight.copy_(weight)
    linear.bias.copy_(y.mean(dim=0) - weight @ x.mean(dim=0))


# ---- the baselines
def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token that is not padding, usually [CLS]: (B, L, d), (B, L) -> (B, d), 32 bits."""
    return mean_pool(hidden, mask.bool() & (mask.bool().cumsum(dim=1) == 1))


def select_layers(name: str, num_layers: int, k: int, seed: int = 0, epoch: int = 0) -> list[int]:
    """The teacher's layers that a selection gives to k slots, all of them in 1 .. num_layers.
    Raises ValueError for an unknown name, and unless 1 <= k < num_layers."""
    drawn = sample_layers(num_layers, k, seed, epoch)  # it also checks k
    skip = [i * num_layers // (k + 1) for i in range(1, k + 1)]  # 2, 4, 6, 8, 10 of 12 blocks
    layers = {
        "random": drawn,  # RAIL-KD
        "skip": skip,  # PKD-skip
        "last": list(range(num_layers - k, num_layers)),  # PKD-last
        "reverse": skip[::-1],  # this one and the next two are controls of arXiv 2502.04499
        "middle": [num_layers // 2] * k,
        "permuted": random.Random(f"order {seed}").sample(skip, k),  # one order for all epochs
        "all": list(range(1, num_layers)),
        "final": [num_layers],  # CR-ILD
    }
    if name not in layers:
        raise ValueError(f"unknown selection {name!r}, known: {', '.join(SELECTIONS)}")
    return layers[name]


class SlotLinear(nn.ModuleList):
    """One linear map for each slot, (B, m, d) -> (B, m, u)."""

    def __init__(self, num_slots, d, u):
        super().__init__(nn.Linear(d, u) for _ in range(num_slots))

    def forward(self, states: Tensor) -> Tensor:
        return torch.stack([linear(states[:, i]) for i, linear in enumerate(self)], dim=1)


class DirectDistance(LayerwiseDistance):
    """PKD (Sun et al., 2019): Eq. 2 without projections. Each slot is mapped to d_t only if d_s is
    not d_t. This is the sum over the slots; the authors' code takes the mean over the elements."""

    def __init__(self, d_s, d_t, num_slots, num_targets):
        super().__init__(d_s, d_t, num_slots, num_targets, proj_dim=d_t, shared=False)
        self.proj_t = nn.Identity()
        if d_s == d_t:
            self.proj_s = nn.Identity()


class GroupDistance(Distance):
    """CKD (Wu et al., 2020): the teacher's layers form m contiguous groups, and each slot is mapped
    to its group, side by side, as in the released code (the paper maps the group down)."""

    def __init__(self, d_s, d_t, num_slots, num_targets):
        super().__init__()
        if num_targets < num_slots:
            raise ValueError(f"{num_slots} slots need at least as many layers, not {num_targets}")
        groups = torch.arange(num_targets).tensor_split(num_slots)  # sizes differ by at most one
        self.proj_s = nn.ModuleList(nn.Linear(d_s, len(group) * d_t) for group in groups)

    def forward(self, states_s: Tensor, states_t: Tensor, index=None) -> Tensor:
        groups = states_t.tensor_split(len(self.proj_s), dim=1)  # (B, layers in the group, d_t)
        slots = zip(self.proj_s, states_s.unbind(1), groups, strict=True)
        return sum(unit_distance(maps(s), t.flatten(1)).mean() for maps, s, t in slots)

    def targets(self, states_t: Tensor) -> Tensor:
        groups = states_t.tensor_split(len(self.proj_s), dim=1)
        return torch.cat([F.normalize(group.flatten(1), dim=-1) for group in groups], dim=1)


class AttentionDistance(Distance):
    """ALP-KD (Passban et al., 2021): the mean squared error between each slot and its attention
    over the teacher's layers. The dot products are not scaled, as in the original (from memory)."""

    def __init__(self, d_s, d_t, num_slots, num_targets):
        super().__init__()
        self.num_slots = num_slots
        self.proj_s = nn.Identity() if d_s == d_t else SlotLinear(num_slots, d_s, d_t)

    def forward(self, states_s: Tensor, states_t: Tensor, index=None) -> Tensor:
        s = self.proj_s(states_s)  # (B, m, d_t)
        weights = (s @ states_t.transpose(1, 2)).softmax(dim=-1)  # (B, m, k)
        return F.mse_loss(s, weights @ states_t)

    def targets(self, states_t: Tensor) -> Tensor:
        return states_t.mean(dim=1, keepdim=True).expand(-1, self.num_slots, -1)


class ContrastiveDistance(ConcatDistance):
    """CoDIR (Sun et al., 2020) as InfoNCE: the teacher's vector must pick the student's vector of
    the same example among those of num_negatives examples with another label, which a memory bank
    keeps. `labels` (N,) are of all training examples; for floats all others are negatives."""

    def __init__(
        self,
        d_s,
        d_t,
        num_slots,
        num_targets,
        labels,
        proj_dim=128,
        num_negatives=100,
        temperature=0.07,
        momentum=0.5,
    ):
        super().__init__(d_s, d_t, num_slots, num_targets, proj_dim)
        self.proj_t.requires_grad_(True)
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self.register_buffer("bank", F.normalize(torch.randn(len(labels), proj_dim), dim=-1))
        if labels.is_floating_point() or len(labels.unique()) == 1:
            labels = torch.arange(len(labels))  # each example has a label of its own
        in_order, rows = labels.sort(stable=True)  # now each label is one block of rows
        start = torch.searchsorted(in_order, labels)
        size = torch.searchsorted(in_order, labels, right=True) - start
        for name, value in {"rows": rows, "block_start": start, "block_size": size}.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, states_s: Tensor, states_t: Tensor, index=None) -> Tensor:
        if index is None:
            raise ValueError("ContrastiveDistance needs index, the row numbers of the batch")
        s = F.normalize(self.proj_s(states_s.flatten(1)), dim=-1)  # (B, u)
        t = F.normalize(self.proj_t(states_t.flatten(1)), dim=-1)  # (B, u)
        start, size = self.block_start[index, None], self.block_size[index, None]  # (B, 1)
        pick = torch.randint(2**62, (len(s), self.num_negatives), device=s.device)  # (B, K)
        pick = pick % (len(self.bank) - size)  # among the examples with another label
        rows = self.rows[torch.where(pick < start, pick, pick + size)]  # skip its own label
        vectors = torch.cat([s.unsqueeze(1), self.bank[rows]], dim=1)  # (B, 1 + K, u)
        scores = (vectors @ t.unsqueeze(-1)).squeeze(-1) / self.temperature  # (B, 1 + K)
        if self.training and torch.is_grad_enabled():  # the bank moves towards s
            moved = self.momentum * self.bank[index] + (1 - self.momentum) * s.detach()
            self.bank[index] = F.normalize(moved, dim=-1)
        return F.cross_entropy(scores, torch.zeros_like(index))  # the positive is column 0


class Stage(NamedTuple):
    """A stage of training: the weights of the terms in Eq. 4, and what is special in it."""

    ce: float = 0.0
    kd: float = 0.0
    ild: float = 0.0
    mix: float = 0.0  # CR-ILD's consistency; the weight that it reaches in the last epoch
    anneal: bool = False  # Pro-KD: the temperature falls, the teacher's checkpoints take turns
    then: str = "best"  # "best" or "last": the epoch from which the next stage starts


class Method(NamedTuple):
    """All that makes a method: which teacher layers, how far apart, how pooled, how trained."""

    select: str | None = None
    distance: str | None = None
    pool: object = mean_pool
    stages: tuple[Stage, ...] = (Stage(ce=1 / 3, kd=1 / 3, ild=1 / 3),)  # one or two


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
    "kd": Method(stages=(Stage(ce=1 / 2, kd=1 / 2),)),
    "rail-l": Method("random", "layerwise"),
    "rail-c": Method("random", "concat"),
    "pkd-skip": Method("skip", "direct", first_token),
    "pkd-last": Method("last", "direct", first_token),
    "ckd": Method("all", "group"),
    "alp-kd": Method("all", "attention"),
    "codir": Method("all", "contrastive", stages=(Stage(ce=1 / 2, kd=1 / 2, ild=1 / 32),)),
    "cr-ild": Method("final", "direct", stages=(Stage(ild=1, mix=0.1, then="last"), Stage(kd=1))),
    "pro-kd": Method(stages=(Stage(kd=1, anneal=True), Stage(ce=1))),
    "reverse": Method("reverse", "direct"),
    "permuted": Method("permuted", "direct"),
    "all-to-one": Method("middle", "direct"),
}
# ==== end of the method


# ==== the command
TASKS = ("toy", "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
METRICS = {"cola": ["matthews"], "mrpc": ["f1", "accuracy"], "qqp": ["f1", "accuracy"]}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class UserError(Exception):
    """A mistake in the command or in a file, which `main` prints as one line."""


@contextlib.contextmanager
def as_user_error(what):
    """For libraries that read files and models: their errors have no class in common."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise UserError(f"{what}: {reason}") from error


# ---- flags
def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parse(argv=None) -> argparse.Namespace:
    """The command line -> the flags. A mistake ends the program with one line."""
    parser = argparse.ArgumentParser("railkd.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = parser.add_argument_group("task, models and data").add_argument
    flag("--task", help=f"{', '.join(TASKS)}; or any name for own files")
    flag("--method", default="rail-l", choices=METHODS, help="a row of METHODS")
    flag("--teacher", default="google-bert/bert-base-uncased", help="name or folder (paper)")
    flag("--student", default="distilbert/distilbert-base-uncased", help="name or folder (paper)")
    flag("--data-root", help="read clones of the hub's data: DIR/nyu-mll/glue", metavar="DIR")
    flag("--train-file", help="own csv, tsv, json lines or parquet: label, and one or two texts")
    flag("--validation-file", help="own data to evaluate on, with the same columns")
    flag("--max-length", type=positive, default=128, help="of an example, in tokens")
    flag("--max-train-examples", type=positive, help="a random subset, the same for all seeds")
    flag = parser.add_argument_group("training").add_argument
    flag("--epochs", type=positive, default=40, help="of all stages together (paper: 40)")
    flag("--patience", type=positive, help="stop after so many epochs without a better score")
    flag("--batch-size", type=positive, default=32, help="in each process (paper: 8, 16 or 32)")
    flag("--lr", type=float, default=2e-5, help="learning rate (paper: 1e-5, 2e-5, 5e-5 or 4e-6)")
    flag("--weight-decay", type=float, default=0.01, help="of matrices; biases and norms get none")
    flag("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    flag("--seed", type=int, default=42, help="of draw, batches and dropout (paper: five seeds)")
    flag("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="paper: on")
    flag("--device", help="cpu, cuda, cuda:1 or mps; without this flag the fastest")
    flag = parser.add_argument_group("loss").add_argument
    flag("--select", choices=SELECTIONS, help="the teacher's layers, instead of the method's")
    flag("--distance", choices=DISTANCES, help="the distance, instead of the method's")
    flag("--weights", type=float, nargs=3, metavar=("CE", "KD", "ILD"), help="of the last stage")
    flag("--temperature", type=float, default=2.0, help="of the KD term")
    flag("--proj-dim", type=positive, help="width of the projections (128, as in the paper)")
    flag("--shared-proj", action=argparse.BooleanOptionalAction, help="one map, or one per slot")
    flag("--teacher-proj", choices=("frozen", "trained"), help="frozen; codir, paper: trained")
    flag("--start", default="ridge", choices=("ridge", "random"), help="of maps (paper: random)")
    flag("--teacher-epochs", type=positive, default=3, help="to fine-tune a teacher without a head")
    flag("--teacher-lr", type=float, default=2e-5, help="learning rate for that")
    flag = parser.add_argument_group("output and prediction").add_argument
    flag("--output-dir", default="runs", help="results go to DIR/TASK/METHOD[-NAME]-seedN")
    flag("--name", help="a part of the folder's name, for variants")
    flag("--overwrite", action="store_true", help="do a finished run again")
    flag("--report", metavar="DIR", help="only print a table of the finished runs in DIR")
    flag("--predict", metavar="RUN", help="only answer GLUE's test split with a run's model")
    flag("--test-file", help="with --predict: answer this file, and score it if it has labels")
    flag("--label-map", metavar="ANSWER=LABEL,..", help="the file's label for each answer")
    known, _ = parser.parse_known_args(argv)  # --predict and --task toy change the defaults
    if known.predict:  # as in that run
        config = read_results(known.predict)["config"]
        parser.set_defaults(**{x: config[x] for x in ("task", "max_length", "amp", "data_root")})
    elif known.task == "toy":  # a minute instead of hours
        models = {role: f"{known.output_dir}/toy/toy-{role}" for role in ("teacher", "student")}
        epochs = 8 * len(METHODS[known.method].stages)
        parser.set_defaults(**models, epochs=epochs, lr=1e-3, teacher_epochs=12, teacher_lr=1e-3)
    args = parser.parse_args(argv)
    if args.predict or args.report:
        return args
    row, stages, error = METHODS[args.method], stages_of(args), parser.error
    files, args.task = (args.train_file, args.validation_file), args.task or "own"
    if any(files) != all(files) or any(files) == (args.task in TASKS):
        error(f"--task is one of {', '.join(TASKS)}; else give --train-file and --validation-file")
    select, distance = args.select or row.select, args.distance or row.distance
    if not (select and distance) and (select or distance or stages[-1].ild):
        error(f"--method {args.method}: give --select and --distance, or neither and no ILD weight")
    if not any(stages[-1][:3]) or args.temperature <= 0 or args.epochs < len(stages):
        error(f"need --weights above 0, --temperature above 0, --epochs of {len(stages)} or more")
    if distance == "contrastive" and "RANK" in os.environ:
        error("the memory bank of codir works in one process, not under torchrun")
    if not any(stage.kd or stage.ild for stage in stages):
        args.teacher = None
    return args


def stages_of(args) -> list[Stage]:
    """The method's stages, the last one with the weights of the command line."""
    *earlier, last = METHODS[args.method].stages
    if args.distance and not METHODS[args.method].distance:
        last = Method().stages[-1]  # now it is a method of three terms
    if args.weights:
        last = last._replace(**dict(zip(("ce", "kd", "ild"), args.weights, strict=True)))
    return [*earlier, last]


def settings(args) -> dict:
    """What the results of a run depend on: the flags, and the contents of the user's files."""
    elsewhere = ("output_dir", "overwrite", "report", "device", "predict", "test_file", "label_map")
    config = {name: value for name, value in vars(args).items() if name not in elsewhere}
    for path in filter(None, (args.train_file, args.validation_file)):
        config[f"content of {path}"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return config


def check_same(what, now, before):
    """UserError if a stopped or finished run had other flags or data."""
    changed = [name for name in now if name not in before or now[name] != before[name]]
    if changed:
        flags = ", ".join(x if " " in x else "--" + x.replace("_", "-") for x in changed)
        raise UserError(f"{what} has other {flags}; use --name NAME for another run, or delete it")


class Machine:
    """The device, the precision and, under torchrun, the rank among the processes."""

    def __init__(self, args):
        import datasets
        import transformers

        datasets.disable_progress_bars()  # of short work
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()  # it would report that the head is new
        self.rank = int(os.environ.get("RANK", 0))
        self.num_processes = int(os.environ.get("WORLD_SIZE", 1))
        has_gpu = torch.accelerator.is_available()  # a build for GPUs may find none
        name = str(args.device or (torch.accelerator.current_accelerator() if has_gpu else "cpu"))
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        with as_user_error(f"--device {name}"):
            self.device = torch.ones(1, device=name).device
        self.on_gpu = self.device.type == "cuda"
        has_bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        if self.on_gpu:
            torch.cuda.set_device(self.device)
            torch.set_num_threads(1)  # between short kernels several threads wait for each other
            has_bf16 = torch.cuda.get_device_capability(self.device) >= (8, 0)
        auto = "bf16" if has_bf16 else "fp16" if self.on_gpu else "off"
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
        self.dtype = kinds[auto if args.amp == "auto" else args.amp]
        if self.num_processes > 1 and not torch.distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.on_gpu else "gloo"
            day = timedelta(days=1)  # the others wait while the first one asks the teacher
            torch.distributed.init_process_group(backend, timeout=day)

    def agree(self, value=None):
        """The first process's value, in all of them; the others wait for it here."""
        box = [value]
        if self.num_processes > 1:
            torch.distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]


def write(path, content: bytes):
    """Write a file as a whole or not at all, even if the program is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def read_results(folder) -> dict:
    path = Path(folder, "results.json")
    if not path.exists():
        raise UserError(f"there is no finished run in {folder}, it has no results.json")
    return json.loads(path.read_text(encoding="utf-8"))


# ---- data
class Data:
    """The data of a task by split, "train" and those of `dev`. texts: a `datasets.Dataset` of one
    or two columns; labels (N,): numbers of the classes in `names`, or floats for a regression."""

    def __init__(self, args):
        from datasets import Dataset
        from datasets.fingerprint import Hasher

        files = {"train": args.train_file, "validation": args.validation_file}
        if args.train_file:
            splits = {split: read_file(path) for split, path in files.items()}
        elif args.task == "toy":
            sizes = {"train": 3000, "validation": 1000}
            splits = {split: Dataset.from_dict(toy_data(split, sizes[split])) for split in sizes}
        else:
            splits = read_glue(args)
        self.dev = sorted(split for split in splits if split.startswith("validation"))
        self.task, self.texts, self.labels, self.names = args.task, {}, {}, []
        for split in ["train", *self.dev]:
            where = files.get(split) or f"{args.task}, {split}"
            order = self.texts["train"].column_names if self.texts else None
            self.texts[split], words = read_columns(splits[split], where, order)
            if not words:
                raise UserError(f"{where}: there is no column label, or no label but '-1'")
            is_score = all(map(NUMBER.fullmatch, words)) and any("." in word for word in words)
            if split == "train" and not is_score:  # classes are sorted, and 2 comes before 10
                found = sorted(set(words) - {"-1"}, key=lambda x: (x.isdecimal() and int(x), x))
                self.names = getattr(splits[split].features["label"], "names", found)
            self.labels[split] = number_labels(words, self.names, where)
        size = len(self.labels["train"])
        few = min(size, args.max_train_examples or size)
        rows = sorted(random.Random("subset").sample(range(size), few))
        self.texts["train"] = self.texts["train"].select(rows)
        self.labels["train"] = self.labels["train"][rows]
        if len(self.labels["train"].unique()) < 2:
            raise UserError(f"{args.train_file or args.task}: all labels are the same")
        content = [[self.texts[x][:], self.labels[x].tolist()] for x in self.texts]
        self.fingerprint = Hasher.hash([self.names, content])

    def score(self, logits: dict) -> dict:
        """split -> logits (N, C). The metrics of all dev splits; the first selects the epoch."""
        scores = {}
        for split in self.dev:
            answers = logits[split].argmax(dim=1) if self.names else logits[split][:, 0]
            metrics = measure(self.task, answers, self.labels[split])
            suffix = "_mismatched" if split == "validation_mismatched" else ""  # MNLI has two
            scores |= {name + suffix: value for name, value in metrics.items()}
        return scores

    def majority_score(self) -> float:
        """The score of the most frequent label as the answer to all examples."""
        labels = self.labels[self.dev[0]]
        answers = labels.mode().values.expand(len(labels))
        return next(iter(measure(self.task, answers, labels).values()))


def toy_data(split, size) -> dict:
    """Made-up reviews: the last clause decides, and "not" reverses it."""
    rng, texts, labels = random.Random(f"toy {split}"), [], []
    for _ in range(size):
        clauses = []
        for _ in range(rng.randint(1, 3)):
            noun, negated, word = rng.randrange(20), rng.randrange(2), rng.randrange(60)
            clauses.append(f"the noun{noun} is {'not ' if negated else ''}word{word}")
        texts.append(" but ".join(clauses))
        labels.append("good" if (negated + word) % 2 else "bad")
    return {"text": texts, "label": labels}


def make_toy_model(folder, layers, width):
    """An untrained BERT that knows the words of the toy task."""
    from transformers import BertConfig, BertForMaskedLM

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the is not but".split()
    words += [f"noun{i}" for i in range(20)] + [f"word{i}" for i in range(60)]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), num_attention_heads=4, **sizes))
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    (unfinished / "vocab.txt").write_text("\n".join(words))
    with contextlib.suppress(OSError):  # if another run was first, its model stays
        unfinished.rename(folder)


def read_file(path):
    """Own data -> a `datasets.Dataset`. An empty cell of a csv or tsv is None."""
    import pandas
    from datasets import Dataset, load_dataset

    kind = Path(path).suffix.lower().lstrip(".").replace("jsonl", "json")
    with as_user_error(f"cannot read {path}"), warnings.catch_warnings():
        if kind not in ("csv", "tsv", "json", "parquet") or not os.path.getsize(path):
            raise ValueError("it is empty, or no csv, tsv, json, jsonl or parquet file")
        if kind in ("json", "parquet"):
            return load_dataset(kind, data_files=str(path), split="train")
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a row has too many cells
        options = {"dtype": str, "keep_default_na": False, "index_col": False}
        if kind == "tsv":
            options |= {"sep": "\t", "quoting": 3}  # csv.QUOTE_NONE, as in GLUE's own files
        table = pandas.read_csv(path, encoding="utf-8-sig", **options)
        return Dataset.from_dict({x: [cell or None for cell in table[x]] for x in table})


def read_glue(args):
    """All splits of a task, from the hub or from a clone of its repository."""
    from datasets import load_dataset

    place = str(Path(args.data_root or "", "nyu-mll/glue"))
    with as_user_error(f"cannot load {args.task} from {place}"):
        return load_dataset(place, args.task)


def read_columns(dataset, where, order=None):
    """-> the columns of text, and the labels as text; none if all are -1, as GLUE hides them."""
    ignored = ("label", "idx", "id", "Unnamed: 0")  # the last: the index, in a csv of pandas
    columns = [name for name in dataset.column_names if name not in ignored]
    kinds = {getattr(dataset.features[name], "dtype", None) for name in columns}
    if len(columns) not in (1, 2) or not kinds <= {"string", "large_string"} or not len(dataset):
        found = f"{len(dataset)} rows of {', '.join(dataset.column_names)}"
        raise UserError(f"{where}: need rows of label and one or two texts, not {found}")
    if order and len(columns) != len(order):
        raise UserError(f"{where}: need the texts {order}, not {columns}")
    columns = order if order and set(order) == set(columns) else columns  # as in training
    labels = ["label"] if "label" in dataset.column_names else []
    for name in columns + labels:
        for row, value in enumerate(dataset[name][:], 1):
            if value is None or value != value:
                raise UserError(f"{where}: row {row} has no {name}")
    names = dict(enumerate(getattr(dataset.features.get("label"), "names", [])))  # a ClassLabel's
    words = [str(names.get(x, x)) for x in dataset["label"][:]] if labels else []
    return dataset.select_columns(columns), [] if set(words) == {"-1"} else words


def number_labels(words, names, where) -> Tensor:
    """Labels as text -> (N,), the numbers of the classes or, without names, floats."""
    with as_user_error(f"{where}, labels {', '.join(names) or 'of numbers'} (-1 means none)"):
        return torch.tensor([names.index(word) if names else float(word) for word in words])


class Encoder:
    """A model of `transformers` that classifies or scores texts, with its tokenizer. A missing
    head is added; a "student" also gets a new one where its size does not fit."""

    def __init__(self, role, name, labels, args, machine):
        import transformers as hf

        classes, options = labels or ["score"], {"trust_remote_code": False}
        with as_user_error(f"cannot load the {role} {name}"):
            config = hf.AutoConfig.from_pretrained(name, **options)
            self.has_head = role != "student" and "SequenceClass" in str(config.architectures)
            if not self.has_head:
                config.id2label = dict(enumerate(classes))
                config.label2id = {label: i for i, label in enumerate(classes)}
                config.problem_type = None if labels else "regression"
            config.output_attentions, config.return_dict = False, True  # some configs differ
            self.tokenizer = hf.AutoTokenizer.from_pretrained(name, **options)
            options |= {"config": config, "ignore_mismatched_sizes": not self.has_head}
            self.model = hf.AutoModelForSequenceClassification.from_pretrained(name, **options)
            self.num_layers, self.width = config.num_hidden_layers, config.hidden_size
            words, vectors = len(self.tokenizer), self.model.get_input_embeddings().num_embeddings
            if self.tokenizer.pad_token is None or words > vectors:
                raise ValueError(f"{words} words for {vectors} embeddings, or no padding token")
            if self.model.num_labels != len(classes):
                raise ValueError(f"it has {self.model.num_labels} labels, the data {len(classes)}")
        self.order = label_order(config.id2label, classes) if self.has_head else slice(None)
        self.name, self.machine = str(name), machine
        self.model = self.model.float().to(machine.device)
        self.inputs = set(inspect.signature(self.model.forward).parameters)
        if getattr(config, "type_vocab_size", 2) < 2:  # RoBERTa knows one type of token
            self.inputs.discard("token_type_ids")
        self.max_length = min(args.max_length, self.tokenizer.model_max_length)
        for part, module in self.model.named_modules():
            if part.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa: 2
                self.max_length = min(self.max_length, module.num_embeddings - first)
        self.num_params = self.model.num_parameters()
        self.title = f"{name} ({self.num_layers} x {self.width}, {self.num_params:,} parameters)"

    def tokenize(self, texts):
        """A `datasets.Dataset` of one or two columns of text -> one of tokens."""
        options = {"batched": True, "remove_columns": texts.column_names, "keep_in_memory": True}
        options |= {"new_fingerprint": "tokens", "load_from_cache_file": False}  # no hashing
        cut = {"truncation": True, "max_length": self.max_length}
        return texts.map(lambda batch: self.tokenizer(*batch.values(), **cut), **options)

    def run(self, batch, share=None):
        """Tokens -> logits (B, C) in the order of the data's labels, hidden states (B, L, d), mask.
        A share mixes the word embeddings with those of the reversed batch (CR-ILD)."""
        device, dtype = self.machine.device.type, self.machine.dtype
        inputs = {name: batch[name] for name in batch if name in self.inputs}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            if share is not None:
                words = self.model.get_input_embeddings()(inputs.pop("input_ids"))  # (B, L, d)
                inputs["inputs_embeds"] = share * words + (1 - share) * words.flip(0)
                inputs["attention_mask"] = batch["attention_mask"] | batch["attention_mask"].flip(0)
            output = self.model(**inputs, output_hidden_states=True)
        return output.logits.float()[:, self.order], output.hidden_states, inputs["attention_mask"]

    @torch.no_grad()
    def answer(self, tokens, pool=None, layers=()):
        """All of a split in eval mode -> logits (N, C), pooled states (N, k, d) of these layers."""
        self.model.eval()
        lengths = torch.tensor(list(map(len, tokens["input_ids"][:])))
        order, logits, states = lengths.argsort(stable=True), [], []  # batches with little padding
        for rows in order.split(64):
            batch = self.tokenizer.pad(tokens[rows.tolist()], return_tensors="pt")
            batch_logits, hidden, mask = self.run(batch.to(self.machine.device))
            logits.append(batch_logits.cpu())
            pooled = [pool(hidden[i], mask).cpu() for i in layers]
            states.append(torch.stack(pooled, dim=1) if pooled else torch.empty(len(rows), 0))
        back = order.argsort()
        return torch.cat(logits)[back], torch.cat(states)[back]

    def save(self, folder):
        with as_user_error(f"cannot write {folder}"):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def label_order(id2label, labels) -> list[int]:
    """Where each of the data's labels stands among a model's answers. The names in its config
    decide, as in the scripts of transformers; other names, as LABEL_0, keep their order."""
    theirs = [str(id2label[i]).lower() for i in sorted(id2label)]
    ours = [label.lower() for label in labels]
    if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
        return [theirs.index(label) for label in ours]
    return list(range(len(labels)))


def ask_teacher(teacher, texts, pool, args):
    """The teacher's outputs for a split: logits_t and, with a pooling, layer_1 .. layer_n. They
    are kept in OUTPUT_DIR/teacher-cache for all runs, under a hash of what it depends on."""
    import datasets
    from datasets import Dataset, Features, List, Value
    from datasets.fingerprint import Hasher

    def ask(batch):
        logits, states = teacher.answer(Dataset.from_dict(batch), pool, layers)
        if not (logits.isfinite().all() and states.isfinite().all()):
            raise UserError(f"the answers of {teacher.name} are not finite; try --amp off or bf16")
        states = states.clamp(-65504, 65504).half().numpy()  # the range of 16 bits
        return {"logits_t": logits.numpy(), **{f"layer_{i}": states[:, i - 1] for i in layers}}

    machine, layers = teacher.machine, range(1, teacher.num_layers + 1) if pool else []
    tokens = teacher.tokenize(texts)
    features = {f"layer_{i}": List(Value("float16"), length=teacher.width) for i in layers}
    features["logits_t"] = List(Value("float32"), length=teacher.model.num_labels)
    facts = [machine.dtype, teacher.model.config, teacher.order, pool and pool.__name__]
    weights = {name: tensor.cpu() for name, tensor in teacher.model.state_dict().items()}
    key = Hasher.hash([str(facts), teacher.tokenizer.padding_side, tokens[:], weights])
    path = Path(args.output_dir, "teacher-cache", f"{key}.arrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"batched": True, "remove_columns": tokens.column_names, "desc": "teacher"}
    options |= {"features": Features(features), "cache_file_name": str(path)}
    options |= {"new_fingerprint": key, "load_from_cache_file": True}
    if machine.rank == 0:
        if sys.stderr.isatty():
            datasets.enable_progress_bars()
        tokens.map(ask, **options)
        datasets.disable_progress_bars()
    machine.agree()  # now the file is there, and is only opened
    return tokens.map(ask, **options).with_format("torch")


# ---- training
def make_batch(rows, sources) -> dict:
    """Rows -> a batch of tokens, labels, logits_t (B, C) and states_t (B, k, d_t), on the CPU."""
    tokens, tokenizer, labels, table, layers_t = sources
    batch = dict(tokenizer.pad(tokens[rows], return_tensors="pt"))
    batch["rows"], batch["label"] = torch.tensor(rows), labels[rows]
    if table is not None:
        columns = table[rows]
        batch["logits_t"] = columns["logits_t"]
    if layers_t is not None:
        batch["states_t"] = torch.stack([columns[f"layer_{i}"] for i in layers_t], dim=1)
    return batch


def draw_batches(lengths, size, seed, epoch, machine) -> list[list[int]]:
    """Rows in batches of like length, in an order that depends on (seed, epoch) alone -> the share
    of this process. With several, rows from the epoch's start fill up the last batch."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    key = random.Random(f"batches {seed} {epoch}").getrandbits(63)
    generator = torch.Generator().manual_seed(key)
    rows = get_length_grouped_indices(lengths, size, generator=generator)
    if machine.num_processes > 1:
        rows += [rows[i % len(rows)] for i in range(-len(rows) % size)]
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    order = torch.randperm(len(batches), generator=generator)  # not from long to short
    return [batches[i][machine.rank :: machine.num_processes] for i in order]


def mixup_loss(mixed: Tensor, clean: Tensor, share: float) -> Tensor:
    """CR-ILD's consistency (Ko et al., 2023): mixed states (B, m, d) against both clean ones."""
    to_own = unit_distance(mixed, clean.detach()).mean()
    to_other = unit_distance(mixed, clean.detach().flip(0)).mean()
    return share * to_own + (1 - share) * to_other


class Objective(nn.Module):
    """What a stage minimises: Eq. 4."""

    def __init__(self, student, stage, epochs, ild, args):
        super().__init__()
        self.student, self.stage, self.epochs = student, stage, epochs
        self.model, self.ild = student.model, ild if stage.ild else None
        self.temperature = args.temperature
        self.max_temperature = 7.0 if stage.anneal else None

    def set_epoch(self, epoch):
        """What changes with the epoch: the draw, and what moves in CR-ILD and Pro-KD."""
        past, length = epoch - self.epochs.start, len(self.epochs)
        self.progress = (past + 1) / length  # CR-ILD
        if self.stage.anneal:  # Pro-KD: the temperature falls from 7 to 1
            self.temperature = 1 + (self.max_temperature - 1) * (1 - past / max(1, length - 1))
        if self.ild is not None:
            self.ild.set_epoch(epoch)

    def forward(self, batch) -> Tensor:
        """A batch of make_batch -> loss, ce, kd, ild and mix; a term that is not used is 0."""
        stage, label = self.stage, batch["label"]
        logits_s, hidden_s, mask_s = self.student.run(batch)
        ce_loss = F.mse_loss if label.is_floating_point() else F.cross_entropy
        ce = ce_loss(logits_s.squeeze(1), label)  # the scores of a regression are (B, 1)
        if not stage.ce:
            ce = ce.detach()  # it is only shown
        kd = ild = mix = torch.zeros_like(ce)
        if stage.kd:
            kd = kd_loss(logits_s, batch["logits_t"], self.temperature, self.max_temperature)
        if stage.ild:
            states_s = self.ild.pool_s(hidden_s, mask_s)
            ild = self.ild(states_s, batch["states_t"], batch["rows"])
        if stage.mix:
            share = 0.5 + abs(torch.rand(()).item() - 0.5)  # max(b, 1 - b) with b from Beta(1, 1)
            _, hidden, mask = self.student.run(batch, share)
            mix = self.progress * mixup_loss(self.ild.pool_s(hidden, mask), states_s, share)
        loss = stage.ce * ce + stage.kd * kd + stage.ild * ild + stage.mix * mix  # Eq. 4
        return torch.stack([loss, *(term.detach() for term in (ce, kd, ild, mix))])


def train_epoch(net, loader, parts, machine, epoch) -> dict:
    """One pass over the training data -> the means of the loss and its terms, and the time."""
    from tqdm import tqdm

    optimizer, scaler = parts["optimizer"], parts["scaler"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    began, sums, count = time.perf_counter(), 0.0, 0
    net.train()
    bar = tqdm(loader, f"epoch {epoch}", leave=False, disable=machine.rank > 0 or None)
    for step, batch in enumerate(bar, 1):
        batch = {x: y.to(machine.device, non_blocking=machine.on_gpu) for x, y in batch.items()}
        terms = net(batch)
        scaler.scale(terms[0]).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        parts["schedule"].step()
        optimizer.zero_grad()
        sums = sums + terms.detach() * len(batch["rows"])
        count += len(batch["rows"])
        is_checked = step % 50 == 0 or step == len(loader)  # rarely, since it makes a GPU wait
        if is_checked and not sums.isfinite().all():
            raise UserError(f"epoch {epoch}, step {step}: the loss is not finite; lower --lr?")
    if machine.num_processes > 1:  # of equal shares
        torch.distributed.all_reduce(sums)
        count *= machine.num_processes
    means = dict(zip(("loss", "ce", "kd", "ild", "mix"), (sums / count).tolist(), strict=True))
    seconds = time.perf_counter() - began
    return means | {"seconds": seconds, "examples_per_s": count / seconds}


def train(student, data, args, machine, folder, tables=(), ild=None, keep_epochs=False):
    """Train in all stages and save the best epoch's student in folder/model -> its part of
    results.json. A run that was stopped goes on after its last whole epoch."""
    from transformers import get_linear_schedule_with_warmup

    stages, path = stages_of(args), folder / "checkpoint.pt"
    facts = settings(args) | {"training data": data.fingerprint}
    facts["precision or processes"] = f"{machine.dtype}, {machine.num_processes}"
    facts["teacher's answers"] = [Path(x.cache_files[0]["filename"]).stem for x in tables]
    tokens = {split: student.tokenize(texts) for split, texts in data.texts.items()}
    lengths = list(map(len, tokens["train"]["input_ids"][:]))
    cut = sum(length >= student.max_length for length in lengths)
    print(f"data     {len(lengths)} examples, {cut} reach the limit of {student.max_length} tokens")
    history, best, stopped_in = [], None, 0
    cosine = mean_cosine(student, tokens[data.dev[0]], ild)  # before training, for the alarm
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_same(path, facts, saved["facts"])
        history, best, stopped_in = saved["history"], saved["best"], saved["history"][-1]["stage"]
        print(f"resumed after epoch {len(history)}", flush=True)
    batch_size, per_stage = args.batch_size * machine.num_processes, args.epochs // len(stages)
    for number, stage in enumerate(stages, 1):
        epochs = range(1, per_stage + 1) if number == 1 else range(per_stage + 1, args.epochs + 1)
        objective = net = Objective(student, stage, epochs, ild, args)
        trained = [p for p in objective.parameters() if p.requires_grad]
        matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}
        others = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([matrices, others], lr=args.lr, fused=True)
        steps = math.ceil(len(lengths) / batch_size) * len(epochs)
        schedule = get_linear_schedule_with_warmup(optimizer, round(args.warmup * steps), steps)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        parts = {"objective": objective, "optimizer": optimizer, "schedule": schedule}
        parts["scaler"] = scaler
        if machine.num_processes > 1:  # static_graph: some parameters never get a gradient
            net = nn.parallel.DistributedDataParallel(objective, static_graph=True)
        if number == stopped_in:  # the run was stopped here
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        elif number > stopped_in:
            best = None  # each stage has a best epoch of its own
        for epoch in range(max(epochs.start, len(history) + 1), epochs.stop):
            patience = args.patience if number == len(stages) else None
            if patience and best and epoch - best["epoch"] > patience:
                print(f"stopped: nothing better for {patience} epochs", flush=True)
                break
            torch.manual_seed(random.Random(f"{args.seed} {epoch} {machine.rank}").getrandbits(63))
            objective.set_epoch(epoch)
            layers_t = ild.layers_t if stage.ild else None
            turn = (epoch - epochs.start) * len(tables) // len(epochs) if stage.anneal else -1
            columns = {"logits_t", *(f"layer_{i}" for i in layers_t or [])}  # no other is read
            table = tables[turn].select_columns(sorted(columns)) if stage.kd or stage.ild else None
            sources = (tokens["train"], student.tokenizer, data.labels["train"], table, layers_t)
            batches = draw_batches(lengths, batch_size, args.seed, epoch, machine)
            options = {"num_workers": 2, "pin_memory": True} if machine.on_gpu else {}
            options["generator"] = torch.Generator()  # else it moves the global one
            options["collate_fn"] = functools.partial(make_batch, sources=sources)
            loader = DataLoader(batches, batch_size=None, **options)
            row = {"stage": number, "epoch": epoch, "layers_t": layers_t}
            row |= train_epoch(net, loader, parts, machine, epoch)
            row |= {x: None for x in ("kd", "ild", "mix") if not getattr(stage, x)}  # not used
            if machine.rank == 0:
                row["metrics"] = data.score({x: student.answer(tokens[x])[0] for x in data.dev})
                row["score"] = next(iter(row["metrics"].values()))
                row["cosine_s"] = mean_cosine(student, tokens[data.dev[0]], ild)
            row = machine.agree(row)
            history.append(row)
            is_best = best is None or row["score"] > best["score"]
            if is_best:
                weights = {x: y.cpu().clone() for x, y in student.model.state_dict().items()}
                best = {"epoch": epoch, "score": row["score"], "weights": weights}
            if machine.rank == 0:
                if keep_epochs:
                    student.save(folder / f"epoch-{epoch:03}")
                state = {name: part.state_dict() for name, part in parts.items()}
                buffer = io.BytesIO()
                torch.save(state | {"facts": facts, "history": history, "best": best}, buffer)
                write(path, buffer.getbuffer())
            told = describe(row | row["metrics"], ("stage", "metrics", "score", "examples_per_s"))
            print(told, "*" if is_best else "", flush=True)
        if stage.then == "best":
            student.model.load_state_dict(best["weights"])
    if machine.rank == 0:
        student.save(folder / "model")
    scores = {"metric": next(iter(history[-1]["metrics"])), "best_score": best["score"]}
    scores |= {"best_epoch": best["epoch"], "last_score": history[-1]["score"], "history": history}
    scores["collapsed"] = 1 - history[best["epoch"] - 1]["cosine_s"] < 0.1 * (1 - cosine)
    return scores


def describe(values, without=()) -> str:
    shown = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in values.items()}
    return "  ".join(f"{x} {y}" for x, y in shown.items() if y is not None and x not in without)


def measure(task, answers, labels) -> dict:
    """The metrics of a task, accuracy where METRICS has none; 0 where one is undefined."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    names = METRICS.get(task, ["accuracy"])
    known = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
    if labels.is_floating_point():
        names, known = ["pearson", "spearman"], {"pearson": pearsonr, "spearman": spearmanr}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constant answers
        scores = {name: known[name](labels.numpy(), answers.numpy()) for name in names}
    scores = {name: float(getattr(x, "statistic", x)) for name, x in scores.items()}
    return {name: 0.0 if math.isnan(x) else x for name, x in scores.items()}


def mean_cosine(student, tokens, ild) -> float:
    """The alarm for a collapse: the mean cosine between pooled states of different examples, over
    the layers in use, for up to 256 examples. It is 1 if all states point the same way."""
    pool = ild.pool if ild else mean_pool
    layers = ild.layers_s if ild else range(1, max(2, student.num_layers))
    some = tokens.select(range(0, len(tokens), math.ceil(len(tokens) / 256)))
    states = F.normalize(student.answer(some, pool, layers)[1], dim=-1)  # (n, m, d)
    n, all_pairs = len(states), states.mean(dim=0).square().sum(dim=-1).mean().item()
    return (n * all_pairs - 1) / max(1, n - 1)  # without the pairs of an example with itself


def consult_teacher(student, data, args, machine, folder):
    """-> what results.json says of the teacher, the table of its outputs on the training data (for
    Pro-KD one for each of its epochs), and the intermediate loss, ready to train."""
    from datasets.fingerprint import Hasher

    stages, ild = stages_of(args), None
    # A teacher without a head is fine-tuned, once for all runs that share these flags.
    same = ("task", "teacher", "train_file", "validation_file", "max_length")
    tuning = argparse.Namespace(**{x: y if x in same else None for x, y in vars(args).items()})
    tuning.method, tuning.seed, tuning.batch_size = "none", 42, max(1, 32 // machine.num_processes)
    tuning.epochs, tuning.lr = args.teacher_epochs, args.teacher_lr
    tuning.weight_decay, tuning.warmup = 0.01, 0.1
    key = Hasher.hash([settings(tuning), data.fingerprint, str(machine.dtype)])
    made = Path(args.output_dir, args.task, f"teacher-{Path(args.teacher).name}-{key}")
    name = made / "model" if machine.agree(made.exists()) else args.teacher
    torch.manual_seed(tuning.seed)  # it draws the head
    teacher = Encoder("teacher", name, data.names, args, machine)
    if stages[0].ild or stages[-1].ild:  # a misfit shows before hours of fine-tuning
        options = {x: getattr(args, x) for x in ("select", "distance", "teacher_proj", "proj_dim")}
        options |= {"shared": args.shared_proj, "seed": args.seed}
        if (args.distance or METHODS[args.method].distance) == "contrastive":
            options["labels"] = data.labels["train"]
        options = {name: value for name, value in options.items() if value is not None}
        sizes = (student.num_layers, teacher.num_layers, student.width, teacher.width)
        torch.manual_seed(args.seed)
        with as_user_error(f"--method {args.method}, {sizes[1]} blocks to {sizes[0]}"):
            ild = IntermediateLoss(args.method, *sizes, **options)
    if not teacher.has_head:
        print(f"teacher  {teacher.title} has no head and is fine-tuned for the task", flush=True)
        train(teacher, data, tuning, machine, folder / "teacher", keep_epochs=True)
        if machine.rank == 0:
            with contextlib.suppress(OSError):  # if another run was first, its teacher stays
                (folder / "teacher").rename(made)
            shutil.rmtree(folder / "teacher", ignore_errors=True)
            (made / "checkpoint.pt").unlink(missing_ok=True)
        machine.agree()
        teacher = Encoder("teacher", made / "model", data.names, args, machine)
    logits = {x: ask_teacher(teacher, data.texts[x], None, args)["logits_t"][:] for x in data.dev}
    metrics, labels = data.score(logits), data.labels[data.dev[0]]
    score = next(iter(metrics.values()))
    print(f"teacher  {teacher.title}: {describe(metrics)}", flush=True)
    is_useless = score <= data.majority_score() + 0.01
    if not data.names:  # a correlation does not notice another scale
        is_useless = F.mse_loss(logits[data.dev[0]][:, 0], labels) >= labels.var(correction=0)
    if is_useless:
        why = "not fine-tuned, labels in another order (id2label in config.json), other scale"
        print(f"WARNING: the teacher is no better than one answer for all. Usual reasons: {why}")
    facts = {"teacher": teacher.name, "params_t": teacher.num_params}
    facts |= {"teacher_score": score, "teacher_metrics": metrics}
    checkpoints, pool = [teacher], METHODS[args.method].pool
    if stages[0].anneal:  # the student follows the epochs of the fine-tuning
        pool = pool if ild else None
        folders = sorted(made.glob("epoch-*")) or [teacher.name]
        checkpoints = [Encoder("teacher", x, data.names, args, machine) for x in folders]
        print(f"teacher  {len(checkpoints)} checkpoints; with one alone it is Annealing-KD")
    tables = [ask_teacher(x, data.texts["train"], pool, args) for x in checkpoints]
    if ild and args.start == "ridge":
        texts = data.texts["train"]
        rows = random.Random("ridge").sample(range(len(texts)), min(2000, len(texts)))
        some = student.tokenize(texts.select(rows))
        states_s = student.answer(some, ild.pool, ild.layers_s)[1]
        columns, blocks = tables[-1][rows], range(1, teacher.num_layers + 1)
        ild.fit(states_s, torch.stack([columns[f"layer_{i}"] for i in blocks], dim=1))
    return facts, tables, ild and ild.to(machine.device)


def run(args) -> dict:
    """Distil, unless that is done already, and print what came of it."""
    name = "-".join(filter(None, (args.method, args.name, f"seed{args.seed}")))
    folder = Path(args.output_dir, args.task, name)
    if args.overwrite or not (folder / "results.json").exists():
        distil(args, folder)
    results = read_results(folder)
    check_same(folder, settings(args), results["config"])
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    names = ("metric", "teacher_score", "best_score", "best_epoch", "model")
    print(describe({name: results[name] for name in names}))
    if results["collapsed"]:
        print("WARNING: the student has collapsed, its states are all alike")
    return results


def distil(args, folder):
    """From the data to a finished student and its results in the folder."""
    machine = Machine(args)
    toy = Path(args.output_dir, "toy")
    if args.task == "toy" and machine.rank == 0 and not (toy / "toy-student").exists():
        make_toy_model(toy / "toy-teacher", layers=4, width=96)
        make_toy_model(toy / "toy-student", layers=3, width=16)
    machine.agree()
    data = Data(args)
    columns, kind = data.texts["train"].column_names, ", ".join(data.names) or "a score"
    print(f"task     {args.task}: {' and '.join(columns)} -> {kind}")
    torch.manual_seed(args.seed)  # it draws the student's head
    student = Encoder("student", args.student, data.names, args, machine)
    results = {"teacher": None, "params_t": None, "teacher_score": None, "teacher_metrics": {}}
    tables, ild = [], None
    if args.teacher:
        results, tables, ild = consult_teacher(student, data, args, machine, folder)
    device = f"{machine.device}, {machine.dtype}"
    print(f"student  {student.title}\nmethod   {args.method} on {device}", flush=True)
    if machine.rank == 0 and (folder / "results.json").exists():  # --overwrite: all is loaded
        shutil.rmtree(folder)
    machine.agree()
    results |= train(student, data, args, machine, folder, tables, ild)
    results |= {"task": args.task, "method": args.method, "seed": args.seed, "columns": columns}
    results |= {"labels": data.names or None, "params_s": student.num_params, "device": device}
    versions = {x: sys.modules[x].__version__ for x in ("torch", "transformers", "datasets")}
    results |= {"model": str(folder / "model"), "config": settings(args), "versions": versions}
    if results["best_score"] <= data.majority_score() + 0.01:
        print("WARNING: the student has learned nothing, one answer for all is as good")
    if machine.rank == 0:
        write(folder / "results.json", json.dumps(results, indent=1).encode())
    machine.agree()


def predict(args) -> dict:
    """Answer GLUE's test split or --test-file -> what is in predictions.json."""
    results, folder, where = read_results(args.predict), Path(args.predict), args.test_file
    names, task, columns = results["labels"] or [], results["task"], results["columns"]
    student = Encoder("model", folder / "model", names, args, Machine(args))
    if not where:
        if task not in TASKS[1:]:
            raise UserError(f"{task} has no test split, give --test-file")
        title = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}.get(task, task.upper())
        called = names if task in ("mnli", "qnli", "rte") else range(len(names))
        for split, dataset in read_glue(args).items():
            if split.startswith("test"):
                end = {"test_matched": "-m", "test_mismatched": "-mm"}.get(split, "")
                path = folder / "submission" / f"{title}{end}.tsv"
                write_answers(path, student, read_columns(dataset, split)[0], called, True)
        print(f"answers  {folder / 'submission'}")
        return {}
    texts, words = read_columns(read_file(where), where, columns)
    pairs = [pair.partition("=")[::2] for pair in (args.label_map or "").split(",") if pair]
    called = dict(pairs or zip(names, names, strict=True))
    if sorted(called) != sorted(names) or not all(called.values()):
        raise UserError(f"--label-map: give ANSWER=LABEL for each of {', '.join(names)}")
    called = [called[name] for name in names]
    classes = list(dict.fromkeys(called))  # several answers may share a label
    labels = number_labels(words, classes, where) if words else None
    answers = write_answers(folder / "predictions.tsv", student, texts, called, False)
    (folder / "predictions.json").unlink(missing_ok=True)  # of another file
    found = {"file": where, "n": len(texts)}
    if words:
        found["metrics"] = measure(task, number_labels(answers, classes, where), labels)
        print(f"student  {describe(found['metrics'])}")
        write(folder / "predictions.json", json.dumps(found, indent=1).encode())
    print(f"answers  {folder / 'predictions.tsv'}")
    return found


def write_answers(path, student, texts, called, for_server):
    """Write a tsv of the answers under the names in `called` -> the answers."""
    import pandas

    logits = student.answer(student.tokenize(texts))[0]
    if called:
        answers = [called[i] for i in logits.argmax(dim=1)]
    else:  # a regression; those of GLUE's server are from 0 to 5
        answers = (logits[:, 0].clamp(0, 5) if for_server else logits[:, 0]).tolist()
    table = pandas.DataFrame({"prediction": answers})
    if called and not for_server:
        table["probability"] = logits.softmax(dim=1).amax(dim=1).tolist()
    digits = "%.3f" if for_server else "%.4f"
    write(path, table.to_csv(sep="\t", index_label="index", float_format=digits).encode())
    return answers


def report(folder) -> dict:
    """The table of all finished runs below a folder, mean and deviation over the seeds."""
    scores = {}  # (row, task) -> the scores x 100
    for path in sorted(Path(folder).rglob("*-seed*/results.json")):
        results, row = read_results(path.parent), path.parent.name.rpartition("-seed")[0]
        scores.setdefault((row, results["task"]), []).append(100 * results["best_score"])
        if results["teacher"]:
            of_teacher = scores.setdefault(("teacher", results["task"]), [])
            if 100 * results["teacher_score"] not in of_teacher:  # it counts once for all runs
                of_teacher.append(100 * results["teacher_score"])
    if not scores:
        raise UserError(f"there is no finished run (results.json) in {folder}")
    tasks = list(dict.fromkeys(task for _, task in scores))  # each of them once
    print(f"| method | {' | '.join(tasks)} | average |\n|---{'|---' * len(tasks)}|---|")
    for row in sorted({row for row, _ in scores}, key=lambda row: (row != "teacher", row)):
        cells, means = ["-"] * len(tasks), []
        for i, values in enumerate(scores.get((row, task)) for task in tasks):
            if values:
                means.append(statistics.mean(values))
                deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells[i] = f"{means[-1]:.1f}{deviation} (n={len(values)})"
        average = f"{statistics.mean(means):.1f}" if len(means) == len(tasks) else "-"
        print(f"| {row} | {' | '.join(cells)} | {average} |")
    return scores


def main(argv=None) -> dict:
    """Run a command line -> its results. What a user can fix ends in SystemExit, with one line."""
    is_first = os.environ.get("RANK", "0") == "0"  # under torchrun it speaks for all
    try:
        with contextlib.redirect_stdout(sys.stdout if is_first else None):
            args = parse(argv)
            if args.report:
                return report(args.report)
            return predict(args) if args.predict else run(args)
    except (UserError, OSError) as error:
        code, message = 1, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "stopped; the same command goes on after the last whole epoch"
    print(f"railkd.py: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(0)  # under torchrun, torch's threads may abort a normal end
