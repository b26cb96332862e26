"""Images without labels, for methods that learn from a teacher."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset as HFDataset

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.images import IMAGE_EXTENSIONS
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.errors import DataError


def load_unlabelled_images(
    source: str | Path | HFDataset,
    class_names: Sequence[str],
    *,
    image_column: str = "image",
    transform: ImageTransform | None = None,
    seed: int = 0,
) -> ImageClassificationDataset:
    """A dataset whose labels are all -1. Training on it reports no accuracy, and it cannot be evaluated on.

    Args:
        source: A folder, searched with all its subfolders (whose names mean nothing), or a `datasets.Dataset`, whose
            other columns are not read.
        class_names: Classes that the model is to tell apart, in the order of its prompts.
        image_column: Column of the image.
        transform: Makes the pixels.
        seed: Seed of a random transform.

    Raises:
        DataError: If the folder does not exist or holds no images.
    """
    if isinstance(source, HFDataset):
        rows: HFDataset | list[dict[str, str]] = source
    else:
        rows = [{image_column: str(file)} for file in _images_below(Path(source))]
    return ImageClassificationDataset(
        rows, class_names, transform=transform, image_column=image_column, label_column=None, seed=seed
    )


def _images_below(root: Path) -> list[Path]:
    """Image files in sorted order; hidden ones are left out."""
    if not root.is_dir():
        raise DataError(f"There is no folder {str(root)!r}. Relative paths start from {str(Path.cwd())!r}.")
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise DataError(f"No images in {str(root)!r} or its subfolders.")
    return files
