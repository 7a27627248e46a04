# SPDX-License-Identifier: MIT
"""RAIL-KD (arXiv 2109.10164) in one file: compress a fine-tuned encoder into a student of few layers.

Besides the teacher's logits the student matches its mean-pooled intermediate layers; which ones is drawn at
random, sorted, every epoch: `IntermediateLoss`. Try it: python railkd.py --task toy. Figures: README.md."""
import argparse, contextlib, ctypes, hashlib, inspect, json, math, os
import random, shutil, signal, sys, time, urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ================================================================================================ the method
# Needs torch alone (copied: math, random). B batch, L tokens, d_s, d_t widths, n teacher blocks, m slots of
# the student, k teacher vectors, u width of maps, C classes; hidden_states[0]: embeddings, [i]: block i.
def unit(vectors):
    return F.normalize(vectors, dim=-1)                             # length 1

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
    """RAIL-KD's draw (section 3): k of the layers 1..num_layers-1, sorted, all subsets equally likely; a
    function of its arguments alone, no global generator. ValueError where k layers are not to be had."""
    if not 1 <= k <= num_layers - 1:
        raise ValueError(f"cannot draw k = {k} intermediate layers from num_layers = {num_layers} blocks")
    return sorted(random.Random(f"layers {seed} {epoch}").sample(range(1, num_layers), k))

def select_layers(name, num_layers, k, seed=0, epoch=0):
    """The teacher layers that a selection gives to k student slots: a flat list of ints in 1..num_layers-1,
    for "final" the last block. ValueError for an unknown name and for more slots than layers."""
    if name not in SELECTIONS:
        raise ValueError(f"unknown selection {name!r}, known: {', '.join(SELECTIONS)}")
    draw = name != "final" and sample_layers(num_layers, k, seed, epoch)
    skip = [i * num_layers // (k + 1) for i in range(1, k + 1)]     # 2, 4, .., 10 of 12; 4, 8, .., 20 of 24
    return {"random": draw, "skip": skip, "last": list(range(num_layers - k, num_layers)),
            "reverse": skip[::-1], "middle": [num_layers // 2] * k, "all": list(range(1, num_layers)),
            "permuted": random.Random(f"order {seed}").sample(skip, k), "final": [num_layers]}[name]

def kd_loss(logits_s, logits_t, temperature, max_temperature=None):
    """T^2 KL(teacher || student), mean over the batch (Hinton et al., 2014): (B, C), (B, C) -> scalar in 32
    bits; C = 1 (regression): mean squared error. With max_temperature that of logits_s and (1 - (T - 1) /
    max_temperature) logits_t (Annealing-KD, Jafari et al., 2021). ValueError for other shapes and T <= 0."""
    if logits_s.shape != logits_t.shape or logits_s.ndim != 2 or not temperature > 0:
        raise ValueError(f"need (B, C) twice, T > 0: {[*logits_s.shape]}, {[*logits_t.shape]}, {temperature}")
    logits_s, logits_t = logits_s.float(), logits_t.detach().float()
    if logits_s.shape[1] == 1 or max_temperature:
        return F.mse_loss(logits_s, (1 - (temperature - 1) / (max_temperature or math.inf)) * logits_t)
    log_p_s, log_p_t = (F.log_softmax(logits / temperature, dim=-1) for logits in (logits_s, logits_t))
    return temperature ** 2 * F.kl_div(log_p_s, log_p_t, log_target=True, reduction="batchmean")

def mixup_loss(mixed, clean, share):
    """CR-ILD's consistency (Ko et al., 2023): squared distance of pooled states (B, m, d) of mixed inputs, a
    share of each text and the rest of the reversed batch's, from both clean ones (no gradient), as units."""
    near = (unit(mixed) - unit(torch.stack([clean, clean.flip(0)]).detach())).square().sum(-1).mean((1, 2))
    return share * near[0] + (1 - share) * near[1]

def ridge(x, y, center=True, penalty=0.1):
    """Least squares, penalty * tr(x'x) / d, in 64 bits: x (N, d), y (N, u) -> weight (u, d), bias (u,)."""
    x, y = x.double().cpu(), y.double().cpu()
    mean_x, mean_y = x.mean(0) * center, y.mean(0) * center         # center=False: for a map without bias
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x                                                                  # (d, d)
    gram.diagonal().add_((penalty * gram.trace() / len(gram)).clamp(min=1e-12))
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, mean_y - weight @ mean_x

def gather(*values):                                   # those of all processes of torch.distributed, in order
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [values]
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, [x.cpu() if torch.is_tensor(x) else x for x in values])
    return parts

class Distance(nn.Module):
    """How far apart: distance(pooled_s (B, m, d_s), pooled_t (B, k, d_t)) -> scalar in 32 bits. Both are cut
    into pieces (a slot's layers side by side), mapped, compared (`term`): proj_s, proj_t lead to proj_dim,
    without it proj_s up to the teacher's width where they differ; each one nn.Linear (shared) or an
    nn.ModuleList. start "ridge": `fit`, once, sets proj_s by least squares. Paper: start "random", alpha (the
    pieces' weights) 1, teacher_proj "trained". ValueError: bad shapes, options. RuntimeError: missing fit."""
    def __init__(self, d_s, d_t, num_slots, num_targets=None, proj_dim=None, shared=False, bias=True,
                 teacher_proj="frozen", start="ridge", alpha=None, num_pieces=None, num_examples=None):
        super().__init__()
        self.bias, self.start, self.num_pieces = bias, start, (n := num_pieces or num_slots)
        a = torch.as_tensor([1.0] * n if alpha is None else alpha).float()
        if start not in ("random", "ridge") or teacher_proj not in ("trained", "frozen") or a.shape != (n,):
            raise ValueError(f"no such start, teacher_proj or alpha: {start!r}, {teacher_proj!r}, {alpha}")
        self.shape_s, self.shape_t = (num_slots, d_s), (num_targets or num_slots, d_t)
        widths_s, widths_t = ([piece.shape[1] for piece in self.pieces(torch.empty(1, *shape))]
                              for shape in (self.shape_s, self.shape_t))
        if shared and len({*widths_s}) + len({*widths_t}) > 2:
            raise ValueError(f"one map for all needs pieces of one width, not {widths_s} and {widths_t}")
        widths = [proj_dim or width for width in widths_t]          # what the maps lead to
        self.proj_s, self.proj_t = (
            None if not proj_dim and ins == widths[:len(ins)] else
            nn.Linear(ins[0], widths[0], bias) if shared else
            nn.ModuleList(nn.Linear(*x, bias) for x in zip(ins, widths)) for ins in (widths_s, widths_t))
        if self.proj_t is not None:
            self.proj_t.requires_grad_(teacher_proj == "trained")
        self.register_buffer("alpha", a)
        self.register_buffer("fitted", torch.tensor(False))         # in the state dict: fit was called
        self._ready = start == "random"                             # spares a GPU a look at it in every step
    def pieces(self, pooled):
        return [piece.flatten(1).float() for piece in pooled.tensor_split(self.num_pieces, dim=1)]
    def term(self, z_s, z_t, index=None, labels=None):
        """sum_i alpha_i |unit(z_t,i) - unit(z_s,i)|^2, mean over the batch (Eq. 2 and 3)."""
        return sum(a * (unit(t) - unit(s)).square().sum(-1).mean() for a, s, t in zip(self.alpha, z_s, z_t))
    def project(self, pooled_s, pooled_t):                          # after the maps: two lists of (B, width)
        if pooled_s.shape[1:] != self.shape_s or pooled_t.shape != (len(pooled_s), *self.shape_t):
            raise ValueError(f"need pooled vectors (B, *{self.shape_s}) and (B, *{self.shape_t}): "
                             f"got {[*pooled_s.shape]} and {[*pooled_t.shape]}")
        return _apply(self.proj_s, self.pieces(pooled_s)), _apply(self.proj_t, self.pieces(pooled_t.detach()))
    def forward(self, pooled_s, pooled_t, index=None, labels=None):
        self._ready = self._ready or self.proj_s is None or bool(self.fitted)
        if not self._ready:
            raise RuntimeError(f"{type(self).__name__}, start='ridge': call fit(...) once before training")
        with torch.autocast(pooled_s.device.type, enabled=False):
            return self.term(*self.project(pooled_s, pooled_t), index=index, labels=labels)
    @torch.no_grad()
    def fit(self, pooled_s, pooled_t, chances=None):
        """Ridge start of proj_s, to the unit targets. pooled_s (N, m, d_s); pooled_t (N, K, d_t), all layers
        that can be drawn; chances (k, K) that layer l is the i-th vector of a step (default: just these)."""
        if self.start == "random" or self.proj_s is None:
            return
        chances = (torch.eye(self.shape_t[0]) if chances is None else chances).to(pooled_t.device)
        maps, x, y = self.proj_s, self.pieces(pooled_s), self.targets(pooled_t.float(), chances)
        if isinstance(maps, nn.Linear):                             # each slot is N more examples for the map
            maps, x, y = [maps], [torch.cat(x)], [torch.cat(y)]
        for linear, x_i, y_i in zip(maps, x, y):
            weight, bias = ridge(x_i, y_i, center=self.bias)
            linear.load_state_dict({"weight": weight, "bias": bias} if self.bias else {"weight": weight})
        self.fitted.fill_(True)
    def targets(self, pooled_t, chances):                           # what maps should hit: (N, width)
        expected = torch.einsum("kl,nld->nkd", chances, pooled_t)
        return [unit(z) for z in _apply(self.proj_t, self.pieces(expected))]

def _apply(maps, inputs):
    maps = maps if isinstance(maps, nn.ModuleList) else [maps or nn.Identity()] * len(inputs)
    return [linear(x) for linear, x in zip(maps, inputs)]

class LayerwiseDistance(Distance):
    """RAIL-KD^l, Eq. 2, in [0, 4 sum alpha]. shared: one pair of maps for all slots, or one for each."""
    def __init__(self, d_s, d_t, num_slots, proj_dim=128, shared=True, **options):
        super().__init__(d_s, d_t, num_slots, proj_dim=proj_dim, shared=shared, **options)
        if self.shape_t[0] != num_slots:
            raise ValueError(f"{num_slots} slots need as many teacher layers, not {self.shape_t[0]}")
    def targets(self, pooled_t, chances):                           # mean of the layers' unit vectors
        z = [_apply(self.proj_t, [layer] * len(chances)) for layer in pooled_t.unbind(1)]   # (K, m) of (N, u)
        return [sum(p * unit(z_l[i]) for p, z_l in zip(row, z)) for i, row in enumerate(chances)]

class DirectDistance(LayerwiseDistance):
    """PKD (Sun et al., 2019): Eq. 2 without maps; where d_s != d_t each slot maps the student up to d_t."""
    def __init__(self, d_s, d_t, num_slots, proj_dim=None, shared=False, **options):
        super().__init__(d_s, d_t, num_slots, proj_dim, shared, **options)

class ConcatDistance(Distance):
    """RAIL-KD^c, Eq. 3, in [0, 4]: the slots side by side, maps (m d_s x u) and (k d_t x u), one distance."""
    def __init__(self, d_s, d_t, num_slots, proj_dim=128, shared=True, **options):
        super().__init__(d_s, d_t, num_slots, proj_dim=proj_dim, shared=True, num_pieces=1, **options)

class GroupDistance(Distance):
    """CKD (Wu et al., 2020): teacher layers in m contiguous groups, sizes at most one apart; each slot is
    mapped up to the width of its concatenated group, as in the released code (the paper: down)."""

class AttentionDistance(Distance):
    """ALP-KD (Passban et al., 2021): mean squared error of s_i and sum_k a_ik t_k, a_ik = softmax_k of
    <s_i, t_k> unscaled, as in the original (recalled). `weights` (B, m, k): a of the last call."""
    def pieces(self, pooled):
        return list(pooled.float().unbind(1))
    def term(self, z_s, z_t, index=None, labels=None):
        s, t = torch.stack(z_s, 1), torch.stack(z_t, 1)                             # (B, m, d_t), (B, k, d_t)
        weights = (s @ t.transpose(1, 2)).softmax(-1)                               # (B, m, k)
        self.weights = weights.detach()
        return F.mse_loss(s, weights @ t)
    def targets(self, pooled_t, chances):                           # no attention yet: the mean layer
        z_t = _apply(self.proj_t, self.pieces(torch.einsum("kl,nld->nkd", chances, pooled_t)))
        return [sum(z_t) / len(z_t)] * self.shape_s[0]

class ContrastiveDistance(ConcatDistance):
    """CoDIR (Sun et al., 2020) as InfoNCE on the maps of Eq. 3: the teacher's vector t has to tell its own
    student vector s from others in a memory bank, by <t, .> / temperature. The bank keeps unit(momentum bank
    + (1 - momentum) s) of num_examples rows, in training mode alone. Takes index= (B,), row numbers (else
    ValueError), labels= (B,), known from a row's first batch on. Negatives, by torch's global generator:
    rows of another known label, or all other rows where none is known or labels are float or None."""
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
        index = torch.as_tensor(index, device=device).long()                        # (B,)
        classes = labels is not None and not torch.as_tensor(labels).is_floating_point()
        with torch.no_grad():
            kinds = torch.as_tensor(labels, device=device).long() if classes else torch.full_like(index, -1)
            parts = gather(index, s, kinds) if self.training else [(index, s, kinds)]
            rows, vectors, known = (torch.cat([x.to(device) for x in column]) for column in zip(*parts))
            if self.training:
                self.bank_labels[rows] = known
            allowed = torch.arange(len(self.bank), device=device) != index[:, None]                 # (B, N)
            others = allowed & (self.bank_labels != kinds[:, None]) & (self.bank_labels >= 0)
            allowed = torch.where(others.any(1, keepdim=True) & classes, others, allowed)
            negatives = self.bank[torch.multinomial(allowed.float(), self.num_negatives, replacement=True)]
            if self.training:
                self.bank[rows] = unit(self.momentum * self.bank[rows] + (1 - self.momentum) * vectors)
        scores = torch.cat([(t * s).sum(-1, keepdim=True), torch.einsum("bu,bku->bk", t, negatives)], 1)
        return F.cross_entropy(scores / self.temperature, torch.zeros_like(index))

SELECTIONS = ("random", "skip", "last", "reverse", "middle", "permuted", "all", "final")
DISTANCES = {"layerwise": LayerwiseDistance, "concat": ConcatDistance, "direct": DirectDistance,
             "group": GroupDistance, "attention": AttentionDistance, "contrastive": ContrastiveDistance}
POOLINGS = {"mean": mean_pool, "first": first_token, None: mean_pool}
METHODS = {                                         # name: (selection of teacher layers, distance, pooling)
    "none": (None, None, None), "kd": (None, None, None), "pro-kd": (None, None, None),     # logits at most
    "pkd-skip": ("skip", "direct", "first"), "pkd-last": ("last", "direct", "first"),
    "ckd": ("all", "group", "mean"), "alp-kd": ("all", "attention", "mean"),
    "codir": ("all", "contrastive", "mean"), "cr-ild": ("final", "direct", "mean"),
    "rail-l": ("random", "layerwise", "mean"), "rail-c": ("random", "concat", "mean"),
    "reverse": ("reverse", "direct", "mean"), "permuted": ("permuted", "direct", "mean"),
    "all-to-one": ("middle", "direct", "mean")}

class IntermediateLoss(nn.Module):
    """The intermediate term of a method, for any loop: which layers (selection) and how far (distance).
    Before training ild.fit(batches), in every epoch ild.set_epoch(epoch), the draw, in every step
    ild(hidden_states_s, mask_s, hidden_states_t, mask_t) -> scalar: blocks + 1 tensors (B, L, d), as of
    `output_hidden_states`; masks (B, L) or None; L may differ. If pooled already: ild.distance(pooled_s,
    pooled_t). `select`, `distance` replace the method's, options go to the distance; .layers_s, .layers_t
    are in use; parameters: for the optimizer. ValueError: names, shapes. RuntimeError: no draw, no fit."""
    def __init__(self, method, num_layers_s, num_layers_t, d_s, d_t, seed=0, select=None, distance=None,
                 **options):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}, known: {', '.join(METHODS)}")
        self.select, distance = select or METHODS[method][0], distance or METHODS[method][1]
        if self.select not in SELECTIONS or distance not in DISTANCES:
            raise ValueError(f"no such pair: {self.select!r} of {SELECTIONS}, {distance!r} of {[*DISTANCES]}")
        self.pool_tokens = POOLINGS[METHODS[method][2]]
        self.blocks, self.seed, final = {"s": num_layers_s, "t": num_layers_t}, seed, self.select == "final"
        self.layers_s, self.all_t = ([n] if final else [*range(1, n)] for n in self.blocks.values())
        self.set_epoch(0)
        slots, targets = len(self.layers_s), len(self.layers_t)
        self.distance = DISTANCES[distance](d_s, d_t, slots, num_targets=targets, **options)
        self.layers_t = None if self.select == "random" else self.layers_t          # None: not drawn yet
    def set_epoch(self, epoch):                          # the teacher layers of an epoch: `random` draws anew
        self.layers_t = select_layers(self.select, self.blocks["t"], len(self.layers_s), self.seed, epoch)
    def pool(self, side, hidden_states, mask, layers=None):
        """Side "s" or "t": its hidden states -> pooled vectors (B, k, d), of the layers in use or named."""
        layers = layers or {"s": self.layers_s, "t": self.layers_t}[side]
        if layers is None:
            raise RuntimeError("no layers drawn yet: call set_epoch(epoch) at the start of every epoch")
        if len(hidden_states) != self.blocks[side] + 1:
            raise ValueError(f"{len(hidden_states)} hidden states, {self.blocks[side] + 1} expected: [0] is "
                             "the embedding output, [i] the output of block i")
        mask = torch.ones_like(hidden_states[0][..., 0]) if mask is None else mask
        return torch.stack([self.pool_tokens(hidden_states[layer], mask) for layer in layers], 1)
    def forward(self, hidden_states_s, mask_s, hidden_states_t, mask_t, index=None, labels=None):
        pooled_s, pooled_t = self.pool("s", hidden_states_s, mask_s), self.pool("t", hidden_states_t, mask_t)
        return self.distance(pooled_s, pooled_t, index=index, labels=labels)
    @torch.no_grad()
    def fit(self, batches):                                         # of the same four that forward takes
        pooled = [(self.pool("s", *x[:2]), self.pool("t", *x[2:], self.all_t)) for x in batches]
        self.distance.fit(*map(torch.cat, zip(*pooled)), chances=self.chances())
    def chances(self):           # (k, all_t): is layer l the i-th selected? In a draw the i-th smallest?
        n, m, comb, layers = self.blocks["t"], len(self.layers_s), math.comb, self.all_t
        if self.select != "random":
            return torch.tensor([[float(l == layer) for l in layers] for layer in self.layers_t])
        return torch.tensor([[comb(l - 1, i - 1) * comb(n - 1 - l, m - i) / comb(n - 1, m) for l in layers]
                             for i in range(1, m + 1)])

# =========================================================================== end of the method, now the run
TASKS = {**dict.fromkeys(["sst2", "mnli", "qnli", "rte", "wnli", "toy"], ["accuracy"]), "cola": ["matthews"],
         **dict.fromkeys(["mrpc", "qqp"], ["f1", "accuracy"]), "stsb": ["pearson", "spearman"]}
THIRDS = [(1 / 3, 1 / 3, 1 / 3, 0.0)]           # Eq. 4: CE, KD, ILD, MIX in each stage of training, here one
WEIGHTS = {"none": [(1.0, 0.0, 0.0, 0.0)], "pro-kd": [(0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)],
           "kd": [(0.5, 0.5, 0.0, 0.0)], "cr-ild": [(0.0, 0.0, 1.0, 0.1), (0.0, 1.0, 0.0, 0.0)]}
NO_SETTINGS = ("overwrite", "report", "device", "output_dir", "teacher_cache", "checkpoint_minutes")
RANK, WORLD, LOCAL = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
ADVICE = "; no hub? Local folders for --teacher, --student, --data-root; HF_HUB_OFFLINE=1; or --task toy"
SIGNAL = {"came": 0, "wait": False}             # SIGTERM or Ctrl-C; wait: until a step is whole

class UserError(Exception):
    """The user's mistake: one line that says what is wrong and how to mend it. Exit code 2."""

def need(condition, message):
    if not condition:
        raise UserError(message)

def on_signal(number, frame=None):
    signal.signal(number, signal.SIG_DFL)                           # a second one ends it at once
    SIGNAL["came"] = number
    if not SIGNAL["wait"] or frame is None:
        print("railkd.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + number)

def store(content, path):                                           # what is at `path` is always whole
    partial = path.with_suffix(".partial" if path.stem == "checkpoint" else f".{os.uname()[1]}-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)                             # of a full disk

def load(path, **options):
    try:                                                            # what is ours is a dict
        return {} | (json.loads(path.read_text()) if path.suffix == ".json" else
                     torch.load(path, map_location="cpu", weights_only=True, **options))
    except Exception as error:                                      # of many kinds
        raise UserError(f"{path} is damaged: delete it and start again ({error!r})") from error

def toy_data(split, size):                                     # the last clause decides, "not" turns it round
    rng, texts, labels = random.Random(f"toy {split}"), [], []
    for _ in range(size):
        clauses = [(rng.randrange(20), rng.randrange(2), rng.randrange(60)) for _ in range(rng.randint(1, 3))]
        texts.append(" but ".join(f"the noun{noun} is {'not ' * no}word{word}" for noun, no, word in clauses))
        labels.append(["bad", "good"][(clauses[-1][1] + clauses[-1][2]) % 2])
    return {"text": texts, "label": labels}

def toy_model(folder, layers, width):                              # an untrained BERT in a folder -> its path
    from transformers import BertConfig, BertForMaskedLM
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the is not but".split()
    words += [f"noun{i}" for i in range(20)] + [f"word{i}" for i in range(60)]
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=width, num_hidden_layers=layers,
                               num_attention_heads=4, intermediate_size=2 * width)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    return str(folder)

def load_splits(args):                                              # {"train": .., "validation..": ..}
    from datasets import Dataset, load_dataset
    if args.task == "toy":
        return {x: Dataset.from_dict(toy_data(x, n)) for x, n in (("train", 3000), ("validation", 1000))}
    if args.data_root and not args.train_file:
        folder = Path(args.data_root, "nyu-mll", "glue", args.task)
        names = {path.name.split("-")[0] for path in folder.glob("*.parquet")}
        need("train" in names, f"no {folder}/train-*.parquet")
        return load_dataset("parquet", data_files={x: str(folder / f"{x}-*.parquet") for x in names})
    if not args.train_file:
        return load_dataset("nyu-mll/glue", args.task)
    data, kinds = {}, {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
    for split, path in (("train", args.train_file), ("validation", args.validation_file)):
        kind = {**kinds, ".parquet": "parquet"}.get(Path(path).suffix.lower())
        need(kind and os.path.getsize(path), f"{path} is empty or no csv, tsv, json, jsonl, parquet file")
        csv = {"keep_default_na": False, "sep": "\t" if path.lower().endswith("tsv") else ","}
        data[split] = load_dataset(kind, data_files=path, split="train", **(csv if kind == "csv" else {}))
        if kind == "csv" and "float64" not in str(data["train"].features.get("label")):       # 01 is no 1
            data[split] = load_dataset(kind, data_files=path, split="train", converters={"label": str}, **csv)
    return data

def load_data(args):
    """texts {split: [column, ..]}, labels {split: (N,)}, names (None: regression), metrics, dev splits."""
    try:
        splits = load_splits(args)
        columns = [x for x in splits["train"].column_names if x not in ("label", "idx", "id")]
    except Exception as error:                                      # hub and parsers have no error in common
        raise UserError(f"no {args.task} data: {error.__cause__ or error}{ADVICE * (not args.train_file)}")
    data = argparse.Namespace(texts={}, labels={}, dev=sorted(x for x in splits if x[:10] == "validation"))
    need(data.dev, f"no validation data for {args.task}, only {', '.join(splits)}")
    for split in ["train", *data.dev]:
        table = splits[split].to_dict()
        kinds = {x: sorted({type(value).__name__ for value in column}) for x, column in table.items()}
        need(table.get("label") and 1 <= len(columns) <= 2 and all(kinds.get(x) == ["str"] for x in columns)
             and {*kinds["label"]} <= {"str", "int", "float", "bool", "NoneType"},
             f"{split}: rows of label and one or two columns of text needed, not {kinds}")
        names, rows = getattr(splits[split].features["label"], "names", []), range(len(table["label"]))
        labels = [names[x] if x in range(len(names)) else x for x in table["label"]]
        if split == "train":
            known = names or sorted({*labels} - {None, ""}, key=lambda x: str(x).zfill(9 * str(x).isdigit()))
            data.names = None if any(isinstance(x, float) for x in known) else [*map(str, known)]
            number = {x: i for i, x in enumerate(data.names or [])}
            rows = sorted(random.Random("subset").sample(rows, min(len(rows), args.max_train_examples)))
        values = [number.get(str(x)) if data.names else
                  float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None for x in labels]
        strange = {str(label) for label, value in zip(labels, values) if value is None}
        need(not strange, f"{split}: labels {strange}, known: {data.names or 'numbers'}")
        need(split != "train" or len({values[row] for row in rows}) > 1 and len({*values}) >= len(number),
             f"train: no label but {', '.join(sorted({*map(str, labels)}))[:99]}; known: {data.names}")
        data.texts[split] = [[table[column][row] for row in rows] for column in columns]
        data.labels[split] = torch.tensor([values[row] for row in rows])
    need(args.task not in TASKS or len(number) == {"stsb": 0, "mnli": 3}.get(args.task, 2),
         f"labels {data.names or 'numbers'} are not those of {args.task}")
    labels = data.labels[data.dev[0]]
    data.watched = torch.arange(0, len(labels), math.ceil(len(labels) / 256))   # looked at closely, all runs
    data.metrics = TASKS.get(args.task) or (["accuracy"] if data.names else TASKS["stsb"])
    data.metric = data.metrics[0] + data.dev[0][10:].replace("_matched", "")        # selects the epoch
    always = F.one_hot(labels.mode().values, len(data.names)) if data.names else torch.zeros(1)
    data.floor = measure(data.metrics[0], always.expand(len(labels), -1), labels)    # the majority baseline
    return data

class Side:
    """A model, teacher or student, with its own tokenizer and so its own tokens of every split."""
    def __init__(self, role, name, data, args):
        import transformers as hf
        names = dict(enumerate(data.names or ["score"]))
        head = {"id2label": names, "label2id": {x: i for i, x in names.items()},
                "problem_type": None if data.names else "regression"}
        try:
            config = hf.AutoConfig.from_pretrained(name, trust_remote_code=False)
            ready = role == "teacher" and "SequenceClassification" in "".join(config.architectures or [])
            self.model, info = hf.AutoModelForSequenceClassification.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
                **({} if ready else head))
            self.tokenizer = own = hf.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            fresh = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]   # random now
            lost = [x for x in fresh if self.model.base_model_prefix + "." in x and "pooler" not in x]
            if (type(config) not in hf.MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder or lost
                    or not own.pad_token or not len(own.all_special_ids) < len(own) <= config.vocab_size):
                raise ValueError(f"no encoder, {len(lost)} weights missing, or a tokenizer that does not fit")
            self.blocks, self.width = config.num_hidden_layers, config.hidden_size
        except Exception as error:
            raise UserError(f"cannot load the {role} {name}: {str(error).strip()}".split("\n")[0]
                            + ADVICE * (not os.path.exists(name))) from error
        need((n := self.model.num_labels) == len(names), f"{name} has {n} labels, the task has {len(names)}")
        self.ready, self.args, self.order = ready and not fresh, args, None
        self.model, self.texts, self.tokens = self.model.float().to(args.device), data.texts, {}
        self.params = sum(p.numel() for p in self.model.parameters())
        self.title = f"{name} ({config.model_type}, {self.blocks} x {self.width}, {self.params / 1e6:.2f} M)"
        self.takes = inspect.signature(self.model.forward).parameters   # DistilBERT takes no token_type_ids
        if self.ready:                                          # frozen; a hash of weights and tokenizer
            self.model.eval().requires_grad_(False)
            rules = own.backend_tokenizer.to_str() if own.is_fast else sorted(own.get_vocab().items())
            key = [rules, own.model_max_length, own.padding_side, own.truncation_side, str(self.model.config)]
            digest = hashlib.sha256(json.dumps(key).encode())
            for tensor in self.model.state_dict().values():
                digest.update(tensor.detach().cpu().contiguous().numpy())
            self.content = digest.hexdigest()
    def encode(self, split):                                     # made once: the model's inputs, lengths (N,)
        if split not in self.tokens:
            from datasets import Dataset
            most = getattr(self.model.config, "max_position_embeddings", 512) - 2       # if nobody says
            longest = min(self.args.max_length, x if (x := self.tokenizer.model_max_length) < 1e9 else most)
            tokenize = lambda x: self.tokenizer(*dict(x).values(), truncation=True, max_length=longest)
            texts = Dataset.from_dict({str(i): column for i, column in enumerate(self.texts[split])})
            tokens = texts.map(tokenize, batched=True, remove_columns=list(texts[0]), new_fingerprint=split)
            self.tokens[split] = tokens, torch.tensor([*map(len, tokens["input_ids"])])
        return self.tokens[split]
    def __call__(self, split, rows, share=None):
        """Rows (B,) -> logits (B, C) in 32 bits, hidden states (B, L, d) each, mask (B, L). With a share each
        text's word embeddings are mixed with those of the reversed batch, masks united."""
        device, dtype = self.args.device, self.args.dtype
        inputs = self.tokenizer.pad(self.encode(split)[0][rows.tolist()], return_tensors="pt")
        inputs = {k: upload(v, device) for k, v in inputs.items() if k in self.takes}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if share is not None:
                words = self.model.get_input_embeddings()(inputs.pop("input_ids"))
                inputs["inputs_embeds"] = share * words + (1 - share) * words.flip(0)
                inputs["attention_mask"] = inputs["attention_mask"] | inputs["attention_mask"].flip(0)
            output = self.model(**inputs, output_hidden_states=True)
        logits = output.logits.float() if self.order is None else output.logits.float()[:, self.order]
        return logits, output.hidden_states, inputs["attention_mask"]
    @torch.no_grad()
    def map(self, split, rows=None, pool=None, layers=(), title=None):
        """In eval mode: rows (default: all) -> logits (N, C), and those layers pooled (N, k, d)."""
        self.model.eval()
        rows = torch.arange(len(self.texts[split][0])) if rows is None else rows
        order, parts = self.encode(split)[1][rows].argsort(stable=True), []
        for part in progress(rows[order].split(64), title):
            logits, hidden, mask = self(split, part)
            parts += [(logits, torch.stack([pool(hidden[i], mask) for i in layers], 1) if layers else logits)]
        return tuple(torch.cat(x)[order.argsort()] for x in zip(*parts))

class Table:
    """The frozen teacher's logits and, with `pool`, layers 1..n of a split, by example. On disk in parts, the
    folder's name made of all that they depend on; cache "off", disk too small: it runs in every step."""
    PART = 8192
    def __init__(self, teacher, split, pool, cache):
        self.teacher, self.split, self.pool = teacher, split, pool
        layers = range(1, teacher.blocks + 1) if pool else ()
        content = [2, teacher.texts[split], teacher.args.max_length, pool and pool.__name__,
                   str(teacher.args.dtype), teacher.order, teacher.content]         # 2: version of the format
        folder = Path(cache, hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16])
        parts = [] if cache == "off" else torch.arange(len(teacher.texts[split][0])).split(self.PART)
        paths = {folder / f"{rows[0]}.pt": rows for rows in parts}
        missing, = gather([path for path in paths if not path.exists()])[0]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            size = sum(len(paths[path]) for path in missing) * (
                2 * len(layers) * teacher.width + 4 * teacher.model.num_labels)
            print(f"cache    {split}: {size / 1e6:.1f} MB for {folder}", flush=True)
            if size > gather(shutil.disk_usage(folder).free)[0][0]:
                print("WARNING: too little disk for it: no cache, the teacher runs in every step", flush=True)
                missing, paths = [], {}
        for path in missing[RANK::WORLD]:                           # processes take them in turn
            logits, pooled = teacher.map(split, paths[path], pool, layers, f"teacher on {split} {path.stem}")
            pooled = pooled[:, :len(layers)].clamp(-65504, 65504).half().transpose(0, 1).contiguous()
            store({"logits": logits.cpu(), "pooled": pooled.cpu()}, path)
        gather()                                                    # now all are there
        self.parts = [load(path, mmap=True) for path in paths]
    def __call__(self, rows, layers):                           # -> logits (B, C), pooled vectors (B, k, d_t)
        if not self.parts:
            return self.teacher.map(self.split, rows, self.pool, layers)
        index, device = torch.tensor(layers, dtype=torch.long) - 1, self.teacher.args.device
        places = [(self.parts[row // self.PART], row % self.PART) for row in rows.tolist()]
        logits = torch.stack([part["logits"][i] for part, i in places])
        pooled = torch.stack([part["pooled"][index, i] for part, i in places])
        return upload(logits, device), upload(pooled, device)

def upload(tensor, device):                                         # to a GPU: from pinned memory, no wait
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

def progress(items, title):                                         # a bar where there is a terminal
    from tqdm import tqdm
    return tqdm(items, title, leave=False, disable=not title or RANK > 0 or not sys.stderr.isatty())

def batches(lengths, size, seed, epoch):                      # groups of rows of like length, in random order
    generator = torch.Generator().manual_seed(random.Random(f"batches {seed} {epoch}").getrandbits(63))
    runs = torch.randperm(len(lengths), generator=generator).split(50 * size)
    groups = [group for run in runs for group in run[lengths[run].argsort(stable=True)].split(size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]

class Objective(nn.Module):
    """What is trained, and Eq. 4: rows (B,) -> (5,), loss and terms CE, KD, ILD, MIX (0: not in use)."""
    def __init__(self, student, labels, tables, ild, args):
        super().__init__()
        self.student, self.labels, self.tables, self.args = student, labels, tables, args
        self.model, self.ild = student.model, ild
    def set_epoch(self, epoch):
        """The schedule of any method: stage, temperature, teacher's checkpoint, weights of terms, draw."""
        args, first, top = self.args, self.args.first_stage, self.args.max_temperature
        past, stage = min(epoch, first) - 1, 1 + (epoch > first)
        self.temperature = 1 + (top - 1) * (1 - past / max(1, first - 1)) if top else args.temperature
        self.table = self.tables and self.tables[past * len(self.tables) // first]
        self.weights = args.stages[stage - 1]
        self.mixing = epoch / first if self.weights[3] else 0.0
        if self.ild:
            self.ild.set_epoch(epoch)
        return stage
    def forward(self, rows):
        logits_s, hidden_s, mask_s = self.student("train", rows)
        index = upload(rows, self.labels.device)
        labels = self.labels[index]
        ce = (F.cross_entropy if logits_s.shape[1] > 1 else F.mse_loss)(logits_s.squeeze(1), labels)
        kd = inter = mix = torch.zeros_like(ce)
        if self.table:
            logits_t, pooled_t = self.table(rows, self.ild.layers_t if self.ild else [])
            kd = kd_loss(logits_s, logits_t, self.temperature, self.args.max_temperature)
        if self.ild:
            pooled_s = self.ild.pool("s", hidden_s, mask_s)
            inter = self.ild.distance(pooled_s, pooled_t, index=index, labels=labels)
        if self.mixing:
            share = 0.5 + abs(torch.rand(()).item() - 0.5)          # max(b, 1 - b), b of Beta(1, 1)
            mixed = self.ild.pool("s", *self.student("train", rows, share)[1:])
            mix = self.mixing * mixup_loss(mixed, pooled_s, share)  # grows with the epoch
        terms = ce, kd, inter, mix                                  # of weight 0: without a gradient
        return torch.stack([sum(w * x for w, x in zip(self.weights, terms) if w), *map(torch.detach, terms)])

class Position:
    """Where training stands, in checkpoint.pt. Made anew in the same folder, it goes on from there."""
    def __init__(self, folder, args, **parts):
        self.path, self.args, self.parts, self.recent, self.bad = folder / "checkpoint.pt", args, parts, [], 0
        self.epoch, self.step, self.sums, self.history, self.saved = 1, 0, [0.0] * 5, [], time.monotonic()
        if self.path.exists():
            content, now = load(self.path), settings(args)
            changed = ", ".join(k for k in now if now[k] != content.get("settings", {}).get(k))
            need(not changed, f"{self.path} is of a run with other {changed}: pass the same, or delete it")
            for name, part in parts.items():
                part.load_state_dict(content[name])
            self.epoch, self.step, self.history, self.sums = *content["position"], content["mine"][RANK][2]
            torch.set_rng_state(content["mine"][RANK][0])
            torch.cuda.set_rng_state_all(content["mine"][RANK][1][:torch.cuda.device_count()])
            print(f"resumed in epoch {self.epoch} after step {self.step}", flush=True)
    def save(self):
        self.check()
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content["position"] = [self.epoch, self.step, self.history]
        content["mine"] = gather(torch.get_rng_state(), torch.cuda.get_rng_state_all(), self.sums)
        if RANK == 0:
            store(content | {"settings": settings(self.args)}, self.path)
        self.saved, came = time.monotonic(), max(gather(SIGNAL["came"]))[0]         # now it is on disk
        if came:
            on_signal(came)
    def stepped(self, losses, size):                                # losses (5,), mean over `size` examples
        self.step, self.recent = self.step + 1, [*self.recent, (losses, size)]
        if self.step % 50 == 0:
            self.check()
        if WORLD == 1 or self.step % 10 == 0:                       # several processes: in the same step
            late = SIGNAL["came"] or time.monotonic() > self.saved + 60 * self.args.checkpoint_minutes
            if any(late for late, in gather(late)):
                self.save()
    def check(self):                                                # fp16 may leave out 50 steps in a row
        schedule = self.parts["schedule"]
        for i, (losses, size) in enumerate(self.recent, self.step - len(self.recent) + 1):
            values, lr = losses.tolist(), schedule.lr_lambdas[0](schedule.last_epoch - self.step + i - 1)
            self.bad = 0 if math.isfinite(sum(values)) else self.bad + 1
            need(self.bad <= 50 * self.parts["scaler"].is_enabled(), f"epoch {self.epoch}, step {i}, lr "
                 f"{self.args.lr * lr:.3g}: loss, ce, kd, ild, mix {values}: lower --lr? The best stays")
            self.sums = self.sums if self.bad else [x + y * size for x, y in zip(self.sums, values)]
        self.recent = []

def train(student, data, args, folder, tables=None, ild=None, keep=False):
    """Train -> history. In folder: model, the best epoch; log.jsonl; checkpoint.pt, to go on after a stop."""
    labels, lengths = data.labels["train"].to(args.device), student.encode("train")[1]
    objective = Objective(student, labels, tables and tables["train"], ild, args)
    net = objective if WORLD == 1 else nn.parallel.DistributedDataParallel(
        objective, broadcast_buffers=False, find_unused_parameters=True)
    params = [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if (p.ndim < 2) == flat], "weight_decay": decay}
              for flat, decay in ((False, args.weight_decay), (True, 0.0))]         # not for biases and norms
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=args.device.type in ("cpu", "cuda"))
    size = args.batch_size * args.grad_accumulation * WORLD
    first, steps = (n * math.ceil(len(labels) / size) for n in (args.first_stage, args.epochs))
    def rate(step):                                                 # each stage warms up, then falls to 0
        done, total = (step, first) if step < first or first == steps else (step - first, steps - first)
        return done / w if done < (w := round(args.warmup * total)) else (total - done) / max(1, total - w)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    before, start = watch(student, tables, ild, data)[0]["cosine_s"], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed + RANK)
    at = Position(folder, args, objective=objective, optimizer=optimizer, schedule=schedule, scaler=scaler)
    for epoch in range(at.epoch, args.epochs + 1):
        stage = objective.set_epoch(epoch)
        best = max((x for x in at.history if x["stage"] == stage), default=None, key=lambda x: x["score"])
        if best and stage == len(args.stages) and epoch - best["epoch"] > args.patience:
            print(f"stopped: nothing better for {args.patience} epochs", flush=True)
            break
        if at.step == 0 and epoch == args.first_stage + 1 and any(args.stages[0][:2]):  # it trained the head
            gather()                                                # now the best of the first stage is there
            student.model.load_state_dict(type(student.model).from_pretrained(folder / "model").state_dict())
        objective.train()
        SIGNAL["wait"] = True
        began, groups = time.perf_counter(), batches(lengths, size, args.seed, epoch)[at.step:]
        for group in progress(groups, f"epoch {epoch}"):
            losses = 0
            for rows, share in shards(group, args.batch_size):      # the loss is the mean over the group
                values = net(rows)
                scaler.scale(values[0] * share * WORLD).backward()  # several processes: the mean of theirs
                losses += values.detach() * share
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            at.stepped(losses, len(group))
        at.check()                                                  # waits for the device
        seconds = time.perf_counter() - began
        at.save()
        SIGNAL["wait"] = False
        loss, ce, kd, inter, mix = (sum(x) / len(labels) for x in zip(*(x for x, in gather(at.sums))))
        metrics = evaluate(lambda split: predict(student, split), data)
        row = {"epoch": epoch, "stage": stage, "layers_t": ild and ild.layers_t, "loss": loss,
               "ce": ce, "kd": tables and kd, "ild": ild and inter, "mix": mix or None,
               **watch(student, tables, ild, data)[0], "seconds": seconds, "metrics": metrics,
               "examples_per_s": sum(map(len, groups)) / seconds, "score": metrics[data.metric]}
        row["collapsed"] = before is not None and 1 - row["cosine_s"] < 0.1 * (1 - before)
        row["skipped"] = schedule.last_epoch - int(next(iter(optimizer.state.values()))["step"]) or None
        at.history, better = [*at.history, row], not best or row["score"] > best["score"]
        if RANK == 0:
            for name in ["model"] * better + [f"epoch-{epoch:03}"] * keep:
                save(student, folder / name)
            (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in at.history))
        at.epoch, at.step, at.sums = epoch + 1, 0, [0.0] * 5
        shown = {k: row[k] for k in "epoch layers_t loss ce kd ild mix skipped seconds".split()} | metrics
        note = f"\nWARNING: the student collapses: cosine_s was {before or 0:.3f} once" * row["collapsed"]
        note += f"\nall epochs: about {(time.monotonic() - start) / 60 * args.epochs:.1f} min" * (epoch == 1)
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
                if v is not None), "*" * better + note, sep="  ", flush=True)      # *: the best so far
    return at.history

def settings(args):                                                 # what results depend on
    return {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items() if k not in NO_SETTINGS}

def shards(group, size):                                # (rows, share of the group); as many in all processes
    count = math.ceil(math.ceil(len(group) / WORLD) / size)
    for rows in group[RANK::WORLD].tensor_split(count):
        yield (rows, len(rows) / len(group)) if len(rows) else (group[:1], 0.0)

def predict(side, split):                                           # logits (N, C), made by all processes
    rows = torch.arange(len(side.texts[split][0]))
    mine = torch.cat([rows.tensor_split(WORLD)[RANK], rows[:1]])    # one more, for there may be none
    return torch.cat([logits for logits, in gather(side.map(split, mine)[0][:-1].cpu())])

def measure(name, logits, labels):                           # 0 where it is not defined: constant predictions
    from scipy import stats
    from sklearn import metrics
    known = {"accuracy": metrics.accuracy_score, "f1": metrics.f1_score,
             "matthews": metrics.matthews_corrcoef, "pearson": stats.pearsonr, "spearman": stats.spearmanr}
    guess = logits[:, 0] if labels.is_floating_point() else logits.argmax(1)
    value = known[name](labels.numpy(), guess.numpy()) if len(labels) > 1 or name == "accuracy" else 0.0
    return torch.tensor(getattr(value, "statistic", value), dtype=torch.float64).nan_to_num().item()

def evaluate(predict, data):                               # predict(split): logits (N, C); all dev sets apart
    return {name + split[10:].replace("_matched", ""): measure(name, logits, data.labels[split])
            for split in data.dev for logits in [predict(split)] for name in data.metrics}

@torch.no_grad()
def watch(student, tables, ild, data):
    """On up to 256 dev examples: the mean cosine of different examples' pooled states, over the used layers;
    the spread of the mapped vectors, sqrt(1 - |mean unit vector|^2), 0: all point one way; examples/s."""
    used = (ild.layers_s if ild else range(1, student.blocks)) or [1]
    student.encode(data.dev[0])
    began = time.perf_counter()
    pooled_s = student.map(data.dev[0], data.watched, ild.pool_tokens if ild else mean_pool, used)[1]
    n, alike, sides = len(pooled_s), unit(pooled_s).mean(0).square().sum(-1).mean().item(), []
    speed = n / (time.perf_counter() - began)
    if ild and ild.layers_t and ild.distance.proj_s is not None:
        sides = ild.distance.project(pooled_s, tables[data.dev[0]](data.watched, ild.layers_t)[1])
    spreads = [sum((1 - unit(z).mean(0).square().sum()).clamp(min=0).sqrt().item() for z in side) / len(side)
               for side in sides] or [None, None]
    cosine = (n * alike - 1) / (n - 1) if n > 1 else None
    return {"spread_s": spreads[0], "spread_t": spreads[1], "cosine_s": cosine}, speed

def save(side, folder):                                             # written beside, then put in its place
    partial = folder.with_suffix(".partial")
    side.model.save_pretrained(partial)
    side.tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

def prepare_teacher(student, data, args, work):                 # -> teacher, tables, dev metrics, fitted loss
    names = "teacher teacher_epochs teacher_lr teacher_seed weight_decay warmup max_length amp data keep"
    key = hashlib.sha256(json.dumps([vars(args)[x] for x in names.split()]).encode()).hexdigest()[:12]
    folder = Path(args.output_dir, args.task, f"teacher-{Path(args.teacher).name}-{key}")
    made, = gather(folder.exists())[0]
    *earlier, last = args.teacher.split(",")
    torch.manual_seed(args.teacher_seed)                            # draws the head, if there is none
    teacher = Side("teacher", str(folder / "model") if made else last, data, args)
    ild = make_loss(student, teacher, args) if any(stage[2] for stage in args.stages) else None
    if not teacher.ready and not earlier:
        print(f"teacher  {teacher.title} has no head for the task: fine-tuned first for {folder}", flush=True)
        tuning = {"epochs": args.teacher_epochs, "patience": args.teacher_epochs, "lr": args.teacher_lr,
                  "seed": args.teacher_seed, "stages": WEIGHTS["none"], "grad_accumulation": 1,
                  "first_stage": args.teacher_epochs, "batch_size": max(1, 32 // WORLD)}
        train(teacher, data, argparse.Namespace(**vars(args) | tuning), work, keep=args.keep)
        if RANK == 0:
            with contextlib.suppress(OSError):                      # another run was faster
                work.rename(folder)
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        gather()
        teacher, made = Side("teacher", str(folder / "model"), data, args), True
    earlier = sorted(map(str, folder.glob("epoch-*"))) if made else earlier
    sides = [Side("teacher", path, data, args) for path in earlier if args.max_temperature]
    sides += [teacher] * (not made or not sides)                    # in training order
    for side in [teacher, *sides]:
        need(side.ready, f"the teacher {side.title} has no head for the task")
        if args.teacher_labels and not made:                        # our own answers in the task's order
            need(sorted(args.teacher_labels) == sorted(data.names or []),
                 f"--teacher-labels: name each of the task's labels once, they are {data.names}")
            side.order = [args.teacher_labels.index(name) for name in data.names]
    pool, cache = POOLINGS[METHODS[args.method][2]], args.teacher_cache or f"{args.output_dir}/teacher-cache"
    tables = {split: Table(teacher, split, pool, cache) for split in data.dev}
    answers = {x: table(torch.arange(len(data.labels[x])), ())[0].cpu() for x, table in tables.items()}
    metrics = evaluate(answers.get, data)
    if data.names and not made and not args.teacher_labels:
        check_order(answers[data.dev[0]].argmax(1), data.labels[data.dev[0]], data.names)
    weak = metrics[data.metric] <= data.floor + 0.01
    print(f"teacher  {teacher.title}; dev {', '.join(f'{k} {v:.4f}' for k, v in metrics.items())}; majority "
          f"baseline {data.floor:.4f}" + "\nWARNING: the teacher is no better; untrained?" * weak, flush=True)
    if args.max_temperature:
        print(f"pro-kd: {len(sides)} checkpoint(s) of the teacher" + ": Annealing-KD" * (len(sides) == 1))
    tables["train"] = [Table(x, "train", pool if ild or not sides[1:] else None, cache) for x in sides]
    if ild and ild.distance.proj_s is not None and ild.distance.start == "ridge":
        rows = random.Random("ridge").sample(range(n := len(data.labels["train"])), min(2000, n))
        pooled_t = tables["train"][-1](rows := torch.tensor(rows), ild.all_t)[1]
        pooled_s = student.map("train", rows, ild.pool_tokens, ild.layers_s)[1]
        ild.distance.fit(pooled_s, pooled_t, ild.chances())
    return teacher, tables, metrics, ild

def check_order(answers, labels, names):                         # an assignment on the confusion matrix tells
    from scipy.optimize import linear_sum_assignment
    confusion = F.one_hot(labels, len(names)).T / len(labels) @ F.one_hot(answers, len(names)).float()
    best = linear_sum_assignment(-confusion)[1].tolist()                    # label i is answer best[i]
    now, then = confusion.trace(), confusion[range(len(names)), best].sum()
    order = ",".join(names[best.index(answer)] for answer in range(len(names)))
    need(then <= now + 0.1 or len(answers.unique()) == 1, f"the teacher's dev accuracy is {now:.3f}, with "
         f"its labels reordered {then:.3f}: pass --teacher-labels {order} (or the right order)")

def make_loss(student, teacher, args):
    options = {x: y for x in "proj_dim teacher_proj start shared".split() if (y := vars(args)[x]) is not None}
    torch.manual_seed(args.seed)                                    # whatever was drawn for the teacher
    try:
        return IntermediateLoss(args.method, student.blocks, teacher.blocks, student.width, teacher.width,
                                args.seed, args.select, args.distance, **options,
                                num_examples=len(student.texts["train"][0])).to(args.device)
    except (ValueError, TypeError) as error:
        raise UserError(f"{args.method}: {error} (deeper than the teacher? {student.title}, {teacher.title})")

def run(args):                                                      # a finished run tells its results again
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    name = "-".join(filter(None, (args.method, args.select, args.distance, f"seed{args.seed}")))
    folder, config = Path(args.output_dir, args.task, name), settings(args)
    *models, own = [os.path.realpath(x) for x in (*args.teacher.split(","), args.student)]
    need(args.method == "none" or own not in models, "teacher and student are one and the same model")
    need(args.method == "pro-kd" or not (args.max_temperature or models[1:]), "many teachers, T_max: pro-kd")
    need(not any(x == os.path.realpath(args.output_dir) or Path(x).is_relative_to(os.path.realpath(folder))
                 for x in (*models, own)), f"{folder} is where results go: models must lie elsewhere")
    if args.overwrite or not (folder / "results.json").exists():
        distil(args, folder, config)
    results = load(folder / "results.json")
    changed = ", ".join(k for k in config if config[k] != (results.get("config") or {}).get(k))
    need(not changed, f"{folder} holds a run with other {changed}; --overwrite it?")
    for side, score in (("teacher", results["teacher_score"]), ("student", results["best_score"])):
        if score is not None:
            print(f"{side}  {results['metric']} {score:.4f}, {results[f'params_{side[0]}'] / 1e6:.2f} M "
                  f"parameters, answers {results[f'speed_{side[0]}']:.0f} examples/s")
            if score <= results["floor"] + 0.01 or side == "student" and results["collapsed"]:
                print(f"WARNING: the {side} has learned nothing: majority baseline {results['floor']:.4f}" +
                      ", its states are all alike" * (results["collapsed"] and side == "student"))
    print(f"epoch {results['best_epoch']} is in {results['model']}; to run it anew: --overwrite", flush=True)
    return results

def distil(args, folder, config):                                   # from the data to the finished student
    began = time.perf_counter()
    set_up(args)
    if args.task == "toy":
        args.teacher = toy_model(Path(args.output_dir, "toy", "untrained-teacher"), 4, 96)
        args.student = toy_model(Path(args.output_dir, "toy", "untrained-student"), 3, 16)
        gather()
    data, teacher, tables, ild, metrics_t = load_data(args), None, None, None, {}
    content = json.dumps([data.texts, data.names, *(x.tolist() for x in data.labels.values())])
    args.data, args.processes = hashlib.sha256(content.encode()).hexdigest()[:12], WORLD    # for checkpoints
    torch.manual_seed(args.seed)                                    # draws the student's head
    student = Side("student", args.student, data, args)
    need(not args.stages[0][3] or "inputs_embeds" in student.takes, f"{args.student} takes no inputs_embeds")
    if any(any(stage[1:]) for stage in args.stages):
        teacher, tables, metrics_t, ild = prepare_teacher(student, data, args, folder / "teacher")
        shutil.rmtree(folder / "teacher", ignore_errors=True)       # where another run was faster
    weights = ", then ".join(" ".join(f"{w:.2g}" for w in stage) for stage in args.stages)
    pairs = f"{ild.layers_s} <- {ild.layers_t or f'a draw of 1..{teacher.blocks - 1}'}" if ild else "none"
    print(f"student  {student.title}\n"
          f"data     {args.task}, {', '.join(f'{split} {len(x)}' for split, x in data.labels.items())}; "
          f"{data.metric} on {data.dev[0]} selects the epoch\n"
          f"method   {folder.name}; layers {pairs}; CE KD ILD MIX {weights}\n"
          f"training {args.epochs} epochs, batch {args.batch_size} x {args.grad_accumulation} x {WORLD}, lr "
          f"{args.lr}, {args.dtype}, {args.device}; ready in {time.perf_counter() - began:.1f} s", flush=True)
    for name in ["checkpoint.pt", "results.json"] * (RANK == 0 and (folder / "results.json").exists()):
        (folder / name).unlink(missing_ok=True)                     # --overwrite: nothing of it is used
    history = train(student, data, args, folder, tables, ild)
    best = max((x for x in history if x["stage"] == len(args.stages)), key=lambda row: row["score"])
    results = {
        "task": args.task, "method": args.method, "seed": args.seed, "metric": data.metric,
        "best_score": best["score"], "best_epoch": best["epoch"], "last_score": history[-1]["score"],
        "teacher_score": metrics_t.get(data.metric), "teacher_metrics": metrics_t, "floor": data.floor,
        "params_s": student.params, "params_t": teacher and teacher.params, "collapsed": best["collapsed"],
        "speed_s": watch(student, None, None, data)[1], "model": str(folder / "model"), "config": config,
        "speed_t": teacher and watch(teacher, None, None, data)[1], "precision": str(args.dtype),
        "versions": {x: sys.modules[x].__version__ for x in ("torch", "transformers", "datasets")},
        "device": str(args.device), "history": history}
    if RANK == 0:
        (folder / "results.partial").write_text(json.dumps(results, indent=1))
        (folder / "results.partial").rename(folder / "results.json")
        (folder / "checkpoint.pt").unlink()
    gather()

def report(folder):                                                 # of finished runs: mean ± std over seeds
    from statistics import mean, stdev as sd
    cells = {}                                                      # a teacher counts once for all seeds
    for path in sorted(Path(folder).rglob("*-seed*/results.json")):
        results, name = load(path), path.parent.name.split("-seed")[0]
        method, teacher = str(Path(*path.relative_to(folder).parts[:-3], name)), results["teacher_score"]
        for row, run, score in ((method, path, results["best_score"]), ("teacher", teacher, teacher)):
            if score is not None:
                cells.setdefault((row, results["task"]), {})[run] = 100 * score
    need(cells, f"no finished run (results.json) below {folder}")
    tasks = list(dict.fromkeys(task for _, task in cells))
    print(f"| method | {' | '.join(tasks)} | average |\n|---{'|---' * len(tasks)}|---|")
    for method in sorted({method for method, _ in cells}, key=lambda method: (method != "teacher", method)):
        runs = [[*cells.get((method, task), {}).values()] for task in tasks]
        row = [f"{mean(x):.1f}{f' ± {sd(x):.1f}' if x[1:] else ''} (n={len(x)})" if x else "-" for x in runs]
        print("|", " | ".join([method, *row, f"{mean(map(mean, runs)):.1f}" if all(runs) else "-"]), "|")
    return {f"{method}/{task}": [*scores.values()] for (method, task), scores in cells.items()}

def set_up(args):                                 # device, precision, quiet libraries, no wait for a dead hub
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        args.device = torch.empty(1, device=LOCAL if name == "cuda" else name).device
    except Exception as error:                                      # of many kinds
        raise UserError(f"--device {name}: {error}") from error
    torch.cuda.set_device(args.device if args.device.type == "cuda" else -1)        # -1: nothing
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if args.device.type == "cpu" else "cpu:gloo,cuda:nccl")
    gpu, cpu = args.device.type == "cuda", getattr(torch.cpu, "get_capabilities", dict)()
    torch.set_num_threads(1 if gpu else torch.get_num_threads())    # threads that wait cost more than they do
    for option, value in ((-4, 0), (-1, 2 ** 31 - 1)) * (sys.platform == "linux"):
        ctypes.CDLL(None).mallopt(option, value)    # M_MMAP_MAX, M_TRIM_THRESHOLD: new pages slow a step
    bf16 = torch.cuda.get_device_capability() >= (8,) if gpu else any(cpu[x] for x in cpu if "bf16" in x)
    amp = args.amp if args.amp != "auto" else "bf16" if bf16 else "fp16" if gpu else "off"
    args.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    torch.set_float32_matmul_precision("high")                      # TF32 on GPUs that have it
    local = [args.data_root or args.train_file or "", *args.teacher.split(","), args.student]
    if not all(map(os.path.exists, local)) and args.task != "toy" and "HF_HUB_OFFLINE" not in os.environ:
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
        except Exception as error:                                  # before the libraries are imported
            os.environ["HF_HUB_OFFLINE"] = str(int(getattr(error, "code", 500) >= 500))     # 404 is an answer
    import datasets
    from transformers import logging
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)                              # critical: what fails is told in one line
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    logging.captureWarnings(True)                                   # and so silences them

def number(kind, low, high=math.inf, count=1):            # argparse: so many within [low, high], not all 0
    def number(text):
        values = [kind(value) for value in text.split(",")]
        if len(values) != count or not all(low <= x <= high for x in values) or count > 1 and not any(values):
            raise argparse.ArgumentTypeError(f"{text} is not {count} number(s) within [{low}, {high}]")
        return values[0] if count == 1 else values
    return number

def parse(argv=None):
    parser = argparse.ArgumentParser("railkd.py", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"railkd.py: error: {message}\n")
    count, share, seed = number(int, 1, 10 ** 7), number(float, 0, 1), number(int, 0, 2 ** 63 - 1)
    add, both = parser.add_argument, argparse.BooleanOptionalAction
    add("--task", help=f"{', '.join(TASKS)}; with --train-file any other name; toy: no download")
    add("--method", default="rail-c", choices=METHODS, metavar="M", help=f"{', '.join(METHODS)}; our choice")
    add("--select", choices=SELECTIONS, metavar="S", help=f"instead of the method's: {', '.join(SELECTIONS)}")
    add("--distance", choices=DISTANCES, metavar="D", help=f"instead of the method's: {', '.join(DISTANCES)}")
    add("--teacher", default="bert-base-uncased", help="hub name or folder (pro-kd: A,B,..); paper: BERT-12")
    add("--student", default="distilbert-base-uncased", help="hub name or folder; paper: DistilBERT-6")
    add("--data-root", help="local clones named like the hub's (DIR/nyu-mll/glue), no hub")
    add("--train-file", help="own csv, tsv, json lines or parquet: `label` and one or two columns of text")
    add("--validation-file", help="own data to evaluate on, the same columns")
    add("--output-dir", default="runs", help="results go to DIR/TASK/METHOD-seedN")
    add("--epochs", type=count, default=40, help="paper: 40")
    add("--patience", type=count, default=5, help="epochs without a better score until it stops; our choice")
    add("--batch-size", type=count, default=32, help="paper: searched in 8, 16, 32")
    add("--grad-accumulation", type=count, default=1, help="batches for one optimizer step; our choice")
    add("--lr", type=share, default=2e-5, help="paper: searched in 1e-5, 2e-5, 5e-5, 4e-6")
    add("--weight-decay", type=share, default=0.01, help="AdamW's, from two dimensions on; our choice")
    add("--warmup", type=share, default=0.1, help="share of the steps, linear decay follows; our choice")
    add("--weights", type=number(float, 0, 1e6, 3), metavar="CE,KD,ILD", help="Eq. 4; paper: 1/3; kd: ours")
    add("--temperature", type=number(float, 1e-3, 1e3), default=2.0, help="of the KD term; our choice")
    add("--max-temperature", type=number(float, 1, 1e3), help="pro-kd: falls from it to 1; our choice: 7")
    add("--first-stage", type=count, metavar="EPOCHS", help="cr-ild, pro-kd; our choice: half of the epochs")
    add("--proj-dim", type=number(int, 1, 10 ** 5), help="width u of the maps; paper: 128")
    add("--teacher-proj", choices=("frozen", "trained"), help="its map; our choice: frozen (codir: trained)")
    add("--start", choices=("ridge", "random"), help="student's map: least squares, our choice, or as drawn")
    add("--shared-proj", action=both, dest="shared", help="rail-l: one pair of maps for all; our choice")
    add("--max-length", type=number(int, 4), default=128, help="tokens; our choice")
    add("--max-train-examples", type=count, default=10 ** 9, help="random subset for all seeds; our choice")
    add("--seed", type=seed, default=42, help="of the student's run; paper: 5 seeds; 42: ours")
    add("--teacher-epochs", type=count, default=3, help="to fine-tune a teacher without a head; our choice")
    add("--teacher-lr", type=share, default=2e-5, help="for the same; our choice")
    add("--teacher-seed", type=seed, default=42, help="for the same; --seed does not move it (our choice)")
    add("--keep-teacher-epochs", action=both, default=False, dest="keep", help="of its training; pro-kd: yes")
    add("--teacher-cache", metavar="DIR", help="keeps its outputs; if not given, beside the runs; or off")
    add("--teacher-labels", type=lambda x: x.split(","), metavar="A,B", help="its labels in its own order")
    add("--checkpoint-minutes", type=number(float, 0), default=10.0, help="between two; our choice")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="paper: mixed precision")
    add("--device", help="cpu, cuda, cuda:1, ..; if not given, a GPU where there is one")
    add("--overwrite", action="store_true", help="run anew where there are results")
    add("--report", metavar="DIR", help="print a table of the finished runs below DIR, train nothing")
    first = parser.parse_known_args(argv)[0]
    if first.task == "toy":
        epochs = 8 * len(WEIGHTS.get(first.method, THIRDS))         # for each stage
        parser.set_defaults(epochs=epochs, patience=8, lr=1e-3, teacher_epochs=8, teacher_lr=1e-3)
    parser.set_defaults(**{"pro-kd": {"max_temperature": 7.0, "keep": True}}.get(first.method, {}))
    args = parser.parse_args(argv)
    files = [args.train_file, args.validation_file]
    if not args.report and (any(files) != all(files) or any(files) == (args.task in TASKS)):
        parser.error(f"need --task, one of {', '.join(TASKS)}, or both --train-file and --validation-file")
    args.task, args.version = args.task or "own", 3                 # of what is written
    *before, last = WEIGHTS.get(args.method, THIRDS)
    last = THIRDS[0] if args.distance and not METHODS[args.method][1] else last
    args.weights = args.weights or last[:3]
    args.stages = [*before, (*args.weights, 0.0)]
    args.first_stage = args.first_stage or (args.epochs // 2 if before else args.epochs)
    if before and not 0 < args.first_stage < args.epochs or not before and args.first_stage != args.epochs:
        parser.error(f"--method {args.method}, {len(before) + 1} stage(s): two: 0 < --first-stage < --epochs")
    if (args.weights[2] or args.select) and not (args.distance or METHODS[args.method][1]):
        parser.error(f"--method {args.method} has no distance: give one, or leave --select and --weights")
    return parser, args

def main(argv=None):
    """Run a command line -> results, or --report's scores. SystemExit: 2 a user's mistake, 1 a full disk."""
    parser, args = parse(argv)
    try:
        return report(args.report) if args.report else run(args)
    except UserError as error:
        parser.error(" ".join(str(error).split()))
    except Exception as error:                                      # a full disk has many names
        if not (isinstance(error, OSError) or "os error" in str(error) or "inline_container" in str(error)):
            raise
        parser.exit(1, f"railkd.py: error: reading or writing failed: {' '.join(str(error).split())}\n")

if __name__ == "__main__":
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, on_signal)
    main()
    if WORLD > 1:
        os._exit(sys.stdout.flush() or 0)                           # torch's threads may abort a normal end
