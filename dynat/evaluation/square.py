"""The l-infinity Square attack (Andriushchenko et al. 2020) of ``pyautoattack``, query by query the same.

The package spends most of a small network's time around its forwards. Here the random numbers are drawn at
once, in the package's order, only the window that a query changes is touched, and broken samples are
dropped when they break. Settings and outer loop are the package's.
"""

import math

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor

from dynat.methods.attacks import margins


class Square(SquareAttack):
    """``original`` with a leaner loop: the same images, to the bit, from the same network and seed."""

    def __init__(self, original: SquareAttack) -> None:
        self.__dict__.update(vars(original))
        assert (self.norm, self.loss, self.targeted) == ("Linf", "margin", False)

    @torch.no_grad()
    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Queries used [B] and images [B,C,H,W] for ``x`` float32 [B,C,H,W] with labels ``y`` int64 [B]."""
        count, channels, height, width = x.shape
        low, high = (x - self.eps).clamp_(min=0), (x + self.eps).clamp_(max=1)
        found = (x + self.eps * self.random_choice([count, channels, 1, width])).clamp_(0, 1)
        draws = torch.rand(self.n_queries, 2 + channels)  # a query: row, column, sign per channel
        sides = torch.tensor([self._side(query, height, width) for query in range(self.n_queries)])
        rows = ((height - sides) * draws[:, 0]).long().tolist()
        columns = ((width - sides) * draws[:, 1]).long().tolist()
        deltas = (2.0 * self.eps * torch.sign(2 * draws[:, 2:] - 1))[:, :, None, None].to(x.device)
        used = torch.ones(count, device=x.device)
        score = margins(self.predict(found), y)
        alive = (score < 0).nonzero().squeeze(1)
        best, score, low, high, y = found[alive], score[alive], low[alive], high[alive], y[alive]
        for side, row, column, delta in zip(sides.tolist(), rows, columns, deltas, strict=True):
            if not len(alive):
                break
            window = (..., slice(row, row + side), slice(column, column + side))
            tried = best.clone()
            tried[window] = torch.minimum(torch.maximum(best[window] + delta, low[window]), high[window])
            reached = margins(self.predict(tried), y)
            better = (reached > score) | (reached >= 0)
            best = torch.where(better[:, None, None, None], tried, best)
            score = torch.where(better, reached, score)
            used[alive] += 1
            broken = score >= 0
            if broken.any():
                found[alive] = best
                kept = (~broken).nonzero().squeeze(1)
                alive, best, score = alive[kept], best[kept], score[kept]
                low, high, y = low[kept], high[kept], y[kept]
        found[alive] = best
        return used, found

    def _side(self, query: int, height: int, width: int) -> int:
        """Side of the square that a query changes, in pixels."""
        side = max(round(math.sqrt(self.p_selection(query) * height * width)), 1)
        return min(side, height, width)
