"""What each domain adds to the loss of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcli.api import Batch


class Tally:
    """Sums over the units of a micro-batch, by term and by domain (D domains, of those in the batch): what a unit adds
    to the step's mean (share x value), and its share alone.

    Summed elementwise, so that neither autocast nor the order of a GPU's threads changes a digit.
    """

    def __init__(self, batch: Batch, terms: Iterable[str]) -> None:
        names = batch.domain or ["default"] * batch.num_sequences
        self.domains = list(dict.fromkeys(names))
        self.terms = list(terms)
        places = torch.tensor([self.domains.index(name) for name in names])
        one_hot = torch.nn.functional.one_hot(places, len(self.domains)).float()
        self.member = one_hot.to(batch.mask.device)  # [E, D]
        self.targets = self.member[batch.segment[batch.mask]].sum(0)  # [D]
        self.sums = self.member.new_zeros(len(self.terms), 2, len(self.domains))  # of share x value, of share

    @torch.no_grad()
    def add(self, term: str, values: Tensor, shares: Tensor, sequences: Tensor) -> None:
        """Some units of a term, [U] each: their values, their shares, and which sequence (0..E-1) each is of."""
        both = torch.stack([shares * values, shares])  # [2, U]
        self.sums[self.terms.index(term)] += (both.unsqueeze(-1) * self.member[sequences]).sum(1)

    def metrics(self) -> dict[str, float]:
        """`loss/TERM` of the whole micro-batch, then `domain/NAME/loss/TERM`, `.../share/TERM` and `.../targets`."""
        *by_term, (targets, _) = torch.cat([self.sums, self.targets.expand(1, 2, -1)]).tolist()  # one wait for a GPU
        losses = {f"loss/{term}": sum(values) for term, (values, _) in zip(self.terms, by_term, strict=True)}
        parts = {
            f"domain/{name}/{kind}/{term}": value
            for term, both in zip(self.terms, by_term, strict=True)
            for kind, values in zip(("loss", "share"), both, strict=True)
            for name, value in zip(self.domains, values, strict=True)
        }
        return losses | parts | {f"domain/{name}/targets": t for name, t in zip(self.domains, targets, strict=True)}
