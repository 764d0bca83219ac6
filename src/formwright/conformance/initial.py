"""Initialisation schemes: every matrix is set, finite, by the seed, and loaded weights stay."""

import torch
from torch import nn

from formwright.conformance.check import check, ensure
from formwright.conformance.subject import DIM, Subject


class _Layers(nn.Module):
    """One of each plain layer a scheme meets, with the roles parts give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, DIM, padding_idx=0)
        self.query_key_value = nn.Linear(DIM, 3 * DIM)
        self.query_key_value.role, self.query_key_value.splits = "query-key-value", [DIM, DIM, DIM]
        self.out, self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.out.role, self.up.role, self.down.role = "out", "up", "down"
        self.plain, self.patches, self.norm = nn.Linear(DIM, 5), nn.Conv2d(3, DIM, 2), nn.LayerNorm(DIM)
        for module in self.children():
            module.stack = "encoder"


def _initialised(subject: Subject, seed: int, fill: float = float("nan")) -> dict[str, torch.Tensor]:
    layers = _Layers()
    known = {"dim": DIM, "layers": 3, "encoder_layers": 3, "decoder_layers": 0}
    scheme = subject.target(**{k: v for k, v in known.items() if k in subject.parameters()}, **subject.options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in layers.parameters():
            parameter.fill_(fill)
        torch.manual_seed(seed)
        for module in layers.children():
            scheme(module)
    return dict(layers.named_parameters())


@check(slots=("init",))
def scheme_sets_everything(subject: Subject) -> None:
    """Nothing keeps what it held before; matrices are not constant, biases are 0, norms 1, the padding row 0."""
    weights = _initialised(subject, seed=0)
    for name, weight in weights.items():
        ensure(bool(torch.isfinite(weight).all()), f"{subject} leaves {name} as it was.")
        if name.endswith("bias"):
            ensure(not weight.any(), f"{subject} sets {name} to other than 0.")
        elif name == "norm.weight":
            ensure(bool((weight == 1).all()), f"{subject} sets {name} to other than 1.")
        else:
            ensure(weight.std() > 0, f"{subject} makes {name} constant.")
    ensure(not weights["embedding.weight"][0].any(), f"{subject} gives the padding id a vector.")


@check(slots=("init",))
def scheme_follows_the_seed(subject: Subject) -> None:
    """One seed, one set of weights; another seed, others."""
    first, again, other = (_initialised(subject, seed=seed) for seed in (0, 0, 1))
    same = [torch.equal(first[name], again[name]) for name in first]
    ensure(all(same), f"{subject} gives two sets of weights under one seed.")
    ensure(not torch.equal(first["up.weight"], other["up.weight"]), f"{subject} does not follow the seed.")


@check(slots=("init",))
def scheme_spares_loaded_weights(subject: Subject) -> None:
    """What Hugging Face has just read from a file is not set again, whole or by slices."""
    from transformers.initialization import guard_torch_init_functions

    layers = _Layers()
    known = {"dim": DIM, "layers": 3, "encoder_layers": 3, "decoder_layers": 0}
    scheme = subject.target(**{k: v for k, v in known.items() if k in subject.parameters()}, **subject.options)
    with torch.no_grad(), guard_torch_init_functions():
        for parameter in layers.parameters():
            parameter.fill_(7.0)
            parameter._is_hf_initialized = True
        for module in layers.children():
            scheme(module)
    for name, weight in layers.named_parameters():
        ensure(bool((weight == 7).all()), f"{subject} overwrites {name}, which was loaded from a file.")
