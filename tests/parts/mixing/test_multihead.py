"""Multi-head attention: what reads the projection itself also honours a layer put in its place."""

import torch
from torch import nn

from formwright.contracts import Context
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention


class Doubled(nn.Linear):
    """As an adapter does, it is more than its matrix."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_cross_attention_goes_through_an_adapted_projection():
    torch.manual_seed(0)
    mixer = MultiHeadAttention(dim=8, heads=4, kv_heads=2, attention=SoftmaxAttention())
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    context = Context(queries=5, keys=7, memory=memory)
    with torch.no_grad():
        mixer.query_key_value.__class__ = Doubled
        adapted = mixer(x, context)
        mixer.query_key_value.__class__ = nn.Linear
        assert not torch.allclose(mixer(x, context), adapted, atol=1e-3)
        for parameter in mixer.query_key_value.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(mixer(x, context), adapted)
