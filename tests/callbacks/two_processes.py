"""Train on two gloo processes with and without the callback and compare. Run by test_compression_callback.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parent))
from test_compression_callback import callback, fit


def main() -> None:
    folder = Path(sys.argv[1])
    weights = []
    for measured in ([], [callback(rows=folder / "rows.parquet")]):
        strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
        module, _ = fit(folder, measured, strategy=strategy, devices=2)
        weights.append({name: t.clone() for name, t in module.state_dict().items()})
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    import polars as pl

    rows = pl.read_parquet(folder / "rows.parquet")
    assert set(rows["n"]) == {61}, set(rows["n"])
    assert set(rows["status"]) == {"ok"}, rows["reason"]
    print("bit-identical")


if __name__ == "__main__":
    main()
