"""Embeddings and softmax in clusters: exact properties, then torch's own."""

import math

import pytest
import torch
from torch import nn

from formwright.parts.embedding.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

CUTS = {"vocab": 30, "dim": 16, "cutoffs": (10, 22)}


def pair(div_val, **options):
    torch.manual_seed(0)
    embedding = AdaptiveEmbedding(**CUTS, div_val=div_val)
    softmax = AdaptiveSoftmax(**CUTS, div_val=div_val, **options)
    with torch.no_grad():
        for p in (*embedding.parameters(), *softmax.parameters()):
            p.copy_(torch.randn_like(p) * 0.5)
    return embedding, softmax


@pytest.mark.parametrize("div_val", [1, 2])
def test_every_id_has_its_clusters_row(div_val):
    embedding, _ = pair(div_val)
    ids = torch.randperm(30)[None]
    x = embedding(ids)
    for place, i in enumerate(ids[0].tolist()):
        cluster = 0 if i < 10 else 1 if i < 22 else 2
        row = embedding.tables[cluster].weight[i - (0, 10, 22)[cluster]]
        assert len(row) == 16 // div_val**cluster
        row = row if div_val == 1 else embedding.projections[cluster].weight @ row
        torch.testing.assert_close(x[0, place], row * math.sqrt(16))


@pytest.mark.reference
@pytest.mark.parametrize("div_val", [2, 4])
def test_equal_to_torch(div_val):
    embedding, softmax = pair(div_val, bias=False)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 30, [10, 22], div_value=float(div_val))
    with torch.no_grad():
        embedding.projections[0].weight.copy_(torch.eye(16))
        theirs.head.weight.copy_(torch.cat([embedding.tables[0].weight, softmax.rest.weight]))
        for i, tail in enumerate(theirs.tail, 1):
            tail[0].weight.copy_(embedding.projections[i].weight.mT)
            tail[1].weight.copy_(embedding.tables[i].weight)
    x, targets = torch.randn(2, 9, 16), torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(softmax(x, embedding), theirs.log_prob(x.flatten(0, 1)).unflatten(0, (2, 9)))
    torch.testing.assert_close(softmax.loss(x, targets, embedding), theirs(x.flatten(0, 1), targets.flatten()).loss)


@pytest.mark.parametrize("own", [True, False])
def test_the_loss_is_the_mean_over_what_is_told(own):
    embedding, softmax = pair(2, tables=own, projections=own)
    x, targets = torch.randn(3, 7, 16), torch.randint(0, 30, (3, 7))
    targets[0, 3:] = -100
    picked = softmax(x, embedding).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(softmax.loss(x, targets, embedding), -picked[targets != -100].mean())
    loss = softmax.loss(x, targets, embedding)
    reached = torch.autograd.grad(loss, tuple(embedding.parameters()), allow_unused=True)
    assert all((grad is None) == own for grad in reached)
