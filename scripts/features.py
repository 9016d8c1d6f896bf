"""Features of trained networks that need no data, as columns beside the cells of a sweep.

python -m scripts.features runs                  writes runs/features.parquet, which `foldability report` reads
python -m scripts.features runs --data-root cifar10.npz

One line a cell that is done and kept its network (see pipeline.features). Cells that are in the file already are not
computed again. The data set is opened for the shape of its samples, and no feature looks at one.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
from lightning import LightningDataModule

from pipeline.cells import cells, read_record
from pipeline.features import features
from pipeline.study.sweep import FEATURES
from pipeline.tables import UserError, first_line
from scripts.arguments import refuse, warn
from scripts.build_data import build_data
from scripts.build_network import build_net
from scripts.config import Config
from scripts.train import CHECKPOINT, quiet


def main() -> None:
    try:
        run(arguments())
    except UserError as error:
        refuse(error)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the cells (paths.runs of the sweep)")
    parser.add_argument("--data-root", help="where the data lie now, if not where they lay at the training")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Compute the features of all cells that are done and lack them."""
    quiet()
    path = args.runs / FEATURES
    there = pl.read_parquet(path) if path.exists() else pl.DataFrame(schema={"cell": pl.String})
    known, data_of = set(there["cell"]), once_per_data(build_data)
    todo = [one for one in trained(args.runs, args.data_root) if one[0].name not in known]
    for place, (folder, config) in enumerate(todo, 1):
        try:
            data = data_of(config)
            found = features(build_net(config, data).eval(), data.example)
        except UserError as error:
            warn(f"{folder.name} has no features: {error}")
            continue
        there = pl.concat([there, pl.DataFrame({"cell": folder.name, **found})], how="diagonal_relaxed")
        write(there, path)
        print(f"{folder.name}: {len(found)} features ({place} of {len(todo)})", flush=True)
    print(f"{path}: features of {len(there)} cells")


def trained(runs: Path, root: str | None) -> Iterator[tuple[Path, Config]]:
    """(folder, config whose checkpoint is the trained network) of the cells that are done and kept their network."""
    for folder in cells(runs):
        record = read_record(folder)
        if record is None or record["state"] != "done":
            continue
        config = record["config"]
        checkpoint = folder / CHECKPOINT if (folder / CHECKPOINT).exists() else config.get("checkpoint")
        if checkpoint is None:
            warn(f"{folder.name} has no features: it kept no network")
            continue
        data = config["data"] if root is None else {**config["data"], "root": root}
        yield folder, {**config, "data": data, "checkpoint": str(checkpoint)}


def once_per_data(build: Callable[[Config], LightningDataModule]) -> Callable[[Config], LightningDataModule]:
    """`build`, once for all cells that were trained alike: their data differ in the seed of the split alone."""
    made: dict[str, LightningDataModule] = {}

    def data_of(config: Config) -> LightningDataModule:
        key = json.dumps([config["data"], config["model"]], sort_keys=True)
        if key not in made:
            made[key] = build(config)
        return made[key]

    return data_of


def write(table: pl.DataFrame, path: Path) -> None:
    """The file is replaced whole, so that a run that is cut off leaves what it computed."""
    part = path.with_suffix(".part")
    try:
        table.write_parquet(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}); make its folder writable") from error


if __name__ == "__main__":
    main()
