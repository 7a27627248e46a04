# SPDX-License-Identifier: MIT
"""RAIL-KD in one file: RAndom Intermediate Layer mapping for Knowledge Distillation (arXiv 2109.10164).

HEADER
"""
from __future__ import annotations

import functools
import math
import random

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
