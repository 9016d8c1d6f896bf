"""Make a network smaller while two gloo processes train it. Run by test_shrink.py.

All that a process goes on with must be the same on both: weights, the optimizer's state, the masks, the weights to go
back to, and what the network went through. Running statistics alone depend on each process's own pictures.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent))
from test_compression_callback import TRAIN, fit

from callbacks import Shrink
from pipeline.compression.plan import history, told

OWN = ("running", "num_batches")  # of tensors that depend on a process's own pictures
BATCHES = {"after": 1, "steps": 2, "every_n_batches": 4}  # an epoch of one of two processes has three batches
# {name: (options of Shrink, width of the first layer after every batch)}
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "by epochs": ({"method": "mix+data", "ratio": 0.5, "after": 1}, [8] * 3 + [4] * 3),
    "by batches": ({"method": "fold", "ratio": 0.75, "rewind_to": 1, **BATCHES}, [8] + [4] * 4 + [2]),
    "masks": ({"method": "lamp", "ratio": 0.75, "rewind_to": 0, **BATCHES}, [8] * 6),
}


class Compare(Callback):
    def __init__(self, shrink: Shrink) -> None:
        self.shrink, self.widths = shrink, []

    def on_train_batch_end(self, trainer, module, *_):
        net, state = module.backbone, trainer.optimizers[0].state
        held = {f"momentum of {name}": state[p]["momentum_buffer"] for name, p in net.named_parameters()}
        held |= {f"mask {i}": mask for i, (_, mask) in enumerate(self.shrink._masked)}
        held |= {f"early {name}": tensor for name, tensor in self.shrink._early.items()}
        held |= {name: t for name, t in net.state_dict().items() if not any(word in name for word in OWN)}
        both = trainer.strategy.all_gather(torch.cat([t.detach().flatten().double() for t in held.values()]))
        parts = zip(held, *(one.split([t.numel() for t in held.values()]) for one in both), strict=True)
        wrong = [name for name, mine, theirs in parts if not torch.equal(mine, theirs)]
        assert not wrong, (list(self.shrink.chains.recipes), trainer.global_step, wrong)
        steps = str(told(history(net)))
        assert trainer.strategy.broadcast(steps) == steps
        self.widths.append(net[0].out_channels)


def main() -> None:
    for name, (options, widths) in CASES.items():
        shrink = Shrink(network="backbone", repair_data=TRAIN, repair_size=64, **options)
        compare = Compare(shrink)
        strategy = DDPStrategy(process_group_backend="gloo")
        module, _ = fit(Path(sys.argv[1]) / name, [shrink, compare], strategy=strategy, devices=2, epochs=2)
        assert compare.widths == widths, (name, compare.widths)
        if "masks" in name:
            weights = [module.backbone.get_parameter(f"{i}.weight") for i in (0, 4, 9)]
            zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
            assert abs(zeros - 0.75) < 0.002, zeros
    print("same on both")


if __name__ == "__main__":
    main()
