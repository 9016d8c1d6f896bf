import pytest
from tiny_models import write_huggingface_vit


@pytest.fixture(scope="session")
def huggingface_vit(tmp_path_factory):
    """Folder of a ViT for 32x32 colour pictures of 5 classes."""
    return write_huggingface_vit(tmp_path_factory.mktemp("huggingface") / "vit")
