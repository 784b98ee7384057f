"""The optimiser against torch's own."""

import torch
from torch import nn

from dynat.methods.optimizer import SGD


def test_updates_equal_torch_sgd_to_the_bit_also_after_resuming_and_with_unused_parameters() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = SGD(mine, lr=0.1, momentum=0.9, weight_decay=5e-4)
    torchs = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(6):
        if step == 3:
            resumed = SGD(mine, lr=0.1, momentum=0.9, weight_decay=5e-4)
            resumed.load_state_dict(ours.state_dict())
            ours = resumed
            ours.lr = torchs.param_groups[0]["lr"] = 0.01
        ours.zero_grad()
        torchs.zero_grad()
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        torchs.step()
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
