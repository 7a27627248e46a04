# SPDX-License-Identifier: MIT
"""RAIL-KD in one file: RAndom Intermediate Layer mapping for Knowledge Distillation (arXiv 2109.10164).

HEADER
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import random
import shutil
import sys
import threading
import time
import urllib.request
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ================================================================================================ the method
# From here to "end of the method" torch is all that is needed: import it, or copy it.
# B batch, L padded tokens, d_s / d_t hidden width of student / teacher, n teacher blocks, m student slots,
# k teacher vectors, u projection width, C classes. hidden_states[0] is the embedding output, hidden_states[i]
# the output of block i. The last block is left out on both sides: layers 1..m meet layers of 1..n-1.

unit = functools.partial(F.normalize, dim=-1)       # vectors of length 1


def mean_pool(hidden, mask):
    """Mean over each example's tokens (Eq. 1): (B, L, d), mask (B, L) -> (B, d) in 32 bits. Padding never
    matters, NaN in it included; an example without tokens gives zeros. ValueError for other shapes."""
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"need hidden (B, L, d), mask (B, L): got {[*hidden.shape]} and {[*mask.shape]}")
    mask = mask.bool().unsqueeze(-1)                                                # (B, L, 1)
    return hidden.float().masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)   # (B, d)


def first_token(hidden, mask):
    """The first token that is no padding, mostly [CLS]: (B, L, d), (B, L) -> (B, d) in 32 bits."""
    return mean_pool(hidden, mask.bool() & (mask.bool().cumsum(1) == 1))


def sample_layers(num_layers, k, seed, epoch):
    """RAIL-KD's draw (section 3): k of the layers 1..num_layers-1 without replacement, sorted; every subset is
    equally likely. A function of its arguments alone (the same on every rank and after a restart) that neither
    reads nor moves a global generator. ValueError where k layers are not to be had."""
    if not 1 <= k <= num_layers - 1:
        raise ValueError(f"cannot draw k = {k} intermediate layers from num_layers = {num_layers} blocks")
    return sorted(random.Random(f"layers {seed} {epoch}").sample(range(1, num_layers), k))


def select_layers(name, num_layers, k, seed=0, epoch=0):
    """The teacher layers that a selection gives to k student slots: a flat list of ints in 1..num_layers-1.
    ValueError for an unknown name and for more slots than layers."""
    if name not in SELECTIONS:
        raise ValueError(f"unknown selection {name!r}, known: {', '.join(SELECTIONS)}")
    draw = sample_layers(num_layers, k, seed, epoch)
    skip = [i * num_layers // (k + 1) for i in range(1, k + 1)]     # 2, 4, .., 10 of 12; 4, 8, .., 20 of 24
    return {"random": draw, "skip": skip, "last": list(range(num_layers - k, num_layers)),
            "reverse": skip[::-1], "middle": [num_layers // 2] * k, "all": list(range(1, num_layers)),
            "permuted": random.Random(f"order {seed}").sample(skip, k)}[name]     # the same in every epoch


def kd_loss(logits_s, logits_t, temperature):
    """T^2 KL(teacher || student) of the softened predictions, mean over the batch (Hinton et al., 2014).
    (B, C), (B, C) -> scalar in 32 bits; C = 1 (regression): mean squared error, no temperature. The teacher
    gets no gradient. ValueError for other shapes or a temperature that is not positive."""
    if logits_s.shape != logits_t.shape or logits_s.ndim != 2 or not temperature > 0:
        raise ValueError(f"need (B, C) twice, T > 0: got {[*logits_s.shape]}, {[*logits_t.shape]}, {temperature}")
    logits_s, logits_t = logits_s.float(), logits_t.detach().float()
    if logits_s.shape[1] == 1:
        return F.mse_loss(logits_s, logits_t)
    log_p_s, log_p_t = (F.log_softmax(logits / temperature, dim=-1) for logits in (logits_s, logits_t))
    return temperature ** 2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")


def ridge(x, y, center=True, penalty=0.1):
    """Least squares, penalty * tr(x'x) / d, in 64 bits: x (N, d), y (N, u) -> weight (u, d), bias (u,)."""
    x, y = x.double().cpu(), y.double().cpu()
    mean_x, mean_y = x.mean(0) * center, y.mean(0) * center          # center=False: for a map without bias
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x                                                                  # (d, d)
    gram.diagonal().add_((penalty * gram.trace() / len(gram)).clamp(min=1e-12))
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, mean_y - weight @ mean_x


class Distance(nn.Module):
    """How far apart: distance(pooled_s (B, m, d_s), pooled_t (B, k, d_t)) -> scalar in 32 bits, always.

    A subclass has maps (`proj_s`, `proj_t`: nn.Linear, nn.ModuleList of one per slot, or None) and says what
    goes in (`inputs_*`: lists of (B, width)) and, if need be, what comes out (`term`). Options of all: start,
    "ridge": `fit`, called once before training, puts the student's map at the least-squares solution (no map:
    no fit), or "random": it stays as drawn; teacher_proj, "frozen" (cannot collapse) or "trained" (literal);
    alpha: the slots' weights, 1 in the paper. ValueError for bad shapes and options, RuntimeError without fit.
    """

    def __init__(self, d_s, d_t, num_slots, num_targets=0, bias=True, teacher_proj="frozen", start="ridge",
                 alpha=None):
        super().__init__()
        if start not in ("random", "ridge") or teacher_proj not in ("trained", "frozen"):
            raise ValueError(f"no such start or teacher_proj: {start!r}, {teacher_proj!r}")
        alpha = torch.as_tensor([1.0] * num_slots if alpha is None else alpha, dtype=torch.float32)
        if alpha.shape != (num_slots,):
            raise ValueError(f"alpha must be one weight for each of {num_slots} slots, got {alpha.tolist()}")
        self.shape_s, self.shape_t = (num_slots, d_s), (num_targets or num_slots, d_t)
        self.bias, self.train_t, self.start = bias, teacher_proj == "trained", start
        self.proj_s = self.proj_t = None
        self.register_buffer("alpha", alpha)
        self.register_buffer("fitted", torch.tensor(False))         # in the state dict: fit was called
        self._ready = start == "random"                             # spares a GPU a look at it in every step

    def inputs_s(self, pooled):
        return list(pooled.unbind(1))

    inputs_t = inputs_s

    def term(self, z_s, z_t, index=None, labels=None):
        """sum_i alpha_i |unit(z_t,i) - unit(z_s,i)|^2, mean over the batch (Eq. 2 and 3)."""
        return sum(alpha * (unit(t) - unit(s)).square().sum(-1).mean()
                   for alpha, s, t in zip(self.alpha, z_s, z_t))

    def project(self, pooled_s, pooled_t):
        """Both sides after their maps: two lists of (B, width). The teacher's vectors get no gradient."""
        if pooled_s.shape[1:] != self.shape_s or pooled_t.shape != (len(pooled_s), *self.shape_t):
            raise ValueError(f"need pooled vectors (B, *{self.shape_s}) and (B, *{self.shape_t}): "
                             f"got {[*pooled_s.shape]} and {[*pooled_t.shape]}")
        return (_apply(self.proj_s, self.inputs_s(pooled_s.float())),
                _apply(self.proj_t, self.inputs_t(pooled_t.detach().float())))

    def forward(self, pooled_s, pooled_t, index=None, labels=None):
        self._ready = self._ready or self.proj_s is None or bool(self.fitted)
        if not self._ready:
            raise RuntimeError(f"{type(self).__name__}, start='ridge': call fit(...) once before training")
        with torch.autocast(pooled_s.device.type, enabled=False):
            return self.term(*self.project(pooled_s, pooled_t), index=index, labels=labels)

    @torch.no_grad()
    def fit(self, pooled_s, pooled_t, chances=None):
        """The ridge start: the student's map goes to the ridge solution towards the expected unit target.
        pooled_s (N, m, d_s); pooled_t (N, K, d_t), all layers that can be drawn; chances (k, K): how likely
        layer l is the i-th vector of a training step (default: always just these)."""
        if self.start == "random" or self.proj_s is None:
            return
        chances = (torch.eye(self.shape_t[0]) if chances is None else chances).to(pooled_t.device)
        maps, x, y = self.proj_s, self.inputs_s(pooled_s.float()), self.targets(pooled_t.float(), chances)
        if isinstance(maps, nn.Linear):                             # each slot is N more examples for the map
            maps, x, y = [maps], [torch.cat(x)], [torch.cat(y)]
        for linear, x_i, y_i in zip(maps, x, y):
            weight, bias = ridge(x_i, y_i, center=self.bias)
            linear.load_state_dict({"weight": weight, "bias": bias} if self.bias else {"weight": weight})
        self.fitted.fill_(True)

    def targets(self, pooled_t, chances):
        """What the student's maps should hit, (N, width) each: the unit target of the expected vectors."""
        expected = torch.einsum("kl,nld->nkd", chances, pooled_t)
        return [unit(z) for z in _apply(self.proj_t, self.inputs_t(expected))]


def _apply(maps, inputs):
    maps = maps if isinstance(maps, nn.ModuleList) else [maps or nn.Identity()] * len(inputs)
    return [linear(x) for linear, x in zip(maps, inputs)]


class LayerwiseDistance(Distance):
    """RAIL-KD^l, Eq. 2, in [0, 4 sum alpha]. shared: one pair of maps for all slots, or one for each."""

    def __init__(self, d_s, d_t, num_slots, proj_dim=128, shared=False, **options):
        super().__init__(d_s, d_t, num_slots, **options)
        if self.shape_t[0] != num_slots:
            raise ValueError(f"{num_slots} slots need as many teacher layers, not {self.shape_t[0]}")
        self.proj_s, self.proj_t = (nn.Linear(d, proj_dim, self.bias) if shared else nn.ModuleList(
            nn.Linear(d, proj_dim, self.bias) for _ in range(num_slots)) for d in (d_s, d_t))
        self.proj_t.requires_grad_(self.train_t)

    def targets(self, pooled_t, chances):
        """Slot i: the mean of the layers' unit vectors under its map, each as likely as it is drawn."""
        z = [_apply(self.proj_t, [layer] * len(chances)) for layer in pooled_t.unbind(1)]   # (K, m) of (N, u)
        return [sum(p * unit(z_l[i]) for p, z_l in zip(row, z)) for i, row in enumerate(chances)]


class DirectDistance(LayerwiseDistance):
    """PKD (Sun et al., 2019): Eq. 2 without maps; where d_s != d_t each slot maps the student up to d_t."""

    def __init__(self, d_s, d_t, num_slots, **options):
        super().__init__(d_s, d_t, num_slots, proj_dim=d_t, **options)
        self.proj_s, self.proj_t = self.proj_s if d_s != d_t else None, None


class ConcatDistance(Distance):
    """RAIL-KD^c, Eq. 3, in [0, 4]: the slots side by side, maps (m d_s x u) and (k d_t x u), one distance."""

    def __init__(self, d_s, d_t, num_slots, proj_dim=128, **options):
        super().__init__(d_s, d_t, num_slots, **options)
        self.proj_s = nn.Linear(num_slots * d_s, proj_dim, self.bias)
        self.proj_t = nn.Linear(self.shape_t[0] * d_t, proj_dim, self.bias).requires_grad_(self.train_t)

    def inputs_s(self, pooled):
        return [pooled.flatten(1)]

    inputs_t = inputs_s


class GroupDistance(Distance):
    """CKD (Wu et al., 2020): teacher layers in m contiguous groups, sizes at most one apart; each slot is
    mapped up to the width of its concatenated group, as in the released code (the paper: down)."""

    def __init__(self, d_s, d_t, num_slots, **options):
        super().__init__(d_s, d_t, num_slots, **options)
        widths = [group.shape[1] for group in self.inputs_t(torch.zeros(1, *self.shape_t))]
        self.proj_s = nn.ModuleList(nn.Linear(d_s, width, self.bias) for width in widths)

    def inputs_t(self, pooled_t):
        return [group.flatten(1) for group in pooled_t.tensor_split(self.shape_s[0], dim=1)]


class AttentionDistance(Distance):
    """ALP-KD (Passban et al., 2021): mean squared error of each slot and its own mix of the teacher's layers.

    a_ik = softmax_k <s_i, t_k>, target_i = sum_k a_ik t_k; products unscaled, as in the original (recalled).
    `weights` (B, m, k): a of the last call. Where d_s != d_t each slot maps the student up to d_t.
    """

    def __init__(self, d_s, d_t, num_slots, **options):
        super().__init__(d_s, d_t, num_slots, **options)
        self.weights = None
        if d_s != d_t:
            self.proj_s = nn.ModuleList(nn.Linear(d_s, d_t, self.bias) for _ in range(num_slots))

    def term(self, z_s, z_t, index=None, labels=None):
        s, t = torch.stack(z_s, 1), torch.stack(z_t, 1)                             # (B, m, d_t), (B, k, d_t)
        weights = (s @ t.transpose(1, 2)).softmax(-1)                               # (B, m, k)
        self.weights = weights.detach()
        return F.mse_loss(s, weights @ t)

    def targets(self, pooled_t, chances):
        """No attention without a map yet: the mean of the layers, for every slot."""
        return [torch.einsum("kl,nld->nd", chances / len(chances), pooled_t)] * self.shape_s[0]


class ContrastiveDistance(ConcatDistance):
    """CoDIR (Sun et al., 2020) as InfoNCE: after the maps of Eq. 3, the teacher's vector t has to tell its
    own example's student vector s from others of a memory bank: cross-entropy of <t, .> / temperature.

    The bank keeps unit(momentum bank + (1 - momentum) s) for each of `num_examples` training rows, updated in
    training mode alone. Takes index= (B,), row numbers (else ValueError), and labels= (B,), known from a row's
    first batch on. Negatives, drawn with replacement (torch's global generator), are rows of another known label,
    or all other rows where there are none or labels are float (regression) or None.
    """

    def __init__(self, d_s, d_t, num_slots, num_examples, proj_dim=128, num_negatives=100, temperature=0.07,
                 momentum=0.5, teacher_proj="trained", **options):
        super().__init__(d_s, d_t, num_slots, proj_dim, teacher_proj=teacher_proj, **options)
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self.register_buffer("bank", unit(torch.randn(num_examples, proj_dim)))
        self.register_buffer("bank_labels", torch.full((num_examples,), -1))        # -1: unknown

    def term(self, z_s, z_t, index=None, labels=None):
        if index is None:
            raise ValueError("ContrastiveDistance needs index=, the row numbers of the batch")
        s, t, device = unit(z_s[0]), unit(z_t[0]), self.bank.device                 # (B, u), (B, u)
        index = torch.as_tensor(index, device=device)                               # (B,)
        with torch.no_grad():
            allowed = torch.arange(len(self.bank), device=device) != index[:, None]                 # (B, N)
            if labels is not None and not labels.is_floating_point():
                if self.training:
                    self.bank_labels[index] = labels
                others = (self.bank_labels != labels[:, None]) & (self.bank_labels >= 0)
                allowed = torch.where(others.any(1, keepdim=True), others, allowed)
            negatives = self.bank[torch.multinomial(allowed.float(), self.num_negatives, replacement=True)]
        scores = torch.cat([(t * s).sum(-1, keepdim=True), torch.einsum("bu,bku->bk", t, negatives)], 1)
        if self.training:
            self.bank[index] = unit(self.momentum * self.bank[index] + (1 - self.momentum) * s.detach())
        return F.cross_entropy(scores / self.temperature, torch.zeros_like(index))


SELECTIONS = ("random", "skip", "last", "reverse", "middle", "permuted", "all")
DISTANCES = {"layerwise": LayerwiseDistance, "concat": ConcatDistance, "direct": DirectDistance,
             "group": GroupDistance, "attention": AttentionDistance, "contrastive": ContrastiveDistance}
METHODS = {                                         # name: (selection of teacher layers, distance, pooling)
    "none": (None, None, None),                     # fine-tuning, no teacher
    "kd": (None, None, None),                       # logits alone
    "pkd-skip": ("skip", "direct", "first"),
    "pkd-last": ("last", "direct", "first"),
    "ckd": ("all", "group", "mean"),
    "alp-kd": ("all", "attention", "mean"),
    "codir": ("all", "contrastive", "mean"),
    "rail-l": ("random", "layerwise", "mean"),
    "rail-c": ("random", "concat", "mean"),
    "reverse": ("reverse", "direct", "mean"),
    "all-to-one": ("middle", "direct", "mean"),
    "permuted": ("permuted", "direct", "mean"),
}


class IntermediateLoss(nn.Module):
    """The intermediate term of a method, for any loop: which layers (selection) and how far (distance).

        ild = IntermediateLoss("rail-c", num_layers_s=6, num_layers_t=12, d_s=384, d_t=768)
        ild.fit((hidden_states_s, mask_s, hidden_states_t, mask_t) for ... in a few batches)
        ild.set_epoch(epoch)                        # the draw, at the start of every epoch
        loss = ce + kd + ild(hidden_states_s, mask_s, hidden_states_t, mask_t)

    hidden_states: tuples of `output_hidden_states=True`, blocks + 1 tensors (B, L, d). Masks (B, L), or None
    where nothing is padded; L may differ. `select`, `distance` replace the method's own; options go to the
    distance. Its trainable parameters belong in the optimizer. `.layers_s`, `.layers_t`: the layers in use.
    ValueError for unknown names, impossible layers, wrong shapes; RuntimeError before the draw or the fit.
    """

    def __init__(self, method, num_layers_s, num_layers_t, d_s, d_t, seed=0, select=None, distance=None,
                 **distance_options):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}, known: {', '.join(METHODS)}")
        self.select, distance = select or METHODS[method][0], distance or METHODS[method][1]
        if self.select not in SELECTIONS or distance not in DISTANCES:
            raise ValueError(f"{method!r} needs a selection ({', '.join(SELECTIONS)}) and a distance "
                             f"({', '.join(DISTANCES)}): got {self.select!r} and {distance!r}")
        self.pool_tokens = first_token if METHODS[method][2] == "first" else mean_pool
        self.blocks, self.seed = {"s": num_layers_s, "t": num_layers_t}, seed
        self.layers_s = list(range(1, num_layers_s))                        # every one but the last
        self.set_epoch(0)
        self.distance = DISTANCES[distance](d_s, d_t, len(self.layers_s), num_targets=len(self.layers_t),
                                            **distance_options)
        self.layers_t = None if self.select == "random" else self.layers_t          # None: not drawn yet

    def set_epoch(self, epoch):
        """The teacher layers of an epoch: for `random` a new draw."""
        self.layers_t = select_layers(self.select, self.blocks["t"], len(self.layers_s), self.seed, epoch)

    def pool(self, side, hidden_states, mask, layers=None):
        """Hidden states, mask of side "s" or "t" -> pooled vectors (B, k, d), or just of the named layers."""
        layers = layers or {"s": self.layers_s, "t": self.layers_t}[side]
        if layers is None:
            raise RuntimeError("no layers drawn yet: call set_epoch(epoch) at the start of every epoch")
        if len(hidden_states) != self.blocks[side] + 1:
            raise ValueError(f"{len(hidden_states)} hidden states, not {self.blocks[side] + 1}, of side {side}: "
                             "[0] is the embedding output, [i] the output of block i")
        mask = torch.ones_like(hidden_states[0][..., 0]) if mask is None else mask
        return torch.stack([self.pool_tokens(hidden_states[layer], mask) for layer in layers], 1)

    def forward(self, hidden_states_s, mask_s, hidden_states_t, mask_t, index=None, labels=None):
        pooled_s, pooled_t = self.pool("s", hidden_states_s, mask_s), self.pool("t", hidden_states_t, mask_t)
        return self.forward_pooled(pooled_s, pooled_t, index, labels)

    def forward_pooled(self, pooled_s, pooled_t, index=None, labels=None):
        """The same from vectors pooled before: of layers_s (B, m, d_s) and of layers_t (B, k, d_t)."""
        return self.distance(pooled_s, pooled_t, index=index, labels=labels)

    @torch.no_grad()
    def fit(self, batches):
        """The ridge start, from an iterable of (hidden_states_s, mask_s, hidden_states_t, mask_t)."""
        pooled = [(self.pool("s", h_s, mask_s), self.pool("t", h_t, mask_t, range(1, self.blocks["t"])))
                  for h_s, mask_s, h_t, mask_t in batches]
        if not pooled:
            raise ValueError("fit got no batches")
        self.fit_pooled(*map(torch.cat, zip(*pooled)))

    def fit_pooled(self, pooled_s, pooled_t):
        """The same from pooled vectors: layers_s (N, m, d_s), ALL teacher layers 1..n-1 (N, n-1, d_t)."""
        n, m, comb = self.blocks["t"], len(self.layers_s), math.comb
        layers = range(1, n)
        if self.select == "random":                 # P(layer l is the i-th smallest of m out of 1..n-1)
            chances = [[comb(l - 1, i - 1) * comb(n - 1 - l, m - i) / comb(n - 1, m) for l in layers]
                       for i in range(1, m + 1)]
        else:
            chances = [[float(l == layer) for l in layers] for layer in self.layers_t]
        self.distance.fit(pooled_s, pooled_t, torch.tensor(chances))


# ----------------------------------------------------------------------------------------- end of the method

# =================================================================================================== the run

GLUE = {  # task: (text columns, metrics, of which the first selects the epoch)
    "sst2": (["sentence"], ["accuracy"]), "cola": (["sentence"], ["matthews"]),
    "mrpc": (["sentence1", "sentence2"], ["f1", "accuracy"]), "qqp": (["question1", "question2"], ["f1", "accuracy"]),
    "stsb": (["sentence1", "sentence2"], ["pearson", "spearman"]), "mnli": (["premise", "hypothesis"], ["accuracy"]),
    "qnli": (["question", "sentence"], ["accuracy"]), "rte": (["sentence1", "sentence2"], ["accuracy"]),
    "wnli": (["sentence1", "sentence2"], ["accuracy"])}
WEIGHTS = {"none": (1.0, 0.0, 0.0), "kd": (0.5, 0.5, 0.0)}                # CE, KD, ILD; else 1/3 each (Eq. 4)
ADVICE = ("local folders for --teacher, --student and --data-root need no hub, HF_HUB_OFFLINE=1 uses what was "
          "downloaded before, --task toy needs no download at all")

class UserError(Exception):
    """The user's mistake: one line that says what is wrong and how to mend it. Exit code 2."""

def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

def toy_table(size, seed):
    """A little language: the last clause decides, each "not" turns it round. {"text": [..], "label": [..]}"""
    rng, table = random.Random(f"toy {seed}"), {"text": [], "label": []}
    for _ in range(size):
        clauses = [(rng.randrange(40), rng.randint(0, 2), rng.randrange(80)) for _ in range(rng.randint(1, 4))]
        table["text"].append(" but ".join(f"the noun{n} is {'not ' * nots}word{w}" for n, nots, w in clauses))
        table["label"].append(["bad", "good"][(clauses[-1][1] + clauses[-1][2]) % 2])
    return table

def toy_model(folder, layers, width):
    """An untrained BERT for the toy language, in a folder like any other checkpoint's: its path."""
    from transformers import BertConfig, BertForMaskedLM
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", "not", "but"]
    words += [f"noun{i}" for i in range(40)] + [f"word{i}" for i in range(80)]
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16,
        intermediate_size=2 * width, max_position_embeddings=128)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    return str(folder)

def read_tables(args):
    """{"train": {column: list}, "validation..": ..} from the hub, --data-root, one's own files or (toy) thin air,
    and the label names where the source has them."""
    if args.task == "toy":
        return {"train": toy_table(3000, 1), "validation": toy_table(1000, 2)}, ["bad", "good"]
    import datasets
    import pandas
    if args.train_file:
        readers = {".csv": lambda path: pandas.read_csv(path, keep_default_na=False),
                   ".tsv": lambda path: pandas.read_csv(path, sep="\t", keep_default_na=False),
                   ".jsonl": lambda path: pandas.read_json(path, lines=True, dtype=False, convert_dates=False),
                   ".parquet": pandas.read_parquet}
        tables = {}
        for split, path in (("train", args.train_file), ("validation", args.validation_file)):
            reader = readers.get(Path(path).suffix.lower().replace(".json", ".jsonl").replace("ll", "l"))
            try:
                tables[split] = {str(k): list(v) for k, v in reader(path).to_dict("list").items()}
            except Exception as error:                              # the parsers' errors have no base in common
                raise UserError(f"cannot read {path}: {first_line(error)} (known: {', '.join(readers)})") from error
        return tables, None
    root = Path(args.data_root or "") / "nyu-mll" / "glue" / args.task
    files = {split: [str(f) for f in sorted(root.glob(f"{split}-*.parquet"))]
             for split in ("train", "validation", "validation_matched", "validation_mismatched")}
    try:
        splits = (datasets.load_dataset("parquet", data_files={k: v for k, v in files.items() if v})
                  if args.data_root else datasets.load_dataset("nyu-mll/glue", args.task))
    except (OSError, ValueError) as error:
        raise UserError(f"no data for {args.task} ({first_line(error)}): {ADVICE}") from error
    tables = {split: splits[split].to_dict() for split in splits if not split.startswith("test")}
    names = getattr(splits["train"].features["label"], "names", None)
    if names:
        for table in tables.values():
            table["label"] = [names[label] if label >= 0 else None for label in table["label"]]
    return tables, names

def load_data(args):
    """texts {split: [column, ..]}, labels {split: (N,)}, names (None: regression), metrics, dev (split names)."""
    tables, names = read_tables(args)
    columns = [x for x in tables["train"] if x not in ("label", "idx", "id")]
    known = tables["train"].get("label", [])
    metrics = ["pearson", "spearman"] if {*map(type, known)} == {float} else ["accuracy"]
    columns, metrics = GLUE.get(args.task, (columns, metrics))
    if metrics[0] != "pearson":
        names = names or sorted({*known}, key=lambda label: (isinstance(label, str), label))
    data = argparse.Namespace(texts={}, labels={}, metrics=metrics, names=names and [str(x) for x in names],
                              dev=[split for split in tables if split != "train"])
    for split, table in tables.items():
        if "label" not in table or not 1 <= len(columns) <= 2 or not {*columns} <= {*table}:
            raise UserError(f"{split} data: found columns {', '.join(table)}; needed: label and one or two of text, "
                            "by the same names in both files")
        rows = range(len(table["label"]))
        strange = {x for x in table["label"] if (x not in names if names else not math.isfinite(x))}
        if not rows or strange:
            raise UserError(f"{split} data: " + (f"labels {sorted(map(str, strange))} do not occur in the training data"
                                                 if rows else "no rows"))
        for column in columns:
            if not all(isinstance(text, str) for text in table[column]):
                raise UserError(f"{split} data: column {column!r} is not text throughout")
        if split == "train" and args.max_train_examples < len(rows):
            rows = sorted(random.Random("subset").sample(rows, args.max_train_examples))
        data.texts[split] = [[table[column][row] for row in rows] for column in columns]
        data.labels[split] = torch.tensor([names.index(table["label"][row]) if names else table["label"][row]
                                           for row in rows])
    return data

class Side:
    """A model, teacher or student, with its own tokenizer and so its own tokens of every split."""

    def __init__(self, role, name, data, args):
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
        count = len(data.names or [0])
        head = dict(num_labels=count, id2label=dict(enumerate(data.names)), label2id={
            x: i for i, x in enumerate(data.names)}) if data.names else dict(num_labels=1, problem_type="regression")
        try:
            config = AutoConfig.from_pretrained(name)
            finished = any("SequenceClassification" in x for x in config.architectures or [])
            if role == "teacher" and finished and config.num_labels != count:
                raise UserError(f"the teacher {name} knows {config.num_labels} labels, the task has {count}")
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True,
                **({} if role == "teacher" and finished else head))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load the {role} {name} ({first_line(error)}): {ADVICE}") from error
        self.has_head, self.name, self.args = finished and not info["missing_keys"], name, args
        self.model, self.order = self.model.float().to(args.device), list(range(count))
        self.blocks, self.width = self.model.config.num_hidden_layers, self.model.config.hidden_size
        self.params, takes = sum(p.numel() for p in self.model.parameters()), inspect.signature(self.model.forward)
        self.tokens = {split: {k: v for k, v in self.tokenizer(
            *texts, truncation=True, max_length=args.max_length).items() if k in takes.parameters}
            for split, texts in data.texts.items()}                 # DistilBERT, say, takes no token_type_ids
        self.lengths = {k: torch.tensor([*map(len, tokens["input_ids"])]) for k, tokens in self.tokens.items()}

    def __call__(self, split, rows):
        """Rows (B,) of a split -> logits (B, C) in 32 bits, hidden states (tuple of (B, L, d)), mask (B, L)."""
        inputs = self.tokenizer.pad({k: [v[row] for row in rows.tolist()] for k, v in self.tokens[split].items()},
                                    return_tensors="pt")
        inputs = {k: (v.pin_memory() if self.args.device.type == "cuda" else v).to(
            self.args.device, non_blocking=True) for k, v in inputs.items()}
        with torch.autocast(self.args.device.type, self.args.dtype, enabled=self.args.dtype != torch.float32):
            output = self.model(**inputs, output_hidden_states=True)
        return output.logits.float()[:, self.order], output.hidden_states, inputs["attention_mask"]

    @torch.no_grad()
    def map(self, split, rows, function):
        """function(logits, hidden_states, mask) of the rows, in eval mode: a tensor (len(rows), ..) on the CPU."""
        self.model.eval()
        order = self.lengths[split][rows].argsort(stable=True)
        return torch.cat([function(*self(split, part)).cpu() for part in rows[order].split(64)])[order.argsort()]

def batches(lengths, size, seed, epoch):
    """Groups of `size` rows of like length, in random order; new in every epoch, the last partial one kept."""
    generator = torch.Generator().manual_seed(random.Random(f"batches {seed} {epoch}").getrandbits(63))
    runs = torch.randperm(len(lengths), generator=generator).split(50 * size)
    groups = [group for run in runs for group in run[lengths[run].argsort(stable=True)].split(size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]

def make_optimizer(modules, args):
    """AdamW over everything trainable; weight decay from two dimensions on, so not for biases and norms."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, fused=args.device.type in ("cpu", "cuda"))

def loss_terms(student, teacher, ild, labels, rows, args):
    """CE, KD and ILD of a batch: rows (B,) -> (3,), 0 for what the method does not have."""
    logits_s, hidden_s, mask_s = student("train", rows)
    index = rows.to(args.device, non_blocking=True)
    labels = labels[index]
    ce = F.mse_loss(logits_s[:, 0], labels) if labels.is_floating_point() else F.cross_entropy(logits_s, labels)
    kd = inter = torch.zeros_like(ce)
    if teacher:
        with torch.no_grad():
            logits_t, hidden_t, mask_t = teacher("train", rows)
        kd = kd_loss(logits_s, logits_t, args.temperature)
        if ild:
            inter = ild(hidden_s, mask_s, hidden_t, mask_t, index=index, labels=labels)
    return torch.stack([ce, kd, inter])

def train(student, data, args, folder, teacher=None, ild=None):
    """Train on Eq. 4. folder/model holds the best epoch, folder/log.jsonl the history, which is returned."""
    modules, labels = [student.model] + [ild] * bool(ild), data.labels["train"].to(args.device)
    optimizer, size = make_optimizer(modules, args), args.batch_size * args.grad_accumulation
    params = [p for group in optimizer.param_groups for p in group["params"]]
    steps = args.epochs * math.ceil(len(labels) / size)
    warm = max(1, args.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm)))
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    weights, history, start = torch.tensor(args.weights, device=args.device), [], time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("")
    watch = make_watch(student, teacher, ild, data)
    before = watch()["cosine_s"]
    torch.manual_seed(args.seed)
    for epoch in range(1, args.epochs + 1):
        if ild:
            ild.set_epoch(epoch)
        for module in modules:
            module.train()
        sums, began = torch.zeros(4, device=args.device), time.perf_counter()
        for group in progress(batches(student.lengths["train"], size, args.seed, epoch), f"epoch {epoch}"):
            for rows in group.split(args.batch_size):               # the loss is a mean over the whole group
                terms = loss_terms(student, teacher, ild, labels, rows, args)
                loss = (weights * terms).sum()
                scaler.scale(loss * (len(rows) / len(group))).backward()
                sums += torch.cat([loss[None], terms]).detach() * len(rows)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
        means = (sums / len(labels)).tolist()                       # the only wait for the device in an epoch
        seconds = time.perf_counter() - began
        if not math.isfinite(means[0]):
            raise UserError(f"epoch {epoch}: loss {means[0]} (ce, kd, ild {means[1:]}): lower --lr or use --amp off")
        used = [True, True, bool(teacher), bool(ild)]
        row = {"epoch": epoch, "layers_t": ild and ild.layers_t,
               **{name: mean if use else None for name, mean, use in zip(("loss", "ce", "kd", "ild"), means, used)},
               **watch(), "seconds": seconds, "examples_per_s": len(labels) / seconds,
               "metrics": evaluate(student, data)[0]}
        history.append(row)
        best = max(history, key=score)                              # of equal ones the first
        if best is row:
            save(student, folder / "model")
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"epoch {epoch}/{args.epochs}" + (f"  layers {ild.layers_t}" if ild else "") + "  " + "  ".join(
            f"{name} {row[name]:.3f}" for name in ("loss", "ce", "kd", "ild") if row[name] is not None) +
            f"  {next(iter(row['metrics']))} {score(row):.4f} (best {score(best):.4f})  {seconds:.1f} s, "
            f"{row['examples_per_s']:.0f} examples/s", flush=True)
        if epoch == 1:
            print(f"about {(time.perf_counter() - start) * args.epochs / 60:.1f} min for {args.epochs} epochs")
        if before and 1 - row["cosine_s"] < 0.1 * (1 - before):
            print(f"WARNING: the student collapses: mean cosine between its examples' states {row['cosine_s']:.3f}, "
                  f"{before:.3f} before training")
        if epoch - best["epoch"] >= args.patience:
            print(f"stopped: no better {next(iter(row['metrics']))} for {args.patience} epochs")
            break
    return history

def progress(items, title):
    from tqdm import tqdm
    return tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty())

def score(row):
    return next(iter(row["metrics"].values()))

def measure(name, logits, labels):
    """A metric from logits (N, C) and labels (N,); where it is not defined (constant predictions) 0."""
    from scipy import stats
    from sklearn import metrics
    known = {"accuracy": metrics.accuracy_score, "f1": metrics.f1_score, "matthews": metrics.matthews_corrcoef,
             "pearson": lambda y, x: stats.pearsonr(y, x)[0], "spearman": lambda y, x: stats.spearmanr(y, x)[0]}
    value = known[name](labels.numpy(), (logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).numpy())
    return float(value) if math.isfinite(value) else 0.0

def evaluate(side, data):
    """All metrics on all dev sets, {"accuracy": .., "accuracy_mismatched": ..}, and the pass's examples/s."""
    began, results = time.perf_counter(), {}
    for split in data.dev:
        logits = side.map(split, torch.arange(len(data.labels[split])), lambda logits, hidden, mask: logits)
        suffix = split.removeprefix("validation").removeprefix("_matched")
        results |= {name + suffix: measure(name, logits, data.labels[split]) for name in data.metrics}
    return results, sum(len(data.labels[split]) for split in data.dev) / (time.perf_counter() - began)

def spread(vectors):
    """sqrt(1 - |mean unit vector|^2) of (N, u): 0 where all point one way."""
    return (1 - unit(vectors).mean(0).square().sum()).clamp(min=0).sqrt().item()

def mean_cosine(pooled):
    """Mean cosine between different examples' vectors, (N, m, d), over all m layers; None for a single one."""
    total, size = unit(pooled).sum(0).square().sum(-1).mean().item(), len(pooled)
    return (total - size) / (size * (size - 1)) if size > 1 else None

def make_watch(student, teacher, ild, data):
    """A function that measures how alike the student's states are, on up to 256 fixed dev examples."""
    size, pool = len(data.labels[data.dev[0]]), ild.pool_tokens if ild else mean_pool
    rows = torch.arange(0, size, math.ceil(size / 256))

    def states(side):
        return side.map(data.dev[0], rows, lambda logits, hidden, mask: torch.stack(
            [pool(layer, mask) for layer in hidden[1:-1]], 1)).to(side.args.device)    # (N, blocks - 1, d)

    pooled_t = states(teacher) if ild else None

    @torch.no_grad()
    def watch():
        pooled_s, spreads = states(student), {"spread_s": None, "spread_t": None}
        if ild and ild.layers_t and ild.distance.proj_s is not None:
            chosen = pooled_t[:, [layer - 1 for layer in ild.layers_t]]
            for name, vectors in zip(spreads, ild.distance.project(pooled_s, chosen)):
                spreads[name] = sum(map(spread, vectors)) / len(vectors)
        return spreads | {"cosine_s": mean_cosine(pooled_s)}
    return watch

def save(side, folder):
    """Model and tokenizer, written beside `folder` and then put in its place."""
    partial = folder.with_name(folder.name + ".partial")
    side.model.save_pretrained(partial)
    side.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

def prepare_teacher(data, args):
    """The teacher, fine-tuned if need be, in eval mode, without gradient; its dev metrics; its examples/s."""
    settings = {k: vars(args)[k] for k in (
        "task", "teacher", "max_length", "teacher_epochs", "teacher_lr", "teacher_seed", "amp", "batch_size",
        "grad_accumulation", "weight_decay", "warmup")} | {"data": [data.texts, data.names, data.labels["train"].tolist()]}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = Path(args.output_dir) / args.task / f"teacher-{Path(args.teacher).name}-{key}"
    made = (folder / "done").exists()
    torch.manual_seed(args.teacher_seed)                            # draws the head of a new one
    teacher = Side("teacher", str(folder / "model") if made else args.teacher, data, args)
    if not teacher.has_head:
        print(f"teacher  {describe(teacher)} has no head for this task yet: fine-tuned first, in {folder}")
        tuning = {"epochs": args.teacher_epochs, "patience": args.teacher_epochs, "lr": args.teacher_lr,
                  "seed": args.teacher_seed, "weights": (1.0, 0.0, 0.0)}
        train(teacher, data, argparse.Namespace(**vars(args) | tuning), folder)
        teacher, made = Side("teacher", str(folder / "model"), data, args), True
        (folder / "done").touch()
    teacher.model.eval().requires_grad_(False)
    if args.teacher_labels:
        if sorted(args.teacher_labels) != sorted(data.names or []):
            raise UserError(f"--teacher-labels must name each label once: {', '.join(data.names or ['(regression)'])}")
        teacher.order = [args.teacher_labels.index(name) for name in data.names]
    if data.names and not made:
        check_order(teacher, data)
    metrics, speed = evaluate(teacher, data)
    labels = data.labels[data.dev[0]]
    always = torch.eye(len(data.names))[labels.mode().values] if data.names else torch.zeros(1)
    floor = measure(data.metrics[0], always.expand(len(labels), -1), labels)
    print(f"teacher  {describe(teacher)}; dev {metrics}, majority baseline {floor:.4f}")
    if score({"metrics": metrics}) <= floor + 0.01:
        print("WARNING: the teacher is no better than the majority baseline. Is it fine-tuned for this very task?")
    return teacher, metrics, speed

def check_order(teacher, data):
    """Stop where the teacher's labels stand in another order: an assignment on the confusion matrix tells."""
    from scipy.optimize import linear_sum_assignment
    labels, count, order = data.labels[data.dev[0]], len(data.names), teacher.order
    teacher.order = list(range(count))
    answers = teacher.map(data.dev[0], torch.arange(len(labels)), lambda logits, hidden, mask: logits.argmax(1))
    confusion = torch.bincount(labels * count + answers, minlength=count * count).view(count, count)
    best = linear_sum_assignment(-confusion.numpy())[1].tolist()                    # label i is answer best[i]
    now, then = (confusion[range(count), x].sum().item() / len(labels) for x in (order, best))
    teacher.order = order
    if then > now + 0.1:
        names = ",".join(data.names[best.index(i)] for i in range(count))
        raise UserError(f"the teacher's dev accuracy is {now:.3f}, but {then:.3f} with its labels in another order: pass "
                        f"--teacher-labels {names}")

def describe(side):
    return f"{side.name} ({side.model.config.model_type}, {side.blocks} x {side.width}, {side.params / 1e6:.1f} M)"

def run(args):
    """What the command line asks for, from the data to the finished student: the results."""
    config = {k: v for k, v in vars(args).items() if k not in ("overwrite", "report", "device")}
    name = "-".join(filter(None, (args.method, args.select, args.distance, f"seed{args.seed}")))
    folder = Path(args.output_dir) / args.task / name
    if (folder / "results.json").exists() and not args.overwrite:
        results = json.loads((folder / "results.json").read_text())
        changed = [k for k in config if json.loads(json.dumps(config[k])) != results["config"].get(k)]
        if changed:
            raise UserError(f"{folder} holds a run with other settings ({', '.join(changed)}): pass --overwrite, or "
                            "another --output-dir")
        print("finished before, these are the stored results (--overwrite runs it anew)")
        return close(results)
    (folder / "results.json").unlink(missing_ok=True)
    set_up(args)
    if args.task == "toy":
        args.teacher, args.student = (toy_model(Path(args.output_dir) / "toy" / name, *size) for name, size in (
            ("untrained-teacher", (6, 128)), ("untrained-student", (3, 32))))
    data = load_data(args)
    torch.manual_seed(args.seed)                                    # draws the student's head
    student, teacher, ild, teacher_metrics, speed_t = Side("student", args.student, data, args), None, None, None, None
    if args.weights[1] or args.weights[2]:
        teacher, teacher_metrics, speed_t = prepare_teacher(data, args)
    if args.weights[2]:
        ild = make_loss(student, teacher, data, args)
    print(f"student  {describe(student)}\n"
          f"data     {args.task}: {len(data.labels['train'])} train, "
          f"{', '.join(f'{len(data.labels[split])} {split}' for split in data.dev)}; epoch chosen by {data.metrics[0]}\n"
          f"method   {name}: " + (f"layers {ild.layers_s} <- " + str(ild.layers_t or f"{len(ild.layers_s)} drawn from "
          f"1..{teacher.blocks - 1} in each epoch") if ild else "no intermediate layers") +
          f"; weights {', '.join(f'{w:.2f}' for w in args.weights)} (CE, KD, ILD), T {args.temperature}\n"
          f"training {args.epochs} epochs, batch {args.batch_size} x {args.grad_accumulation}, lr {args.lr}, "
          f"{str(args.dtype).removeprefix('torch.')} on {args.device}", flush=True)
    history = train(student, data, args, folder, teacher, ild)
    best = max(history, key=score)
    results = {
        "task": args.task, "method": args.method, "seed": args.seed, "metric": next(iter(best["metrics"])),
        "best_score": score(best), "best_epoch": best["epoch"], "last_score": score(history[-1]),
        "teacher_score": teacher and score({"metrics": teacher_metrics}), "teacher_metrics": teacher_metrics,
        "config": config, "versions": {"python": sys.version.split()[0]} | {
            x: importlib.metadata.version(x) for x in ("torch", "transformers", "datasets", "scikit-learn")},
        "device": str(args.device), "params_s": student.params, "params_t": teacher and teacher.params,
        "speed_s": evaluate(student, data)[1], "speed_t": speed_t, "model": str(folder / "model"), "history": history}
    write_json(folder / "results.json", results)
    return close(results)

def close(results):
    """The closing line; returns the results."""
    sides = [f"{who} {100 * results[score]:.2f}, {results['params' + side] / 1e6:.1f} M parameters, "
             f"{results['speed' + side]:.0f} examples/s" for who, score, side in
             (("student", "best_score", "_s"), ("teacher", "teacher_score", "_t")) if results["params" + side]]
    print(f"{results['metric']} (x 100, epoch {results['best_epoch']}): {'; '.join(sides)}\nstudent in {results['model']}")
    return results

def make_loss(student, teacher, data, args):
    """The intermediate loss, its ridge start made on up to 2,000 training examples."""
    if student.blocks > teacher.blocks:
        raise UserError(f"the student has {student.blocks} blocks, the teacher {teacher.blocks}: a deeper student has "
                        "more slots than there are teacher layers")
    given = {"proj_dim": args.proj_dim, "teacher_proj": args.teacher_proj, "start": args.start,
             "shared": args.shared_proj or None, "num_examples": len(data.labels["train"])}
    kind = DISTANCES[args.distance or METHODS[args.method][1]]
    takes = {x for base in kind.__mro__[:-1] for x in inspect.signature(base.__init__).parameters}
    options = {k: v for k, v in given.items() if v is not None and k in takes}
    try:
        ild = IntermediateLoss(args.method, student.blocks, teacher.blocks, student.width, teacher.width, args.seed,
                               args.select, args.distance, **options)
    except ValueError as error:
        raise UserError(first_line(error)) from error
    rows = torch.tensor(random.Random("ridge").sample(range(given["num_examples"]), min(2000, given["num_examples"])))
    pooled = [side.map("train", rows, lambda logits, hidden, mask: ild.pool(which, hidden, mask, range(1, side.blocks)))
              for which, side in (("s", student), ("t", teacher))]
    ild.fit_pooled(*pooled)
    return ild.to(args.device)

def report(folder):
    """A Markdown table of the finished runs below a folder: mean +- std over seeds (x 100), n; a dict of its cells."""
    cells, tasks = {}, []
    for path in sorted(Path(folder).rglob("results.json")):
        results = json.loads(path.read_text())
        label = path.parent.name.rsplit("-seed", 1)[0] + " lr {lr} batch {batch_size}".format(**results["config"])
        tasks = tasks if results["task"] in tasks else tasks + [results["task"]]
        cells.setdefault((label, results["task"]), []).append(results["best_score"])
        if results["teacher_score"] is not None:
            cells.setdefault(("teacher", results["task"]), []).append(results["teacher_score"])
    if not cells:
        raise UserError(f"no finished runs (results.json) below {folder}")
    print(f"| method | {' | '.join(tasks)} | average |\n|---|{'---|' * (len(tasks) + 1)}")
    for label in sorted({label for label, _ in cells}, key=lambda label: (label != "teacher", label)):
        row = [torch.tensor(cells.get((label, task), [])).mul(100) for task in tasks]
        if label == "teacher":
            row = [x.unique() for x in row]
        print(f"| {label} | " + " | ".join(f"{x.mean():.1f} ± {x.std():.1f} (n={len(x)})" if len(x) > 1 else
              f"{x[0]:.1f} (n=1)" if len(x) else "" for x in row) + " | " +
              (f"{torch.stack([x.mean() for x in row]).mean():.1f}" if all(map(len, row)) else "") + " |")
    return {f"{label}/{task}": scores for (label, task), scores in cells.items()}

def set_up(args):
    """Device and precision; quiet libraries; no waiting for a hub that cannot be reached."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args.device = torch.device(device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used ({first_line(error)})") from error
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bf16 = {"cuda": lambda: torch.cuda.get_device_capability(args.device) >= (8, 0),
            "cpu": lambda: bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))}.get(args.device.type, lambda: False)()
    auto = "bf16" if bf16 else "fp16" if args.device.type == "cuda" else "off"
    args.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[
        auto if args.amp == "auto" else args.amp]
    if args.dtype == torch.float16 and args.device.type != "cuda":
        raise UserError("--amp fp16 needs a GPU; take bf16 or off")
    torch.set_float32_matmul_precision("high")                      # TF32 where there is a GPU for it
    needs_hub = args.task != "toy" and not (all(Path(x).is_dir() for x in (args.teacher, args.student))
                                            and (args.data_root or args.train_file))
    if needs_hub and "HF_HUB_OFFLINE" not in os.environ and not reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

def reachable():
    """Does the hub answer within seconds? The libraries would retry for a minute."""
    answers = []

    def ask():
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5)
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except OSError:
            pass
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    return bool(answers)

def write_json(path, content):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

def number(kind, low, high=math.inf):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'} "
                                             f"from {low} to {high}")
        return value
    return parse

def triple(text):
    values = tuple(map(number(float, 0, 1e6), text.split(",")))
    if len(values) != 3 or not sum(values):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers CE,KD,ILD that are not all 0")
    return values

def parse(argv=None):
    parser = Parser(prog="railkd.py", description=__doc__.split("\n\n")[0])
    add, count, share = parser.add_argument, number(int, 1), number(float, 0, 1)
    add("--task", help=f"{', '.join(GLUE)} or toy (needs no download); with --train-file: any name")
    add("--method", default="rail-c", choices=METHODS, metavar="M", help=f"{', '.join(METHODS)} (default rail-c)")
    add("--select", choices=SELECTIONS, metavar="S", help=f"teacher layers, other than the method's: {', '.join(SELECTIONS)}")
    add("--distance", choices=DISTANCES, metavar="D", help=f"distance, other than the method's: {', '.join(DISTANCES)}")
    add("--teacher", default="bert-base-uncased", help="hub name or folder (paper: BERT-12)")
    add("--student", default="distilbert-base-uncased", help="hub name or folder (paper: DistilBERT-6)")
    add("--data-root", help="folder of local clones named like the hub's: DIR/nyu-mll/glue (default: the hub)")
    add("--train-file", help="one's own data: .csv, .tsv, .jsonl or .parquet with `label` and one or two text columns")
    add("--validation-file", help="the same for validation")
    add("--output-dir", default="runs", help="results go to DIR/TASK/METHOD-seedN")
    add("--epochs", type=count, default=40, help="paper: 40")
    add("--patience", type=count, default=5, help="stop after as many epochs without a better dev score (our choice)")
    add("--batch-size", type=count, default=32, help="paper: searched in 8, 16, 32")
    add("--grad-accumulation", type=count, default=1, help="batches an optimizer step (our choice)")
    add("--lr", type=number(float, 0, 1), default=2e-5, help="paper: searched in 1e-5, 2e-5, 5e-5, 4e-6")
    add("--weight-decay", type=share, default=0.01, help="AdamW's, from two dimensions on (our choice)")
    add("--warmup", type=share, default=0.1, help="share of the steps; then linear decay (our choice)")
    add("--weights", type=triple, metavar="CE,KD,ILD", help="Eq. 4; paper: 1/3 each; kd: 1/2,1/2,0; none: 1,0,0")
    add("--temperature", type=number(float, 1e-3), default=2.0, help="of the KD term (our choice; the paper is silent)")
    add("--proj-dim", type=count, help="width u of the maps (paper: 128)")
    add("--teacher-proj", choices=("frozen", "trained"), help="teacher's map (paper: open; ours frozen, codir trained)")
    add("--start", choices=("ridge", "random"), help="student's map: least squares (ours) or as drawn (literal)")
    add("--shared-proj", action="store_true", help="one pair of maps for all slots, not one for each (rail-l)")
    add("--max-length", type=number(int, 4), default=128, help="tokens (our choice)")
    add("--max-train-examples", type=count, default=sys.maxsize, help="a random subset, the same for every seed")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=42, help="student's head, draw, order, dropout; paper: 5 seeds")
    add("--teacher-epochs", type=count, default=3, help="fine-tuning of a teacher without a trained head (our choice)")
    add("--teacher-lr", type=number(float, 0, 1), default=2e-5, help="the same (our choice)")
    add("--teacher-seed", type=number(int, 0, 2 ** 32 - 1), default=42, help="the same; not moved by --seed")
    add("--teacher-labels", type=lambda text: text.split(","), metavar="A,B,..", help="label names in the teacher's order")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="paper: mixed precision; auto: by hardware")
    add("--device", help="cpu, cuda, cuda:1, .. (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="run anew where there are results already")
    add("--report", metavar="DIR", help="print a table of the finished runs below DIR, train nothing")
    if "toy" in (argv or sys.argv):
        parser.set_defaults(epochs=6, lr=2e-3, teacher_epochs=6, teacher_lr=1e-3)
    args = parser.parse_args(argv)
    if args.report:
        return parser, args
    own = METHODS[args.method][1] or args.distance
    if args.train_file or args.validation_file:
        if not (args.train_file and args.validation_file) or args.task in [*GLUE, "toy"]:
            parser.error("--train-file and --validation-file belong together, with no --task or a name of your own")
        args.task = args.task or Path(args.train_file).stem
    elif args.task not in [*GLUE, "toy"]:
        parser.error(f"--task must be one of {', '.join([*GLUE, 'toy'])} (or --train-file and --validation-file), "
                     f"got {args.task!r}")
    args.weights = args.weights or (WEIGHTS.get(args.method) if not args.distance else None) or (1 / 3, 1 / 3, 1 / 3)
    if args.weights[2] and not own:
        parser.error(f"method {args.method} has no intermediate term: the third of --weights must be 0")
    return parser, args

def main(argv=None):
    """Run the command line `argv`: the results of the run, or of --report, as a dict. SystemExit(2) on mistakes."""
    parser, args = parse(argv)
    try:
        return report(args.report) if args.report else run(args)
    except UserError as error:
        parser.error(" ".join(str(error).split()))

if __name__ == "__main__":
    main()
