"""Tokenizers give ids, bytes that add up to the text's, and the text back."""

import pickle
from functools import partial

import pytest
from texts import stories

from pipeline.data.text import tokenizers
from pipeline.data.text.tokenizers import END, Bytes, Fast, from_file, load_tokenizer, train_bpe
from pipeline.tables import UserError

TEXTS = [*stories(30), "  white space \n\t at both ends  ", "é", "🙂🙂", f"not {END} the end"]


def unigram(library):
    """A tokenizer that drops white space and has one id for all that it does not know."""
    backend = library.Tokenizer(library.models.WordLevel({"the": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return Fast(backend, 2)


@pytest.fixture(params=["bytes", "bpe", "words"])
def tokenizer(request):
    if request.param == "bytes":
        return Bytes()
    return train_bpe(stories(), 300) if request.param == "bpe" else unigram(pytest.importorskip("tokenizers"))


def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    for text, (ids, sizes) in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert sizes.sum() == len(text.encode())
        assert len(ids) == len(sizes)
        assert (sizes >= 0).all()
        assert (ids < tokenizer.vocabulary).all()
        assert tokenizer.end not in ids, "an end that a text spells out is plain text"


def test_decoding_gives_the_text_back():
    for tokenizer in (Bytes(), train_bpe(stories(), 300)):
        assert [tokenizer.decode(ids) for ids, _ in tokenizer.encode(TEXTS)] == TEXTS


def test_pickled_and_saved_tokenizers_are_the_same(tmp_path):
    trained = train_bpe(stories(), 300)
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    for again in (pickle.loads(pickle.dumps(trained)), load_tokenizer(str(tmp_path))):
        assert (again.identity, again.end, again.vocabulary) == (trained.identity, trained.end, 300)
        assert [ids.tolist() for ids, _ in again.encode(TEXTS)] == [ids.tolist() for ids, _ in trained.encode(TEXTS)]


def test_long_texts_are_tokenised_in_pieces(monkeypatch):
    text = "\n".join(stories())
    trained = train_bpe(stories(), 300)
    monkeypatch.setattr(tokenizers, "pieces", partial(tokenizers.pieces, size=100))
    (ids, sizes), *_ = trained.encode([text])
    assert trained.decode(ids) == text
    assert sizes.sum() == len(text.encode())


def test_training_a_bpe_twice_gives_the_same():
    assert (
        train_bpe(stories(), 400).identity == train_bpe(stories(), 400).identity != train_bpe(stories(1), 300).identity
    )


def test_a_folder_of_transformers_says_its_end(tmp_path):
    transformers = pytest.importorskip("transformers")
    trained = train_bpe(stories(), 300)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=trained.backend, bos_token="the", eos_token=None)
    wrapped.save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert found.end == wrapped.bos_token_id != trained.end
    assert found.encode(["a cat"])[0][0].tolist() == trained.encode(["a cat"])[0][0].tolist()


def test_errors_name_the_tokenizer_and_the_fix(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no tokenizer '.*'.*; put its tokenizer.json there"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is no tokenizer of Hugging Face"):
        from_file(tmp_path / "tokenizer.json")
    transformers = pytest.importorskip("transformers")

    def offline(name, **_):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(UserError, match=r"no tokenizer 'some/body' \(We couldn't connect\); give bytes, bpe, a folder"):
        load_tokenizer("some/body")
