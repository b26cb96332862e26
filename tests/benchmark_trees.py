"""Miniature trees of the 15 layouts that CoOp's code reads, written out by hand as its download instructions say."""

import json
from pathlib import Path
from zlib import crc32

from tests.tiny import noise_image

#: (image path, label, class name), as in a split file.
Entry = tuple[str, int, str]

#: Split file and the folder that its paths start from.
SPLIT_FILES = {
    "caltech101": ("caltech-101/split_zhou_Caltech101.json", "caltech-101/101_ObjectCategories"),
    "oxford_pets": ("oxford_pets/split_zhou_OxfordPets.json", "oxford_pets/images"),
    "stanford_cars": ("stanford_cars/split_zhou_StanfordCars.json", "stanford_cars"),
    "oxford_flowers": ("oxford_flowers/split_zhou_OxfordFlowers.json", "oxford_flowers/jpg"),
    "food101": ("food-101/split_zhou_Food101.json", "food-101/images"),
    "sun397": ("sun397/split_zhou_SUN397.json", "sun397/SUN397"),
    "dtd": ("dtd/split_zhou_DescribableTextures.json", "dtd/images"),
    "eurosat": ("eurosat/split_zhou_EuroSAT.json", "eurosat/2750"),
    "ucf101": ("ucf101/split_zhou_UCF101.json", "ucf101/UCF-101-midframes"),
}
#: Classes in label order, their image paths with a place for the number. Names are those of the published files: four
#: of Caltech's are renamed, EuroSAT's are words, SUN397's end with where it is, UCF101's come with underscores.
CLASSES = {
    "caltech101": {
        "face": "Faces/image_{:04}.jpg",
        "leopard": "Leopards/image_{:04}.jpg",
        "accordion": "accordion/image_{:04}.jpg",
    },
    "oxford_pets": {
        "abyssinian": "Abyssinian_{}.jpg",
        "american_bulldog": "american_bulldog_{}.jpg",
        "beagle": "beagle_{}.jpg",
    },
    "stanford_cars": {
        "2000 AM General Hummer SUV": "cars_train/{:05}.jpg",
        "2012 Acura RL Sedan": "cars_test/{:05}.jpg",
        "2012 Acura TL Sedan": "cars_train/1{:04}.jpg",
    },
    "oxford_flowers": {
        "pink primrose": "image_1{:04}.jpg",
        "hard-leaved pocket orchid": "image_2{:04}.jpg",
        "bird of paradise": "image_3{:04}.jpg",
    },
    "food101": {
        "apple_pie": "apple_pie/10{:05}.jpg",
        "baby_back_ribs": "baby_back_ribs/10{:05}.jpg",
        "waffles": "waffles/10{:05}.jpg",
    },
    "sun397": {
        "abbey": "a/abbey/sun_a{:03}.jpg",
        "indoor church": "c/church/indoor/sun_b{:03}.jpg",
        "outdoor church": "c/church/outdoor/sun_c{:03}.jpg",
    },
    "dtd": {
        "banded": "banded/banded_{:04}.jpg",
        "blotchy": "blotchy/blotchy_{:04}.jpg",
        "zigzagged": "zigzagged/zigzagged_{:04}.jpg",
    },
    "eurosat": {
        "Annual Crop Land": "AnnualCrop/AnnualCrop_{}.jpg",
        "Highway or Road": "Highway/Highway_{}.jpg",
        "Sea or Lake": "SeaLake/SeaLake_{}.jpg",
    },
    "ucf101": {
        "Apply_Eye_Makeup": "Apply_Eye_Makeup/v_ApplyEyeMakeup_g{:02}_c01.jpg",
        "Yo_Yo": "Yo_Yo/v_YoYo_g{:02}_c01.jpg",
        "Playing_Dhol": "Playing_Dhol/v_PlayingDhol_g{:02}_c01.jpg",
    },
}
#: Label and number of each image of a part, in the order of the file: by hand, no class in one piece.
PARTS = {
    "train": [(1, 4), (0, 2), (1, 1), (2, 3), (0, 1), (0, 7), (1, 9), (2, 8), (0, 3)],
    "val": [(2, 5), (0, 9), (1, 2), (2, 6), (0, 8)],
    "test": [(1, 3), (2, 1), (0, 4)],
}
#: Lines of the official lists of Aircraft.
AIRCRAFT = {
    "train": ["1025794 707-320", "1340192 F/A-18", "0056978 707-320", "0450014 DR-400", "1042824 707-320"],
    "val": ["0034309 DR-400", "0999999 F/A-18"],
    "test": ["1514522 F/A-18", "0747566 DR-400"],
}
VARIANTS = ["707-320", "F/A-18", "DR-400"]
#: CoOp's list is in the order of the ids, and has one name twice.
CLASS_NAMES = {
    "n01440764": "tench",
    "n01498041": "stingray",
    "n02127052": "lynx",
    "n04355933": "sunglasses",
    "n04356056": "sunglasses",
}
#: Folder of the class folders, and the number of images in each.
CLASS_FOLDERS = {
    "imagenet": ("imagenet/images/train", dict.fromkeys(CLASS_NAMES, 3)),
    "imagenet_val": ("imagenet/images/val", dict.fromkeys(CLASS_NAMES, 2)),
    "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", dict.fromkeys(map(str, range(5)), 2)),
    "imagenet_sketch": ("imagenet-sketch/images", dict.fromkeys(CLASS_NAMES, 1)),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", {"n02127052": 2, "n01498041": 1}),
    "imagenet_r": ("imagenet-rendition/imagenet-r", {"n04356056": 1, "n01440764": 2}),
}


def entries(name: str, part: str) -> list[Entry]:
    """Entries of one part of a split file."""
    classes = list(CLASSES[name].items())
    return [(classes[label][1].format(number), label, classes[label][0]) for label, number in PARTS[part]]


def put_image(path: Path) -> None:
    """One small image, another one for every path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(4, 4, seed=crc32(str(path).encode())).save(path)


def put_text(path: Path, lines: list[str]) -> None:
    """Lines of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_trees(root: Path) -> None:
    """All 15 of them below one folder."""
    for name, (split_file, images) in SPLIT_FILES.items():
        parts = {part: entries(name, part) for part in PARTS}
        for part in parts.values():
            for file, _, _ in part:
                put_image(root / images / file)
        (root / split_file).write_text(json.dumps(parts))
    for lines in AIRCRAFT.values():
        for line in lines:
            put_image(root / "fgvc_aircraft" / "images" / f"{line.split(' ')[0]}.jpg")
    for part, lines in AIRCRAFT.items():
        put_text(root / "fgvc_aircraft" / f"images_variant_{part}.txt", lines)
    put_text(root / "fgvc_aircraft" / "variants.txt", VARIANTS)
    for folder, counts in CLASS_FOLDERS.values():
        put_text(root / folder.split("/")[0] / "classnames.txt", [f"{k} {name}" for k, name in CLASS_NAMES.items()])
        for wordnet_id, count in counts.items():
            for number in reversed(range(count)):
                put_image(root / folder / wordnet_id / f"{wordnet_id}_{number}.JPEG")
    for folder in ("imagenet-adversarial/imagenet-a", "imagenet-rendition/imagenet-r"):
        (root / folder / "README.txt").write_text("both archives bring one")
