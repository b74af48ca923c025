"""Eigenpairs of largest absolute value of a symmetric operator that is only ever applied."""

from collections.abc import Callable

import torch
from torch import Tensor

from polylens.errors import ConvergenceError

MAX_STEPS = 4000
# Fewer vectors at a time reach further with as many products, more of them make better use of
# reading the operator once.
WIDTH = 16
# Blocks between looks at the projected matrix, whose diagonalisation is not free.
CHECK_EVERY = 2


@torch.no_grad()
def extreme_eigenpairs(
    apply: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    device: torch.device,
    tolerance: float = 1e-9,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k eigenpairs of largest |eigenvalue|, by block Lanczos with thick restarts.

    The whole basis is kept orthogonal by projecting twice, so the recurrence cannot lose
    orthogonality; a block finds eigenvalues of multiplicity up to its width.

    Args:
        apply: [size, n] -> [size, n], float64, symmetric; its rounding bounds the tolerance.
        size: dimension of the space.
        k: number of pairs, at most `size`.
        tolerance: residual |M q - value q| over the largest |value| at which a pair is done;
            the error of the value is of the order of its square.
        seed: of the starting block; the result depends on it by the tolerance only.
        start: [size, n] vectors to start from, such as the result of a coarser run.

    Returns:
        (values [k], vectors [size, k]) by falling |value|.

    Raises:
        ConvergenceError: not converged after 4000 blocks.

    Cost: some tens of products with 16 vectors; memory size x max(320, 4 k) float64.
    Source: Wu & Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue
    problems".
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(n: int) -> Tensor:  # the same on every device
        return torch.randn(size, n, dtype=torch.float64, generator=generator).to(device)

    width = min(size, WIDTH)
    limit = min(size, max(20 * width, 4 * k + 2 * width))
    basis = noise(0)
    projected = torch.zeros(0, 0, dtype=torch.float64, device=device)
    block = torch.linalg.qr(noise(width) if start is None else start).Q
    width = block.shape[1]
    scale = None
    for step in range(1, MAX_STEPS + 1):
        image = apply(block)
        basis = torch.cat([basis, block], dim=1)
        column = basis.T @ image
        before, count = len(projected), basis.shape[1]
        grown = torch.zeros(count, count, dtype=torch.float64, device=device)
        grown[:before, :before] = projected
        grown[:, before:] = column
        grown[before:, :] = column.T
        projected = (grown + grown.T) / 2
        # What leaves the span comes from the last block alone, and the next block spans it.
        left = image - basis @ column
        full = count + width > limit
        if step % CHECK_EVERY == 0 or full or scale is None:
            values, rotation = torch.linalg.eigh(projected)
            order = values.abs().argsort(descending=True)
            largest, scale = order[:k], values.abs().max()
            residuals = torch.linalg.vector_norm(left @ rotation[before:, largest], dim=0)
            if count == size or (count >= k and residuals.max() <= tolerance * scale):
                return values[largest], basis @ rotation[:, largest]
        block = _next_block(left, basis, noise, scale)[:, : size - count]
        if full and limit < size:
            kept = order[: limit // 2]
            basis = basis @ rotation[:, kept]
            projected = torch.diag(values[kept])
    raise ConvergenceError(
        f"{k} eigenpairs of a form of size {size} did not converge in {MAX_STEPS} blocks; ask "
        "for fewer, or use method='dense'"
    )


def _next_block(
    left: Tensor, basis: Tensor, noise: Callable[[int], Tensor], scale: Tensor
) -> Tensor:
    """An orthonormal block that spans `left`; spent directions give way to random ones.

    `left` was projected once; a second time, after its columns have length one, is enough.
    """
    block, R = torch.linalg.qr(left)
    spent = R.diagonal().abs() <= 1e-14 * scale
    if spent.any():
        block[:, spent] = torch.linalg.qr(_outside(noise(int(spent.sum())), basis)).Q
    return torch.linalg.qr(_outside(block, basis)).Q


def _outside(block: Tensor, basis: Tensor) -> Tensor:
    return block - basis @ (basis.T @ block)
