"""SAM on two gloo processes: both end with the same weights, which SAM moved. Run by test_sam.py."""

import sys
import warnings
from pathlib import Path

import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent))
from test_sam import BASES, loader, task, trainer


class Compare(Callback):
    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.net.parameters()])
        both = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(both, flat)
        assert torch.equal(*both), "the processes drifted apart"


def main() -> None:
    warnings.simplefilter("ignore")
    nets = []
    for rho in (0.0, 0.5):
        fitted = task(BASES["sgd"], {"rho": rho})
        strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
        trainer(strategy=strategy, devices=2, callbacks=[Compare()]).fit(fitted, loader())
        nets.append(fitted.net)
    assert (nets[0][0].weight - nets[1][0].weight).abs().max() > 1e-3
    print("the same weights")


if __name__ == "__main__":
    main()
