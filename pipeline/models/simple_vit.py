"""SimpleViT (arXiv:2205.01580) of vit-pytorch: sine positions, mean pooling."""

from torch import nn

from pipeline.tables import UserError, pick


def simple_vit(
    classes: int,
    channels: int,
    size: int = 32,
    patch_size: int = 4,
    dim: int = 512,
    depth: int = 6,
    heads: int = 16,
    mlp_dim: int = 1024,
    variant: str = "study",
) -> nn.Module:
    """SimpleViT; the defaults are the folding study's small one: 18.93M parameters.

    size: side of the pictures in pixels, a multiple of patch_size; dim: channels of the stream, a multiple of 4;
    heads: of 64 channels each; mlp_dim: hidden channels of a block's MLP; variant: see VARIANTS
    """
    from vit_pytorch import SimpleViT  # slow to import, and most runs do not need it

    for name, value, unit in (("size", size, patch_size), ("dim", dim, 4)):
        if unit < 1 or value % unit:
            raise UserError(f"model 'simple_vit': {name} {value} must be a multiple of {unit}")
    vit = SimpleViT(
        image_size=size,
        patch_size=patch_size,
        num_classes=classes,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        channels=channels,
    )
    return pick("variant of simple_vit", VARIANTS, variant)(vit)


def of_the_study(vit: nn.Module) -> nn.Module:
    """Change the ViT to that of vit-pytorch 0.40, which trained the public files: no norms around the patch embedding
    (1,120 parameters of the study's), and the last norm after the pooling instead of before it."""
    to_patches, _, embedding, _ = vit.to_patch_embedding
    vit.to_patch_embedding = nn.Sequential(to_patches, embedding)
    vit.linear_head = nn.Sequential(vit.transformer.norm, vit.linear_head)
    vit.transformer.norm = nn.Identity()
    return vit


VARIANTS = {"study": of_the_study, "vit_pytorch": lambda vit: vit}  # vit_pytorch: as the library has it today
