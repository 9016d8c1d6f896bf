"""Make a network smaller while two gloo processes train it. Run by test_shrink.py."""

import sys
from pathlib import Path

import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent))
from test_compression_callback import fit

from callbacks import Shrink


class Compare(Callback):
    def on_train_epoch_end(self, trainer, module):
        for name, tensor in module.backbone.state_dict().items():
            if "running" not in name and "num_batches" not in name:  # these depend on each process's own pictures
                both = trainer.strategy.all_gather(tensor)
                assert torch.equal(both[0], both[1]), name
        sizes.append(module.backbone[0].out_channels)


sizes: list[int] = []


def main() -> None:
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [Shrink("fold", 0.5, after=1, network="backbone"), Compare()]
    module, _ = fit(Path(sys.argv[1]), callbacks, strategy=strategy, devices=2, epochs=3)
    assert module.backbone[0].out_channels == 4
    assert sizes == [8, 4, 4]
    print("same on both")


if __name__ == "__main__":
    main()
