"""Small texts for tests, and TextData over them."""

import random

from pipeline.data.text.module import TextData

WORDS = "the small cat sat on a mat und träumte von Fischen 魚 while rain fell softly outside its window".split()


def stories(count=40, seed=0):
    rng = random.Random(seed)
    return [f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for number in range(count)]


def ready(tmp_path, texts=None, **options):
    """TextData over stories that are parted by |."""
    if "root" not in options:
        options["root"] = tmp_path / "stories.txt"
        options["root"].write_text("|".join(stories() if texts is None else texts))
        options.setdefault("separator", "|")
    options = {"context": 16, "cache": tmp_path / "cache", "batch_size": 4, **options}
    data = TextData("text", **options)
    data.prepare_data()
    data.setup()
    return data
