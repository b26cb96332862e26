"""Facts about the standard prompt-learning benchmarks: 11 datasets of CoOp's protocol and 4 ImageNet variants.

Counts and templates are those of CoOp's code (KaiyangZhou/CoOp, `datasets/` and `trainers/`); the numbers of images of
the ImageNet variants are those their authors state. `hub_id` names a copy on the Hugging Face Hub that its uploader
offers; whether its splits and class order are CoOp's has not been checked here, so compare the counts after loading.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of the protocol.

    Args:
        name: Name in papers.
        num_classes: Number of classes.
        num_train: Training images; None for test-only sets.
        num_test: Test images.
        template: CoOp's prompt.
        hub_id: Dataset on the Hub.
        split_file: CoOp's split file; None where it has none.
        note: Remark for users.
    """

    name: str
    num_classes: int
    num_train: int | None
    num_test: int
    template: str
    hub_id: str
    split_file: str | None = None
    note: str = ""

    @property
    def num_base(self) -> int:
        """Number of base classes: the first half, rounded up."""
        return (self.num_classes + 1) // 2


_PHOTO = "a photo of a {}."
_GATED = "Gated on the Hub: accept its terms first."
_FOLDERS = "No split file: CoOp reads the official lists, whose order decides which images are drawn as shots."

SPECS: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec(
        "ImageNet", 1000, 1_281_167, 50_000, _PHOTO, "ILSVRC/imagenet-1k", note=f"Tests on `validation`. {_GATED}"
    ),
    "caltech101": DatasetSpec(
        "Caltech101", 100, 4_128, 2_465, _PHOTO, "koorye/Caltech-101", "split_zhou_Caltech101.json"
    ),
    "oxford_pets": DatasetSpec(
        "OxfordPets",
        37,
        2_944,
        3_669,
        "a photo of a {}, a type of pet.",
        "koorye/Oxford-Pets",
        "split_zhou_OxfordPets.json",
    ),
    "stanford_cars": DatasetSpec(
        "StanfordCars", 196, 6_509, 8_041, _PHOTO, "koorye/Stanford-Cars", "split_zhou_StanfordCars.json"
    ),
    "oxford_flowers": DatasetSpec(
        "OxfordFlowers",
        102,
        4_093,
        2_463,
        "a photo of a {}, a type of flower.",
        "koorye/Oxford-Flowers",
        "split_zhou_OxfordFlowers.json",
    ),
    "food101": DatasetSpec(
        "Food101",
        101,
        50_500,
        30_300,
        "a photo of {}, a type of food.",
        "koorye/Food-101",
        "split_zhou_Food101.json",
    ),
    "fgvc_aircraft": DatasetSpec(
        "FGVCAircraft",
        100,
        3_334,
        3_333,
        "a photo of a {}, a type of aircraft.",
        "koorye/FGVC-Aircraft",
        note=_FOLDERS,
    ),
    "sun397": DatasetSpec("SUN397", 397, 15_880, 19_850, _PHOTO, "koorye/SUN397", "split_zhou_SUN397.json"),
    "dtd": DatasetSpec(
        "DescribableTextures",
        47,
        2_820,
        1_692,
        "{} texture.",
        "koorye/Describable-Textures-Dataset",
        "split_zhou_DescribableTextures.json",
    ),
    "eurosat": DatasetSpec(
        "EuroSAT",
        10,
        13_500,
        8_100,
        "a centered satellite photo of {}.",
        "koorye/EuroSAT",
        "split_zhou_EuroSAT.json",
    ),
    "ucf101": DatasetSpec(
        "UCF101",
        101,
        7_639,
        3_783,
        "a photo of a person doing {}.",
        "koorye/UCF101",
        "split_zhou_UCF101.json",
        note="Middle frames of the videos.",
    ),
    "imagenetv2": DatasetSpec(
        "ImageNetV2",
        1000,
        None,
        10_000,
        _PHOTO,
        "koorye/ImageNet-V2",
        note="Class folders are numbers: pass ImageNet's names as `class_names`.",
    ),
    "imagenet_sketch": DatasetSpec("ImageNet-Sketch", 1000, None, 50_889, _PHOTO, "koorye/ImageNet-Sketch"),
    "imagenet_a": DatasetSpec(
        "ImageNet-A", 200, None, 7_500, _PHOTO, "koorye/ImageNet-Adversarial", note="Scored over its 200 classes only."
    ),
    "imagenet_r": DatasetSpec(
        "ImageNet-R", 200, None, 30_000, _PHOTO, "koorye/ImageNet-Rendition", note="Scored over its 200 classes only."
    ),
}

#: Templates of the Skip Tuning experiments (official code of arXiv 2412.11509); the other sets use
#: CoOp's.
SKIP_TUNING_TEMPLATES: dict[str, str] = {
    "caltech101": "itap of a {}.",
    "dtd": "itap of a {}.",
    "oxford_flowers": "a close-up photo of a {}.",
    "fgvc_aircraft": "a bright photo of a {}, a type of aircraft.",
    "food101": "a photo of the nice {}.",
    "oxford_pets": "a bad photo of a {}, a type of pet.",
    "stanford_cars": "a photo of the {}, a type of car.",
    "ucf101": "a photo of a {}, a type of sport.",
    "eurosat": "a centered satellite photo of {}.",
    "imagenet_a": "a bad photo of a {}.",
    "imagenet_r": "a rendition of a {}.",
    "imagenet_sketch": "a sketch of a {}.",
}
