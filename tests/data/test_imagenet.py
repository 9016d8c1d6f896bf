"""Pictures that stay on disk: prepared as timm and torchvision do, decoded once, the same from every process."""

import os
import pickle
import random
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision import datasets
from torchvision.models import ResNet18_Weights
from torchvision.transforms.functional import InterpolationMode

from pipeline.data import DATASETS, on_disk
from pipeline.data.module import PictureData
from pipeline.data.on_disk import DecodedCache
from pipeline.tables import UserError

IDS = ["n01440764", "n01443537", "n15075141"]
MODES = ["RGB", "L", "CMYK", "RGBA", "P", "LA"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three classes, 8 + 3 smooth pictures each, of many sizes and modes, all named .JPEG as in ImageNet."""
    root = tmp_path_factory.mktemp("made") / "imagenet"
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(IDS):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                size = tuple(rng.integers(40, 120, 2).tolist())
                small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size)
                picture = small.convert(MODES[(index + label) % len(MODES)])
                form = "JPEG" if picture.mode in ("RGB", "L", "CMYK") else "PNG"  # one of ImageNet's is a PNG, too
                picture.save(root / part / name / f"{name}_{index}.JPEG", form, exif=turned())
    return root


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "imagenet")


def turned():
    """EXIF data that asks for a quarter turn, which neither torchvision nor timm makes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def ready(root, **options):
    data = PictureData("imagenet", root=root, **{"size": 32, "val_fraction": 0.25, "workers": 0, **options})
    data.prepare_data()
    data.setup()
    return data


def fetched(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def pictures_of(folder):
    """All pictures of the folder as torchvision reads them, in its order."""
    return [picture for picture, _ in datasets.ImageFolder(folder)]


SQUASHED = "vit_base_patch16_siglip_224"
MODELS = ["vit_base_patch32_224", "vit_base_patch32_clip_224.openai", SQUASHED, "convnext_tiny"]


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_sees_what_timm_makes_for_its_model(model, made):
    transform = create_transform(**resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict()))
    expected = torch.stack(list(map(transform, pictures_of(made / "val"))))
    data = ready(made, size=None, preprocessing=model)
    images, labels = fetched(data.test_dataloader())
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == datasets.ImageFolder(made / "val").targets
    assert (data.size, data.channels, data.classes) == (expected.shape[-1], 3, IDS)


def test_evaluation_sees_what_torchvision_makes_for_its_models(made):
    transform = ResNet18_Weights.DEFAULT.transforms()
    assert transform.interpolation == InterpolationMode.BILINEAR
    images, _ = fetched(ready(made, size=None, interpolation="bilinear").test_dataloader())
    torch.testing.assert_close(images, torch.stack(list(map(transform, pictures_of(made / "val")))))


def test_own_values_go_before_the_models(made):
    own = {"size": 48, "crop_pct": 0.6, "interpolation": "nearest", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    data = ready(made, preprocessing="vit_base_patch32_224", **own)
    transform = create_transform(48, crop_pct=0.6, interpolation="nearest", mean=own["mean"], std=own["std"])
    expected = torch.stack(list(map(transform, pictures_of(made / "val"))))
    torch.testing.assert_close(fetched(data.test_dataloader())[0], expected)


def test_training_sees_random_crops_and_all_else_does_not(made):
    data = ready(made, augment=["flip"], scale=[0.2, 0.5])
    torch.manual_seed(0)
    first, second = (data.train_data.__getitems__(range(4))[0] for _ in range(2))
    assert first.shape == (4, 3, 32, 32)
    assert not torch.equal(first, second)
    assert torch.equal(*(data.repair_data.__getitems__(range(4))[0] for _ in range(2)))
    torch.manual_seed(0)
    assert torch.equal(data.train_data.__getitems__(range(4))[0], first), "torch's seed decides"
    whole = ready(made, scale=[1.0, 1.0]).train_data.__getitems__([0])[0]
    assert whole.shape == (1, 3, 32, 32)
    assert not torch.equal(whole, data.repair_data.__getitems__([0])[0]), "not the centre crop"


def test_the_cut_of_the_training_pictures_follows_from_the_seed(made):
    first, again, other = (ready(made, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.val_data.rows, again.val_data.rows)
    assert not torch.equal(first.val_data.rows, other.val_data.rows)
    assert torch.cat([first.train_data.rows, first.val_data.rows]).sort().values.tolist() == list(range(24))
    assert torch.equal(first.repair_data.rows, first.train_data.rows)
    assert torch.bincount(first.val_data.labels).tolist() == [2, 2, 2]
    small = ready(made, train_size=9, test_size=3)
    assert [len(part) for part in (small.train_data, small.val_data, small.test_data)] == [9, 6, 3]


def test_workers_serve_the_same_evaluation_pictures(made, tmp_path):
    one, two = (ready(made, workers=workers, eval_batch_size=4) for workers in (0, 2))
    assert two.test_dataloader().num_workers == two.val_dataloader().num_workers == 2
    for loader in ("test_dataloader", "val_dataloader"):
        for ours, theirs in zip(*(fetched(getattr(data, loader)()) for data in (one, two)), strict=True):
            assert torch.equal(ours, theirs)
    # two processes fill one cache
    assert torch.equal(
        fetched(ready(made, workers=2, eval_batch_size=2, cache=tmp_path).test_dataloader())[0],
        fetched(one.test_dataloader())[0],
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_follows_from_torchs_seed(made, workers):
    def epoch(data, seed):
        torch.manual_seed(seed)
        return fetched(data.train_dataloader())[0]

    options = {"augment": ["flip", "trivial_augment"], "batch_size": 5, "workers": workers}
    data = ready(made, **options)
    epoch(data, 1)
    assert torch.equal(epoch(data, 2), epoch(ready(made, **options), 2))
    assert not torch.equal(epoch(data, 2), epoch(data, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluating_draws_nothing(made, workers, tmp_path):
    data = ready(made, workers=workers, cache=tmp_path)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fetched(data.test_dataloader())
    fetched(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_process_for_each_core_unless_told_otherwise(made):
    data = ready(made, workers=None)
    every = suggested_max_num_workers(1)
    assert data.train_dataloader().num_workers == data.test_dataloader().num_workers == every >= 1
    assert ready(made, workers=1).val_dataloader().num_workers == 1
    in_memory = PictureData("digits")
    in_memory.setup()
    assert in_memory.train_dataloader().num_workers == in_memory.test_dataloader().num_workers == 0


def test_survives_pickling(made, tmp_path):
    data = ready(made, augment=["flip"], cache=tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.test_data[0][0], data.test_data[0][0])
    assert copy.train_data[0][0].shape == (3, 32, 32)


def test_val_alone_is_enough_to_measure_on(root):
    shutil.rmtree(root / "train")
    data = ready(root)
    assert len(data.test_data) == 9
    assert torch.equal(data.example[0], data.test_data[0][0])
    fix = r"no training pictures in .*imagenet: put them in train/<class>/, or .* compression\.stages=\[raw\]"
    for asked in (lambda: data.repair_data, lambda: data.train_data, data.train_dataloader, data.val_dataloader):
        with pytest.raises(UserError, match=fix):
            asked()


def test_test_is_another_name_of_val(root):
    (root / "val").rename(root / "test")
    assert len(ready(root).test_data) == 9


def test_the_folder_that_torchvision_unpacks(root):
    """torchvision's ImageNet has a meta.bin of its own; files beside the pictures do not matter."""
    torch.save(({name: (name,) for name in IDS}, []), root / "meta.bin")
    (root / "ILSVRC2012_img_val.tar").write_bytes(b"")
    (root / "val" / IDS[0] / "notes.txt").write_text("no picture")
    theirs = datasets.ImageNet(str(root), split="val")
    data = ready(root)
    assert data.classes == theirs.wnids
    assert data.test_data.labels.tolist() == theirs.targets


# --- decoded pictures are kept


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded so far."""
    seen = []
    read = on_disk.read_picture

    def noted(path, mode):
        seen.append(path)
        return read(path, mode)

    monkeypatch.setattr(on_disk, "read_picture", noted)
    return seen


def test_a_picture_is_decoded_once_for_all_runs(made, tmp_path, decoded):
    expected = fetched(ready(made).test_dataloader())[0]
    decoded.clear()
    for _ in range(2):
        data = ready(made, cache=tmp_path / "cache")
        for _ in range(2):
            assert torch.equal(fetched(data.test_dataloader())[0], expected)
        assert torch.equal(data.test_data.__getitems__([4, 2, 4])[0], expected[[4, 2, 4]])
        fetched(data.val_dataloader())
    assert sorted(decoded) == sorted(set(decoded))
    assert len(decoded) == 9 + 6 + 1  # and the example
    decoded.clear()
    fetched(data.train_dataloader())
    assert len(decoded) == 18, "random crops are of the whole pictures"


CHANGES = [
    {"size": 40},
    {"crop_pct": 0.5},
    {"interpolation": "bilinear"},
    {"preprocessing": "vit_base_patch16_siglip_224"},
]


@pytest.mark.parametrize("change", [*CHANGES, "a picture more"])
def test_other_pictures_have_another_cache(root, tmp_path, change):
    first = ready(root, cache=tmp_path / "cache")
    if change == "a picture more":
        new = root / "val" / IDS[0] / f"{IDS[0]}_00.JPEG"
        shutil.copy(root / "val" / IDS[1] / f"{IDS[1]}_0.JPEG", new)
        change = {}
    fetched(first.test_dataloader())
    expected = fetched(ready(root, **change).test_dataloader())[0]
    assert torch.equal(fetched(ready(root, cache=tmp_path / "cache", **change).test_dataloader())[0], expected)


def test_mean_and_std_share_a_cache(made, tmp_path):
    for model in ("vit_base_patch32_224", "vit_base_patch32_clip_224.openai"):
        ready(made, cache=tmp_path, preprocessing=model)
    assert len(list(tmp_path.iterdir())) == 2, "one of train/ and one of val/"


SHAPE = (3, 5, 5)


@pytest.fixture
def cache(tmp_path):
    return DecodedCache(tmp_path / "new" / "a.pixels", SHAPE)


def bytes_of(cache):
    return np.memmap(cache.path, np.uint8, "r+")


@pytest.mark.parametrize("damage", ["none", "cut short", "one byte", "half written", "zeros"])
def test_a_damaged_record_is_as_good_as_none(cache, damage):
    pictures = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    cache.write([7, 2, 0], pictures, [0, 1])
    start = 7 * cache.record
    if damage == "cut short":
        os.truncate(cache.path, start + cache.bytes + 2)
    elif damage == "one byte":
        bytes_of(cache)[start + 40] ^= 1
    elif damage == "half written":
        bytes_of(cache)[start : start + 30] = 0
    elif damage == "zeros":
        bytes_of(cache)[start : start + cache.record] = 0
    found = torch.zeros(3, *SHAPE, dtype=torch.uint8)
    missing = cache.read([2, 7, 0], found)
    assert missing == ([2] if damage == "none" else [1, 2]), "the third was never written"
    assert torch.equal(found[0], pictures[1])
    cache.write([2, 7, 0], pictures[[1, 0, 2]], missing)
    assert cache.read([7, 2, 0], found) == []
    assert torch.equal(found, pictures)


def test_black_pictures_are_kept_too(cache):
    black = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    assert cache.read([0], black.clone()) == [0], "a hole in the file reads as zeros, too"
    cache.write([0], black, [0])
    assert cache.read([0], torch.ones_like(black)) == []


def test_a_cache_takes_the_room_of_what_is_in_it(cache):
    cache.write([100_000], torch.zeros(1, *SHAPE, dtype=torch.uint8), [0])
    assert cache.path.stat().st_size > 100_000 * 80
    assert cache.path.stat().st_blocks * 512 < 100_000


def test_a_full_disk_costs_time_alone(made, tmp_path, monkeypatch):
    expected = fetched(ready(made).test_dataloader())[0]
    data = ready(made, cache=tmp_path, eval_batch_size=4)
    (val,) = tmp_path.glob("imagenet-val-*")
    val.unlink()
    val.symlink_to("/dev/full")
    with pytest.warns(RuntimeWarning, match=r"cache .*pixels cannot be written \(.+\); more") as warned:
        assert torch.equal(fetched(data.test_dataloader())[0], expected)
    assert len(warned) == 1


def test_a_cache_may_be_deleted_at_any_time(made, tmp_path):
    expected = fetched(ready(made).test_dataloader())[0]
    data = ready(made, cache=tmp_path / "cache", eval_batch_size=4)
    shutil.rmtree(tmp_path / "cache")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert torch.equal(fetched(data.test_dataloader())[0], expected)


# --- mistakes are named in one line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(root, workers):
    path = root / "val" / IDS[1] / f"{IDS[1]}_1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    line = rf"^cannot read picture {re.escape(str(path))} \(.+\); replace or delete it$"
    with pytest.raises(UserError, match=line) as caught:
        fetched(ready(root, workers=workers).test_dataloader())
    assert "\n" not in str(caught.value)
    path.unlink()
    assert len(ready(root).test_data) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "data set 'imagenet' needs root, the folder that holds train/<class>/"),
        ({"root": "/nowhere"}, r"no folder /nowhere/val or /nowhere/test; put pictures in val/<class>/"),
        ({"size": 0}, "size 0 must be at least 1 pixel"),
        ({"size": "big"}, "size must be a number, got 'big'"),
        ({"crop_pct": 1.1}, "crop_pct 1.1 must be in 0 < crop_pct <= 1"),
        ({"crop_pct": 0}, "crop_pct 0 must be in 0 < crop_pct <= 1"),
        ({"interpolation": "cubic"}, r"unknown interpolation 'cubic' \(did you mean 'bicubic'\?\); choose from: b"),
        ({"preprocessing": "vit_base_patch32_225"}, r"'vit_base_patch32_225' is no timm model .*vit_base_patch32_224"),
        ({"preprocessing": "vit_base_patch32_224.mine"}, r"is no timm model .*; near it: vit_base_patch32_224"),
        ({"preprocessing": "##"}, r"'##' is no timm model .*; timm.list_models\(\) lists them"),
        ({"scale": [0.5, 0.2]}, r"scale \[0.5, 0.2\] must be two shares of a picture's area"),
        ({"scale": 0.5}, "scale 0.5 must be two shares"),
        ({"scale": None}, "scale None must be two shares"),
        ({"cache": "/proc/none"}, r"cache /proc/none/imagenet-val-32-.*pixels cannot be written \(.*data.cache="),
        ({"crop": 1}, "data set 'imagenet' has no option 'crop'; it takes: root, preprocessing, size, crop_pct"),
        ({"mean": [0.5], "std": [0.5]}, r"mean \[0.5\] must have one value for each of 3 channels"),
        ({"workers": -1}, "workers -1 must be at least 0"),
    ],
)
def test_errors_name_the_value_and_the_fix(made, options, message):
    with pytest.raises(UserError, match=message) as caught:
        ready(**{"root": made, **options})
    assert "\n" not in str(caught.value)


def test_train_and_val_must_have_the_same_classes(root):
    shutil.rmtree(root / "train" / IDS[2])
    with pytest.raises(UserError, match=rf"imagenet/val and .*imagenet/train must have .* one of them has: {IDS[2]}"):
        ready(root)


def test_the_root_names_the_pictures():
    assert DATASETS["imagenet"].root_names_data
