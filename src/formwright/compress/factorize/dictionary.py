"""Dictionary learning, the factoriser that looks at weights alone: rows as sums of few atoms of a common basis.

    blocks X (p x q)  ~  S (p x r, s non-zeros a row)  D (r x q, rows of norm 1 = atoms)        many blocks at once

Coding is orthogonal matching pursuit: the atom that is most like what is left of a row joins it, s times, each time
with the best values for all atoms chosen so far. A step on the atoms follows, by least squares or atom by atom (K-SVD);
and so on in turns. A row keeps its old code where the new one is worse, so that no step adds to the error.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Recipe = Literal["least-squares", "k-svd"]

LEAST = 1e-6  # of an atom's squared norm, beside the atoms before it: below that it is one of their sums
AT_ONCE = 2**19  # numbers that coding keeps at a time: they fit a processor's cache


class Code(NamedTuple):
    """The atoms of each row, all different, and their values."""

    chosen: Int[Tensor, "g p s"]
    values: Float[Tensor, "g p s"]

    def dense(self, atoms: int) -> Float[Tensor, "g p r"]:
        return self.values.new_zeros(*self.values.shape[:2], atoms).scatter(-1, self.chosen, self.values)


def product(basis: Float[Tensor, "g r q"], code: Code) -> Float[Tensor, "g p q"]:
    """S D, with gradients."""
    return code.dense(basis.shape[1]) @ basis


@torch.no_grad()
def factorise(
    blocks: Float[Tensor, "g p q"], atoms: int, nonzeros: int, *, rounds: int, recipe: Recipe = "least-squares"
) -> tuple[Float[Tensor, "g r q"], Code]:
    """Basis and code of every block. With all atoms in every row it is the best of rank `atoms`, by SVD.

    Args:
        rounds: turns of coding and a step on the atoms.
        recipe: "least-squares" starts from rows of the block; "k-svd", as the author's code, from uniform numbers.
    """
    if nonzeros == atoms:
        left, singular, right = torch.linalg.svd(blocks, full_matrices=False)
        every = torch.arange(atoms, device=blocks.device).expand(*blocks.shape[:2], atoms)
        return right[:, :atoms].contiguous(), Code(every.contiguous(), left[..., :atoms] * singular[:, None, :atoms])
    if recipe == "k-svd":
        basis = torch.rand(len(blocks), atoms, blocks.shape[2], device=blocks.device).to(blocks.dtype)
    else:
        drawn = torch.stack([torch.randperm(blocks.shape[1])[:atoms] for _ in blocks]).to(blocks.device)
        basis = blocks.gather(1, drawn[..., None].expand(-1, -1, blocks.shape[2]))
    basis = basis / nonzero(basis.norm(dim=-1, keepdim=True))
    code = pursue(blocks, basis, nonzeros)
    step = k_svd_step if recipe == "k-svd" else least_squares_step
    for turn in range(rounds):
        if turn:
            code = better(blocks, basis, code, pursue(blocks, basis, nonzeros))
        basis, code = step(blocks, basis, code)
    return basis, code


def pursue(blocks: Float[Tensor, "g p q"], basis: Float[Tensor, "g r q"], nonzeros: int) -> Code:
    """Orthogonal matching pursuit of all rows, many at a time."""
    size = max(1, AT_ONCE // (len(blocks) * nonzeros * basis.shape[1]))
    parts = [_pursue(rows, basis, nonzeros) for rows in blocks.split(size, 1)]
    return Code(torch.cat([one.chosen for one in parts], 1), torch.cat([one.values for one in parts], 1))


def _pursue(blocks: Float[Tensor, "g p q"], basis: Float[Tensor, "g r q"], nonzeros: int) -> Code:
    """The atoms chosen so far are made orthogonal; only what each has in common with all atoms is kept."""
    norms = nonzero(basis.norm(dim=-1))
    unit = basis / norms[..., None]
    likeness = unit @ unit.mT  # g r r
    left = blocks @ unit.mT  # g p r, what is left of a row against every atom
    groups, rows, atoms = left.shape
    triangle = left.new_zeros(groups, rows, nonzeros, nonzeros)  # the chosen atoms in the orthogonal directions
    directions: list[Tensor] = []
    parts, chosen = [], []
    closed = torch.zeros_like(left)
    for turn in range(nonzeros):
        best = (left.abs() + closed).argmax(-1, keepdim=True)  # g p 1
        closed.scatter_(-1, best, -torch.inf)
        new = likeness.gather(1, best.expand(-1, -1, atoms))
        for place, before in enumerate(directions):
            share = before.gather(-1, best)
            triangle[:, :, turn, place] = share.squeeze(-1)
            new.addcmul_(share, before, value=-1)
        length = new.gather(-1, best).clamp(min=LEAST).sqrt()
        triangle[:, :, turn, turn] = length.squeeze(-1)
        new /= length
        part = left.gather(-1, best) / length
        left = torch.addcmul(left, part, new, value=-1)
        directions.append(new)
        parts.append(part)
        chosen.append(best)
    index = torch.cat(chosen, -1)
    values = torch.linalg.solve_triangular(triangle.mT, torch.cat(parts, -1)[..., None], upper=True).squeeze(-1)
    return Code(index, values / norms[:, None].expand(-1, rows, -1).gather(-1, index))


def better(blocks: Float[Tensor, "g p q"], basis: Float[Tensor, "g r q"], old: Code, new: Code) -> Code:
    """Of two codes of a row the nearer."""
    errors = [(blocks - product(basis, code)).square().sum(-1, keepdim=True) for code in (old, new)]
    keeps = errors[0] <= errors[1]
    return Code(torch.where(keeps, old.chosen, new.chosen), torch.where(keeps, old.values, new.values))


def least_squares_step(
    blocks: Float[Tensor, "g p q"], basis: Float[Tensor, "g r q"], code: Code
) -> tuple[Float[Tensor, "g r q"], Code]:
    """The best atoms for this code. Atoms nobody uses stay."""
    coefficients = code.dense(basis.shape[1])
    used = (coefficients != 0).any(1)  # g r
    products = coefficients.mT @ coefficients
    # a row of the identity where nothing is used, and hardly more than nothing where two atoms are always used alike
    ridge = torch.where(used, 1e-7 * products.diagonal(dim1=1, dim2=2), 1.0)
    old = torch.where(used[..., None], ridge[..., None], 1.0) * basis
    made = torch.linalg.solve(products + torch.diag_embed(ridge), coefficients.mT @ blocks + old)
    norms = nonzero(made.norm(dim=-1))
    values = code.values * norms[:, None].expand(-1, blocks.shape[1], -1).gather(-1, code.chosen)
    return made / norms[..., None], Code(code.chosen, values)


def k_svd_step(
    blocks: Float[Tensor, "g p q"], basis: Float[Tensor, "g r q"], code: Code
) -> tuple[Float[Tensor, "g r q"], Code]:
    """Approximate K-SVD, one atom after the other: the atom that fits what the others leave of the rows that use it,
    and their values for it. Atoms nobody uses stay."""
    basis, coefficients = basis.clone(), code.dense(basis.shape[1])
    left = blocks - coefficients @ basis
    for atom in range(basis.shape[1]):
        values = coefficients[..., atom]  # g p, 0 where a row does not use it
        users = values != 0
        without = (left + values[..., None] * basis[:, None, atom]) * users[..., None]
        found = (values[:, None] @ without).squeeze(1)  # g q
        norm = found.norm(dim=-1, keepdim=True)
        found = torch.where(norm > 0, found / nonzero(norm), basis[:, atom])
        new = (without @ found[..., None]).squeeze(-1)
        left = torch.where(users[..., None], without - new[..., None] * found[:, None], left)
        basis[:, atom], coefficients[..., atom] = found, torch.where(users, new, 0)
    return basis, Code(code.chosen, coefficients.gather(-1, code.chosen))


def nonzero(norm: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A norm to divide by; what is all zeros has any."""
    return torch.where(norm > 0, norm, 1.0)
