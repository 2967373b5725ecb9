"""Which prompt goes with which image: one each, one for all, or several chunks of labels for one image."""

from torch import Tensor

from .outputs_gdino import GDinoImageFeatures, GDinoTextFeatures


def pair(
    images: GDinoImageFeatures, prompts: GDinoTextFeatures, image_indices: Tensor | None
) -> tuple[GDinoImageFeatures, GDinoTextFeatures]:
    """Bring images and prompts to the same number of rows."""
    num_images, num_prompts = images.feature_maps[0].shape[0], prompts.last_hidden_state.shape[0]
    if image_indices is not None:
        if image_indices.shape != (num_prompts,):
            raise ValueError(
                f"image_indices is {tuple(image_indices.shape)} for {num_prompts} prompts; give one image per prompt."
            )
        picked = GDinoImageFeatures(
            feature_maps=tuple(x.index_select(0, image_indices) for x in images.feature_maps),
            masks=images.masks and tuple(x.index_select(0, image_indices) for x in images.masks),
            padding_seen=images.padding_seen,
        )
        return picked, prompts
    if num_images == num_prompts:
        return images, prompts
    if num_prompts == 1:
        repeated = {name: x.expand(num_images, *x.shape[1:]) for name, x in prompts.items()}
        return images, GDinoTextFeatures(**repeated)
    if num_images == 1:
        repeated = GDinoImageFeatures(
            feature_maps=tuple(x.expand(num_prompts, -1, -1, -1) for x in images.feature_maps),
            masks=images.masks and tuple(x.expand(num_prompts, -1, -1) for x in images.masks),
            padding_seen=images.padding_seen,
        )
        return repeated, prompts
    raise ValueError(
        f"There are {num_images} images and {num_prompts} prompts; give one prompt per image, one for all, or "
        "image_indices."
    )


def check_trainable(
    labels: list[dict[str, Tensor]],
    images: GDinoImageFeatures,
    prompts: GDinoTextFeatures,
    image_indices: Tensor | None,
) -> None:
    if image_indices is not None or prompts.last_hidden_state.shape[0] > images.feature_maps[0].shape[0]:
        raise ValueError(
            "labels go with one prompt per image, but an image has several prompts; keep an image's labels within "
            "max_text_len tokens in training, for instance by sampling fewer negatives."
        )
