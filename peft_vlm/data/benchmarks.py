"""The standard prompt-learning benchmarks in the folders that CoOp's code reads: 11 datasets, 4 ImageNet variants.

Folder names, images, their order, class names and templates are those of CoOp's code (KaiyangZhou/CoOp:
`DATASETS.md`, `datasets/`, `trainers/`), so that a tree that was set up for it works here, and the shots of a seed are
its shots. The numbers of images of the ImageNet variants are those their authors state. `hub_id` names a copy on the
Hugging Face Hub that its uploader offers; whether its splits and class order are CoOp's has not been checked here.

Deviations: in class folders (ImageNet and its variants) images come sorted by name; CoOp takes them in the order in
which the file system lists them, which no other computer repeats. Files that are no images are left out and counted.
CoOp's list of ImageNet calls two classes 'sunglasses' and two 'missile'; one of each is 'sunglass' and 'projectile'
here, as ImageNet names them.
Cached draws (`split_fewshot/*.pkl`, `preprocessed.pkl`) run code when loaded and are never opened; the draw is made
again.
"""

import logging
import os
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download

from peft_vlm.data.class_names import read_class_names
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.folders import check_files_exist
from peft_vlm.data.splits import base_and_new_classes, few_shot_indices, path_inside, read_zhou_split
from peft_vlm.errors import ClassNameError, DataError, check_choice, explained, shown
from peft_vlm.files import read_text
from peft_vlm.models.repository import PATIENCE, is_local
from peft_vlm.serving.images import is_image_file, say_left_out
from peft_vlm.text.prompts import readable

logger = logging.getLogger(__name__)

_PHOTO = "a photo of a {}."
_NAMES = {"classnames.txt": "lines 'n01440764 tench', from the link in CoOp's DATASETS.md"}
#: For classes that have another's name in CLIP's list: "sunglasses" and "missile".
_OWN_WORDS = {"n04355933": "sunglass", "n04008634": "projectile"}
_COPY = {"classnames.txt": "a copy of 'imagenet/classnames.txt'"}


@dataclass(frozen=True)
class Benchmark:
    """One dataset of the protocol.

    Args:
        name: Name in papers.
        folder: Its folder below the root of all datasets.
        images: Folder below `folder` that image paths start from; empty for `folder` itself.
        num_classes: Number of classes.
        num_train: Training images; None for test-only sets.
        num_test: Test images.
        template: CoOp's prompt.
        hub_id: Dataset on the Hub.
        needs: Files and folders in `folder` beside the split file, and what to put there.
        split_file: CoOp's split file; None where it has none.
        note: Remark for users.
    """

    name: str
    folder: str
    images: str
    num_classes: int
    num_train: int | None
    num_test: int
    template: str
    hub_id: str
    needs: Mapping[str, str] = field(default_factory=dict)
    split_file: str | None = None
    note: str = ""

    @property
    def num_base(self) -> int:
        """Number of base classes: the first half, rounded up."""
        return (self.num_classes + 1) // 2

    @property
    def splits(self) -> tuple[str, ...]:
        """Parts of its own."""
        if self.num_train is None:
            return ("test",)
        return ("train", "test") if self.folder == "imagenet" else ("train", "val", "test")

    @property
    def parts(self) -> dict[str, str]:
        """Files and folders that it needs in `folder`, and what to put there."""
        split = {} if self.split_file is None else {self.split_file: "from the link in CoOp's DATASETS.md"}
        return {**self.needs, **split}


BENCHMARKS: dict[str, Benchmark] = {
    "imagenet": Benchmark(
        "ImageNet",
        "imagenet",
        "images",
        1000,
        1_281_167,
        50_000,
        _PHOTO,
        "ILSVRC/imagenet-1k",
        {
            "images/train": "the training images, a folder per class such as 'n01440764'",
            "images/val": "the validation images, also a folder per class; they are the test images",
            **_NAMES,
        },
        note="Tests on `val`. Gated on the Hub: accept its terms first.",
    ),
    "caltech101": Benchmark(
        "Caltech101",
        "caltech-101",
        "101_ObjectCategories",
        100,
        4_128,
        2_465,
        _PHOTO,
        "koorye/Caltech-101",
        {"101_ObjectCategories": "what 101_ObjectCategories.tar.gz unpacks to"},
        "split_zhou_Caltech101.json",
    ),
    "oxford_pets": Benchmark(
        "OxfordPets",
        "oxford_pets",
        "images",
        37,
        2_944,
        3_669,
        "a photo of a {}, a type of pet.",
        "koorye/Oxford-Pets",
        {"images": "what images.tar.gz unpacks to"},
        "split_zhou_OxfordPets.json",
    ),
    "stanford_cars": Benchmark(
        "StanfordCars",
        "stanford_cars",
        "",
        196,
        6_509,
        8_041,
        _PHOTO,
        "koorye/Stanford-Cars",
        {"cars_train": "what cars_train.tgz unpacks to", "cars_test": "what cars_test.tgz unpacks to"},
        "split_zhou_StanfordCars.json",
    ),
    "oxford_flowers": Benchmark(
        "OxfordFlowers",
        "oxford_flowers",
        "jpg",
        102,
        4_093,
        2_463,
        "a photo of a {}, a type of flower.",
        "koorye/Oxford-Flowers",
        {"jpg": "what 102flowers.tgz unpacks to"},
        "split_zhou_OxfordFlowers.json",
    ),
    "food101": Benchmark(
        "Food101",
        "food-101",
        "images",
        101,
        50_500,
        30_300,
        "a photo of {}, a type of food.",
        "koorye/Food-101",
        {"images": "the folder of food-101.tar.gz"},
        "split_zhou_Food101.json",
    ),
    "fgvc_aircraft": Benchmark(
        "FGVCAircraft",
        "fgvc_aircraft",
        "images",
        100,
        3_334,
        3_333,
        "a photo of a {}, a type of aircraft.",
        "koorye/FGVC-Aircraft",
        {
            "images": "the folder 'data/images' of fgvc-aircraft-2013b.tar.gz",
            "variants.txt": "from the folder 'data' of fgvc-aircraft-2013b.tar.gz",
            **{f"images_variant_{part}.txt": "from the same folder" for part in ("train", "val", "test")},
        },
        note="No split file: the official lists decide which images are drawn as shots.",
    ),
    "sun397": Benchmark(
        "SUN397",
        "sun397",
        "SUN397",
        397,
        15_880,
        19_850,
        _PHOTO,
        "koorye/SUN397",
        {"SUN397": "what SUN397.tar.gz unpacks to"},
        "split_zhou_SUN397.json",
    ),
    "dtd": Benchmark(
        "DescribableTextures",
        "dtd",
        "images",
        47,
        2_820,
        1_692,
        "{} texture.",
        "koorye/Describable-Textures-Dataset",
        {"images": "the folder of dtd-r1.0.1.tar.gz"},
        "split_zhou_DescribableTextures.json",
    ),
    "eurosat": Benchmark(
        "EuroSAT",
        "eurosat",
        "2750",
        10,
        13_500,
        8_100,
        "a centered satellite photo of {}.",
        "koorye/EuroSAT",
        {"2750": "what EuroSAT.zip unpacks to"},
        "split_zhou_EuroSAT.json",
    ),
    "ucf101": Benchmark(
        "UCF101",
        "ucf101",
        "UCF-101-midframes",
        101,
        7_639,
        3_783,
        "a photo of a person doing {}.",
        "koorye/UCF101",
        {"UCF-101-midframes": "what UCF-101-midframes.zip unpacks to, from the link in CoOp's DATASETS.md"},
        "split_zhou_UCF101.json",
        note="Middle frames of the videos.",
    ),
    "imagenetv2": Benchmark(
        "ImageNetV2",
        "imagenetv2",
        "imagenetv2-matched-frequency-format-val",
        1000,
        None,
        10_000,
        _PHOTO,
        "koorye/ImageNet-V2",
        {
            "imagenetv2-matched-frequency-format-val": "what imagenetv2-matched-frequency.tar.gz unpacks to, "
            "folders '0' to '999'",
            **_COPY,
        },
        note="Class folders are numbers: lines of classnames.txt, from 0.",
    ),
    "imagenet_sketch": Benchmark(
        "ImageNet-Sketch",
        "imagenet-sketch",
        "images",
        1000,
        None,
        50_889,
        _PHOTO,
        "koorye/ImageNet-Sketch",
        {"images": "the 1,000 class folders such as 'n01440764'", **_COPY},
    ),
    "imagenet_a": Benchmark(
        "ImageNet-A",
        "imagenet-adversarial",
        "imagenet-a",
        200,
        None,
        7_500,
        _PHOTO,
        "koorye/ImageNet-Adversarial",
        {"imagenet-a": "what imagenet-a.tar unpacks to, 200 class folders such as 'n01498041'", **_COPY},
        note="Scored over its 200 classes only.",
    ),
    "imagenet_r": Benchmark(
        "ImageNet-R",
        "imagenet-rendition",
        "imagenet-r",
        200,
        None,
        30_000,
        _PHOTO,
        "koorye/ImageNet-Rendition",
        {"imagenet-r": "what imagenet-r.tar unpacks to, 200 class folders such as 'n01443537'", **_COPY},
        note="Scored over its 200 classes only.",
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


def template_for(dataset: str, data_root: str | Path | None) -> str:
    """CoOp's prompt of a benchmark, `"a photo of a {}."` for other datasets.

    Args:
        dataset: What images are loaded from.
        data_root: The folder of all benchmarks; None: the dataset is none.
    """
    return _PHOTO if data_root is None or dataset not in BENCHMARKS else BENCHMARKS[dataset].template


def load_benchmark(
    name: str,
    data_root: str | Path,
    *,
    split: str = "train",
    shots: int | None = None,
    seed: int = 1,
    classes: str = "all",
) -> ImageClassificationDataset:
    """Images of a benchmark in CoOp's order, without a transform; labels index the class names, also in CoOp's order.

    Shots are drawn over all classes, training images first and then `min(shots, 4)` validation images from the same
    generator; the halves are parted afterwards, and each half is relabelled from 0.

    Args:
        name: One of `BENCHMARKS`.
        data_root: The folder of all datasets (CoOp's `$DATA`), which holds `Benchmark.folder`; or the id of a dataset
            on the Hub with the same folders, of which the one is downloaded into the cache.
        split: Part to read. ImageNet has no `val` of its own (CoOp takes the test images for it), the variants of
            ImageNet have `test` only.
        shots: Training images per class, at least 1; None for all. A test part is never cut.
        seed: Seed of the draw.
        classes: All classes, the first half (rounded up), or the rest.

    Raises:
        ClassNameError: If two classes have one name.
        DataError: If the tree is not CoOp's; the message says what to put where.
        HubError: If a dataset on the Hub cannot be read.
        ValueError: If a name, split, number of shots or half does not exist.
    """
    check_choice("name", name, list(BENCHMARKS))
    check_choice("split", split, ("train", "val", "test"))
    check_choice("classes", classes, ("all", "base", "new"))
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise ValueError(f"Expected `shots` of at least 1, or None for all images, got {shots!r}.")
    benchmark = BENCHMARKS[name]
    root = _checked_folder(name, benchmark, data_root, split)
    try:
        dataset = _drawn(benchmark, root, split, shots, seed)
        if classes != "all":
            dataset = dataset.restrict(base_and_new_classes(len(dataset.class_names))[classes == "new"])
    except (DataError, ClassNameError) as error:
        raise type(error)(f"The benchmark {name!r} in {str(root)!r} cannot be used: {error}") from error
    return dataset


def _drawn(benchmark: Benchmark, root: Path, split: str, shots: int | None, seed: int) -> ImageClassificationDataset:
    """One part, cut to the shots of a seed."""
    if split not in benchmark.splits:
        advice = "" if benchmark.num_train is None else " No checkpoint can be chosen: keep the last one."
        raise DataError(f"It has the parts {list(benchmark.splits)!r}, got `split`={split!r}.{advice}")
    images = _read(benchmark, root, split)
    if shots is None or split == "test":
        return images
    generator = random.Random(seed)
    train = images if split == "train" else _read(benchmark, root, "train")
    names = images.class_names
    chosen = few_shot_indices(train.labels, shots=shots, seed=generator, class_names=names)
    if split == "val":
        chosen = few_shot_indices(images.labels, shots=min(shots, 4), seed=generator, class_names=names)
    return images.select(chosen)


def _checked_folder(name: str, benchmark: Benchmark, data_root: str | Path, split: str) -> Path:
    """The folder of a benchmark, if all that it needs is there; of a dataset on the Hub a copy in the cache."""
    data_root = _downloaded(data_root, benchmark.folder) if _is_on_hub(data_root) else Path(data_root)
    root = data_root.expanduser().absolute() / benchmark.folder
    unused = "images/train" if split == "test" else "images/val"  # of ImageNet, for a test without its 138 GB
    needs = {part: what for part, what in benchmark.parts.items() if part != unused}
    missing = [f"{part!r} ({what})" for part, what in needs.items() if not _is_there(root / part)]
    if not missing:
        return root
    found = root if root.is_dir() else data_root
    there = sorted(os.listdir(found)) if found.is_dir() else []
    holds = f"which holds {shown(there)}" if found.is_dir() else "which is no folder"
    alike = [name for name in there if found == data_root and _letters(name) == _letters(benchmark.folder)]
    if alike:
        raise DataError(f"Expected the benchmark {name!r} in {str(root)!r}, got {alike[0]!r} beside it. Rename it.")
    raise DataError(
        f"The benchmark {name!r} lacks {', '.join(missing)} in {str(root)!r}; looked in {str(found)!r}, {holds}. Put "
        f"them there, or pass as `data_root` the folder that holds {benchmark.folder!r}."
    )


def _letters(name: str) -> str:
    """A name without what people spell in different ways."""
    return "".join(filter(str.isalnum, name)).lower()


def _is_on_hub(data_root: str | Path) -> bool:
    return isinstance(data_root, str) and "/" in data_root and not is_local(data_root)


def _downloaded(repo: str | Path, folder: str) -> Path:
    """One folder of a dataset on the Hub that holds CoOp's folders; never a pickle."""
    with explained(f"The data root {str(repo)!r} is no folder here, and on the Hub"):
        kept = snapshot_download(
            str(repo),
            repo_type="dataset",
            allow_patterns=f"{folder}/*",
            ignore_patterns="*.pkl",
            etag_timeout=PATIENCE,
        )
    return Path(kept)


def _is_there(path: Path) -> bool:
    return path.is_file() if path.suffix else path.is_dir()


def _read(benchmark: Benchmark, root: Path, split: str) -> ImageClassificationDataset:
    """All images of one part."""
    if benchmark.split_file is not None:
        images = read_zhou_split(root / benchmark.split_file, root=root / benchmark.images, split=split)
    elif benchmark.folder == "fgvc_aircraft":
        images = _read_aircraft(root, split)
    else:
        images = _read_class_folders(benchmark, root, split)
    if len(images.class_names) != benchmark.num_classes:
        logger.warning(
            "%s has %d classes here, %d in the papers.", benchmark.name, len(images.class_names), benchmark.num_classes
        )
    return images


def _read_aircraft(root: Path, split: str) -> ImageClassificationDataset:
    """The official lists: `variants.txt` gives the classes, and a line of a part is an image and its class."""
    names = [line.strip() for line in read_text(root / "variants.txt").split("\n") if line.strip()]
    places = {name: place for place, name in enumerate(names)}
    rows = []
    path = root / f"images_variant_{split}.txt"
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        image, _, name = line.strip().partition(" ")
        if not image:
            continue
        if name not in places:
            raise DataError(
                f"Expected an image and one of the {len(names)} classes of 'variants.txt' in line {number} of "
                f"{path.name!r}, got {shown(line)}."
            )
        rows.append({"image": path_inside(root / "images", f"{image}.jpg"), "label": places[name]})
    check_files_exist([row["image"] for row in rows])
    return ImageClassificationDataset(rows, names)


def _read_class_folders(benchmark: Benchmark, root: Path, split: str) -> ImageClassificationDataset:
    """ImageNet and its variants: a folder per class, named by `classnames.txt`."""
    known = read_class_names(root / "classnames.txt")
    if not isinstance(known, dict):
        raise DataError("Expected lines 'n01440764 tench' in 'classnames.txt', got others.")
    known = _distinct(known)
    folder = root / benchmark.images
    if benchmark.num_train is not None:
        folder /= "val" if split == "test" else split
    there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    wanted = [str(place) for place in range(len(known))] if benchmark.folder == "imagenetv2" else sorted(known)
    if not there:
        raise DataError(
            f"Expected class folders in {str(folder)!r}, got {shown(sorted(os.listdir(folder)))}. Sort images that "
            "lie there into a folder per class, such as 'n01440764'."
        )
    unknown = sorted(set(there) - set(wanted))
    lacking = [name for name in wanted if name not in set(there)]
    if unknown or (lacking and benchmark.num_classes == 1000):
        raise DataError(
            f"Expected in {str(folder)!r} a folder for each of the {len(wanted)} lines of 'classnames.txt', got "
            f"{len(there)}: {shown(lacking[:5])} of {len(lacking)} are missing, {shown(unknown[:5])} of "
            f"{len(unknown)} are no class."
        )
    folders = [name for name in wanted if name in set(there)]
    rows, left_out = [], Counter()
    for label, name in enumerate(folders):
        files = _images_in(folder / name, left_out)
        if not files:
            raise DataError(f"The class folder {str(folder / name)!r} holds no image. Unpack its archive again.")
        rows += [{"image": file, "label": label} for file in files]
    say_left_out(folder, left_out)
    names = list(known.values()) if benchmark.folder == "imagenetv2" else [known[name] for name in folders]
    return ImageClassificationDataset(rows, names)


def _images_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Image files that lie directly in a class folder, sorted by name; others are counted."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    files = [str(path) for path in (folder / name for name in names) if is_image_file(path)]
    if len(files) != len(names):
        left_out["entries of class folders that are no images"] += len(names) - len(files)
    return files


def _distinct(known: Mapping[str, str]) -> dict[str, str]:
    """Class names by WordNet id, all different.

    CLIP's list, which CoOp's is, has two names twice, so that its code can never tell these classes apart, and nothing
    here takes it. One of each gets the word of ImageNet's own list, which matters for 200 of 50,000 test images. Other
    names that come twice get their ids.
    """
    counts = Counter(readable(name).lower() for name in known.values())
    names: dict[str, str] = {}
    taken: set[str] = set()
    for wordnet_id, name in known.items():
        if counts[readable(name).lower()] > 1:
            name = _OWN_WORDS.get(wordnet_id, name)
        if readable(name).lower() in taken:
            name = f"{name} ({wordnet_id})"
        taken.add(readable(name).lower())
        names[wordnet_id] = name
    return names
