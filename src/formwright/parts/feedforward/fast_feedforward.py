"""FFF: a tree of small feed-forward layers, of which inference evaluates one.

Paper    Belcak, Wattenhofer: Fast Feedforward Networks (2023), arXiv:2308.14711.
Idea     A balanced binary tree of depth d. Every inner node is a hyperplane that decides between left and right, every
         one of the 2^d leaves a two-matrix layer of width l. Training mixes the leaves by the node's probabilities;
         inference goes one way from the root and evaluates one leaf: d decisions and l neurons in place of 2^d l.

             p_n = sigmoid(n . x + b_n)
             c_left = c (1 - p_n),  c_right = c p_n           c = 1 at the root
             training    y = sum over leaves of c_leaf (act(W1 x + b1) W2 + b2)
             inference   the leaf reached by going right wherever n . x + b_n >= 0
             loss        task + h * sum over nodes of the mean over tokens of H(p_n)

         The last term, hardening, drives the p to 0 or 1 and so closes the gap between the two forms. Since the leaves
         share their input, training is two products as large as those of the dense layer of the same training width.
Differs  The paper sums the entropy over the batch, the release takes the mean over it, as we do, here over real tokens
         only. The release leaves b2 out at inference and reads tokens one by one; the paper's inference, which ours
         is, adds b2, and sorts the tokens by leaf. Not here: the release's optimisers that wait for enough samples.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError

TOGETHER = 6  # levels decided in one product; deeper ones look at the d nodes of the path alone


def entropy(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Of a decision taken with probability sigmoid(logits), in nats; exact for logits of any size."""
    return F.softplus(logits) - logits * logits.sigmoid()


class FastFeedForward(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone; all leaves mixed in training, one leaf in evaluation.

    Compiled or exported, evaluation gives the same values but computes every leaf, at the speed of the dense layer.

    Args:
        dim: width d.
        hidden: training width, all leaves together; rounded up to a multiple of 2^depth.
        depth: levels of decisions; 0 is the plain two-matrix layer.
        hardening: weight h of the nodes' entropy, handed to `context.losses`; 0 = none.
        region_leak: probability, in training, that a node's decision for a token is turned round, so that deep leaves
            are not starved of data.
        train_hardened: training decides as inference does; the nodes then learn from the hardening alone.
        activation: of the leaves.
        dropout: of the leaves' neurons, after the activation.
        usage: what training counts in `node_usage` and `leaf_usage`: mixture weights, decisions, or nothing.
    """

    leaf_usage: Float[Tensor, " leaves"]
    node_usage: Float[Tensor, " nodes"]

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        depth: int = 3,
        hardening: float = 3.0,
        region_leak: float = 0.0,
        train_hardened: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
        dropout: float = 0.0,
        usage: Literal["none", "soft", "hard"] = "none",
    ) -> None:
        super().__init__()
        if depth < 0 or hidden < 2**depth:
            raise FormwrightError(
                f"FastFeedForward needs depth >= 0 and a hidden width of at least 2^depth, one neuron a leaf; got "
                f"depth={depth} and hidden={hidden}."
            )
        if hardening < 0 or not 0 <= region_leak <= 0.5 or not 0 <= dropout < 1:
            raise FormwrightError(
                f"FastFeedForward needs hardening >= 0, region_leak from 0 to 0.5 and dropout from 0 to below 1; got "
                f"hardening={hardening}, region_leak={region_leak} and dropout={dropout}."
            )
        if activation not in ("relu", "gelu") or usage not in ("none", "soft", "hard"):
            raise FormwrightError(
                f"FastFeedForward has activation relu or gelu and usage none, soft or hard; got {activation!r} and "
                f"{usage!r}."
            )
        self.depth, self.leaves, self.nodes = depth, 2**depth, 2**depth - 1
        self.leaf = -(-hidden // self.leaves)
        self.hardening, self.region_leak, self.train_hardened = hardening, region_leak, train_hardened
        self.activation, self.dropout, self.usage = activation, dropout, usage
        if depth:
            self.node_weight = nn.Parameter(torch.empty(self.nodes, dim))
            self.node_bias = nn.Parameter(torch.empty(self.nodes))
        self.up = nn.Parameter(torch.empty(self.leaves, self.leaf, dim))
        self.up_bias = nn.Parameter(torch.empty(self.leaves, self.leaf))
        self.down = nn.Parameter(torch.empty(self.leaves, self.leaf, dim))
        self.down_bias = nn.Parameter(torch.empty(self.leaves, dim))
        biases = (name for name, _ in self.named_parameters() if name.endswith("bias"))
        self.no_weight_decay = tuple(biases)  # a row for every leaf makes them look like matrices
        self.register_buffer("leaf_usage", torch.zeros(self.leaves), persistent=False)
        self.register_buffer("node_usage", torch.zeros(self.nodes), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as far as one over the square root of what each neuron reads; usage starts at nothing."""
        reads = self.up.shape[-1] ** -0.5
        for name, parameter in self.named_parameters():
            bound = self.leaf**-0.5 if name.startswith("down") else reads
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self.leaf_usage)
        nn.init.zeros_(self.node_usage)

    def forward(self, x: Float[Tensor, "b n d"], context: Context | None = None) -> Float[Tensor, "b n d"]:
        tokens = x.flatten(0, 1)
        if self.training:
            real = None if context is None or context.real is None else context.real.flatten()
            return self._train(tokens, real, context).view_as(x)
        if torch.compiler.is_compiling() or tokens.shape[0] == 0:
            reached = self.choose(tokens)[:, None] == torch.arange(self.leaves, device=x.device)
            return self._mix(tokens, reached).view_as(x)
        return (self._alone(tokens) if tokens.shape[0] == 1 else self._grouped(tokens)).view_as(x)

    def _train(
        self, x: Float[Tensor, "t d"], real: Bool[Tensor, " t"] | None, context: Context | None
    ) -> Float[Tensor, "t d"]:
        if not self.depth:
            return self._mix(x, x.new_ones(x.shape[0], 1))
        logits = F.linear(x, self.node_weight, self.node_bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        right = logits.sigmoid()
        if self.region_leak > 0:
            right = torch.where(torch.rand_like(right) < self.region_leak, 1 - right, right)
        if self.train_hardened:
            right = (right >= 0.5).to(right.dtype)
        mixture = self.mixture(right)
        if self.usage != "none":
            self._count(right, mixture, real)
        if context is not None and self.hardening > 0:
            uncertain = entropy(logits)
            if real is not None:
                uncertain = uncertain * real[:, None] * (x.shape[0] / real.sum().clamp(min=1))
            context.add_loss("hardening", self.hardening * uncertain.mean(0).sum())
        return self._mix(x, mixture[:, self.nodes :])

    def mixture(self, right: Float[Tensor, "t nodes"]) -> Float[Tensor, "t all"]:
        """The share of a token that arrives at each node, and, in the last 2^depth columns, at each leaf."""
        levels = [right.new_ones(right.shape[0], 1)]
        for level in range(self.depth):
            p = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
            levels.append(torch.stack((levels[-1] * (1 - p), levels[-1] * p), dim=-1).flatten(1))
        return torch.cat(levels, dim=1)

    def choose(self, x: Float[Tensor, "t d"]) -> Int[Tensor, " t"]:
        """The leaf of each token: d decisions, the first levels' from one product."""
        node = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        together = min(self.depth, TOGETHER)
        if together:
            seen = 2**together - 1
            right = F.linear(x, self.node_weight[:seen], self.node_bias[:seen]) >= 0
            for _ in range(together):
                node = 2 * node + 1 + right.gather(1, node[:, None])[:, 0]
        for _ in range(together, self.depth):
            logits = (x * self.node_weight[node]).sum(-1) + self.node_bias[node]
            node = 2 * node + 1 + (logits >= 0)
        return node - self.nodes

    def _mix(self, x: Float[Tensor, "t d"], mixture: Shaped[Tensor, "t leaves"]) -> Float[Tensor, "t d"]:
        """All leaves, weighted: the weights go on the neurons, so that no (t, leaves, d) array is made."""
        neurons = self._act(F.linear(x, self.up.flatten(0, 1), self.up_bias.flatten()))
        mixture = mixture.to(neurons.dtype)
        weighted = neurons.unflatten(-1, (self.leaves, self.leaf)) * mixture[..., None]
        return weighted.flatten(1) @ self.down.flatten(0, 1) + mixture @ self.down_bias

    def _alone(self, x: Float[Tensor, "1 d"]) -> Float[Tensor, "1 d"]:
        """One token, as in decoding: only the path and the leaf are touched, and nothing is copied."""
        node = 0
        with torch.no_grad():
            for _ in range(self.depth):
                logit = self.node_weight[node] @ x[0] + self.node_bias[node]
                node = 2 * node + 1 + (logit.item() >= 0)
        leaf = node - self.nodes
        return self._act(F.linear(x, self.up[leaf], self.up_bias[leaf])) @ self.down[leaf] + self.down_bias[leaf]

    def _grouped(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        """Tokens sorted by leaf: two products for each leaf that is reached."""
        leaf = self.choose(x)
        ordered, order = leaf.sort(stable=True)
        reached, counts = torch.unique_consecutive(ordered, return_counts=True)
        reached, counts = reached.tolist(), counts.tolist()
        groups = x[order].split(counts)
        up = torch.cat([group @ self.up[i].T for i, group in zip(reached, groups, strict=True)])
        neurons = self._act(up + self.up_bias[ordered]).split(counts)
        down = torch.cat([group @ self.down[i] for i, group in zip(reached, neurons, strict=True)])
        y = down + self.down_bias[ordered]
        return torch.empty_like(y).index_copy(0, order, y)

    def _act(self, neurons: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        active = F.relu(neurons) if self.activation == "relu" else F.gelu(neurons)
        return F.dropout(active, self.dropout, self.training) if self.dropout else active

    @torch.no_grad()
    def _count(
        self, right: Float[Tensor, "t nodes"], mixture: Float[Tensor, "t all"], real: Bool[Tensor, " t"] | None
    ) -> None:
        if self.usage == "hard":
            mixture = self.mixture((right >= 0.5).to(right.dtype))
        if real is not None:
            mixture = mixture * real[:, None]
        self.node_usage += mixture[:, : self.nodes].sum(0)
        self.leaf_usage += mixture[:, self.nodes :].sum(0)
