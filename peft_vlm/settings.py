"""Settings of a training run and of an evaluation, as commands read them from flags or a file.

Nothing here imports torch, PEFT or transformers: help and wrong flags answer at once.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from peft_vlm.errors import DataError, check_choice, check_list, check_template

#: Settings of earlier versions; files that still hold them are read without.
RETIRED_SETTINGS = ("memory_check", "fca_cache")
#: Protocols of an evaluation: on one dataset, and on several.
SINGLE = ("zero-shot", "few-shot", "base-to-new")
PROTOCOLS = (*SINGLE, "cross-dataset", "domain-shift")
#: Protocols of a training run, and those that measure it.
RUN_PROTOCOLS = {"few_shot": "few-shot", "base_to_new": "base-to-new"}
#: Word for the anchors of a method's official code.
OFFICIAL = "official"
#: Protocols of the papers' tables.
TABLES = ("base_to_new", "few_shot", "cross_dataset", "domain_shift", "mllm_transfer")


def _check_least(settings: Any, **least: int) -> None:
    """Refuse numbers below the smallest that has a meaning.

    Args:
        settings: Settings with whole numbers, or lists of them.
        **least: The smallest value by name.

    Raises:
        DataError: If one is smaller.
    """
    for name, number in least.items():
        value = getattr(settings, name)
        for one in value if isinstance(value, list) else [value]:
            if one < number:
                raise DataError(f"Expected `{name}` of {number} or more, got {one!r}.")


@dataclass
class RunSettings:
    """What is trained on what, as flags or a file say it; documented by the help of each field."""

    method: str = field(metadata={"help": "One of `peft-vlm info`'s methods, such as skip_tuning."})
    model: str = field(metadata={"help": "Base model: folder or Hub id."})
    dataset: str = field(metadata={"help": "Labelled images: folder, CSV file or Hub id."})
    data_root: str | None = field(
        default=None,
        metadata={"help": "Folder of the benchmarks as CoOp's code reads them; `dataset` is a name, such as dtd."},
    )
    template: str | None = field(
        default=None,
        metadata={"help": "Text around a class name, with one {}; none: the benchmark's, or 'a photo of a {}.'"},
    )
    question: str = field(
        default="What is in the picture?", metadata={"help": "For models that write text: what is asked."}
    )
    shots: int = field(default=0, metadata={"help": "Training images per class, drawn by the seed; 0: all."})
    seeds: list[int] = field(
        default_factory=list,
        metadata={"help": "Train once per seed, into OUTPUT_DIR/seed1, ..., and print mean and spread."},
    )
    protocol: str = field(
        default="few_shot",
        metadata={"help": "few_shot: all classes; base_to_new: train on the first half of them, test both halves."},
    )
    preset: str | None = field(
        default=None, metadata={"help": "Official configuration of the method to start from, such as base_to_new."}
    )
    config: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings of the method's config as name=value, such as start_layer=6."},
    )
    objective: list[str] = field(
        default_factory=list, metadata={"help": "Settings of its objective as name=value, such as top_ratio=0.5."}
    )
    augmentation: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings of TrainTransform as name=value, such as flip_probability=0 scale=[0.9,1]."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "CLIP that teaches, where the method has a teacher: folder or Hub id."}
    )
    teacher_adapter: str | None = field(default=None, metadata={"help": "Adapter of the teacher, if it has one."})
    anchors: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts around a class name whose frozen features the method keeps to, averaged (PromptSRC, "
            "KgCoOp); official: those of its code; none: the template."
        },
    )
    transductive: bool = field(
        default=False,
        metadata={"help": "For methods that read no labels: train on all images of all classes, new ones included."},
    )
    split: str = field(default="train", metadata={"help": "Part of the dataset to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Part for validation during training; see --eval_strategy."}
    )
    test_split: str = field(default="test", metadata={"help": "Part that is classified at the end."})
    evaluate: bool = field(default=True, metadata={"help": "Classify the test split at the end."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    class_names: str | None = field(default=None, metadata={"help": "File with class names."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    holdout: float = field(
        default=0.2,
        metadata={"help": "Share of each class for the test, drawn by seed 0, where images have no parts; 0: none."},
    )
    value_range: list[float] | None = field(
        default=None, metadata={"help": "Black and white of images with more than 8 bits, such as 0 4095."}
    )

    device_map: str | None = field(
        default=None,
        metadata={
            "help": "For models that write text: auto, to divide the frozen model over all GPUs and this computer's "
            "memory, or JSON of its parts and their places."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Train nothing: print memory by layer from the model's config.json, without its weights."},
    )

    def check(self) -> None:
        """Refuse what no run can be made from.

        Raises:
            DataError: If a number is too small.
            ValueError: If the protocol is unknown.
        """
        for name in ("config", "objective", "augmentation"):
            check_list(name, getattr(self, name))
        if self.template is not None:
            check_template(self.template)
        check_list("anchors", self.anchors)
        for text in self.anchors if self.anchors != [OFFICIAL] else ():
            check_template(text)
        check_list("seeds", self.seeds)
        _check_least(self, shots=0, seeds=0)
        if len(set(self.seeds)) != len(self.seeds):
            raise DataError(f"Expected different `seeds`, got {self.seeds!r}.")
        self.protocol = str(self.protocol).replace("-", "_")  # either spelling, here and below
        check_choice("protocol", self.protocol, sorted(RUN_PROTOCOLS))


@dataclass
class ReproductionSettings:
    """Which table of a paper is run, and where, as flags say it; documented by the help of each field."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of all runs and the table; it continues with what is missing."}
    )
    protocol: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(TABLES)}, if the paper reports it; none: the recipe's first."},
    )
    datasets: list[str] = field(
        default_factory=list, metadata={"help": "Some of the recipe's data sets, or of its targets; none: all."}
    )
    seeds: list[int] = field(default_factory=list, metadata={"help": "Seeds; none: those of the paper."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder of all data sets, laid out as CoOp's code expects them."}
    )
    model: str | None = field(default=None, metadata={"help": "Base model instead of the paper's."})
    teacher: str | None = field(default=None, metadata={"help": "Teacher instead of the paper's."})
    plan: bool = field(default=False, metadata={"help": "Print the runs, images and steps, and end."})
    stand_in: bool = field(
        default=False, metadata={"help": "The same grid on the bundled models and data, in minutes; no comparison."}
    )
    select_on_test_as_official: bool = field(
        default=False,
        metadata={"help": "Choose checkpoints on test images where the official code does; marked in the table."},
    )

    def check(self) -> None:
        """Refuse what no grid can be made from.

        Raises:
            DataError: If a list holds something twice, a seed is negative, or there is no folder.
            ValueError: If the protocol is unknown.
        """
        for name in ("datasets", "seeds"):
            check_list(name, getattr(self, name))
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise DataError(f"Expected different `{name}`, got {getattr(self, name)!r}.")
        _check_least(self, seeds=0)
        if self.protocol is not None:
            self.protocol = self.protocol.replace("-", "_")
            check_choice("protocol", self.protocol, TABLES)
        if self.output_dir is None and not self.plan:
            raise DataError("Expected `output_dir`, the folder of the runs and the table, got none.")


@dataclass
class EvaluationArguments:
    """Settings of one evaluation, as flags or a file say them; documented by the help of each field."""

    protocol: str = field(metadata={"help": f"One of {', '.join(PROTOCOLS)}."})
    dataset: list[str] = field(
        metadata={"help": "Folder, CSV file or Hub id of the test images; several for cross-dataset and domain-shift."}
    )
    output_dir: str = field(metadata={"help": "Folder for report.json, the plots and predictions.csv."})
    data_root: str | None = field(
        default=None,
        metadata={"help": "Folder of the benchmarks as CoOp's code reads them; `dataset` gives names, such as dtd."},
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id; none: the base model alone."})
    model: str | None = field(default=None, metadata={"help": "Base model; none: the one the adapter records."})
    split: list[str] = field(
        default_factory=lambda: ["test"],
        metadata={"help": "Part of the dataset; for domain-shift on one dataset, several parts are the domains."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    class_names: str | None = field(default=None, metadata={"help": "File with class names."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it."})
    holdout: float | None = field(
        default=None,
        metadata={"help": "As for `train`; none: that of the adapter's training, for the test split."},
    )
    value_range: list[float] | None = field(
        default=None,
        metadata={"help": "Black and white of images with more than 8 bits; none: those the adapter records."},
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "For domain-shift on one dataset: the column that names the domain."}
    )
    source_domain: str | None = field(
        default=None, metadata={"help": "For domain-shift: the domain of training, left out of the average."}
    )
    template: list[str] | None = field(
        default=None, metadata={"help": "Text around a class name, with {}; several are averaged."}
    )
    shots: int | None = field(default=None, metadata={"help": "Training images per class, for the report."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the training, for the report."})
    note: str = field(default="", metadata={"help": "Remark for the report."})
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    device: str | None = field(default=None, metadata={"help": "Device; none: a GPU if there is one."})
    baseline: bool = field(
        default=False,
        metadata={"help": "Evaluate the base model alone as well: zero_shot.json, for the card."},
    )
    save_predictions: bool = field(
        default=False,
        metadata={
            "help": "Write predictions.csv, one row per image; names that a spreadsheet would run begin with '."
        },
    )
    plots: bool = field(default=True, metadata={"help": "Write the PNG files."})

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            DataError: If the settings do not fit the protocol, or a baseline is asked of a model without adapter.
            ValueError: If the protocol is unknown.
        """
        for name in ("dataset", "split", "template"):
            check_list(name, getattr(self, name))
        for template in self.template or ():
            check_template(template)
        self.protocol = str(self.protocol).replace("_", "-")
        check_choice("protocol", self.protocol, PROTOCOLS)
        if self.protocol in SINGLE and len(self.dataset) != 1:
            raise DataError(f"The protocol {self.protocol!r} takes one dataset, got {self.dataset!r}.")
        if self.baseline and self.adapter is None:
            raise DataError("`baseline` compares an adapter with its base model. Pass `adapter`, or leave it out.")
        if self.source_domain and self.protocol != "domain-shift":
            raise DataError("`source_domain` belongs to the protocol 'domain-shift'. Leave it out.")
        if len(self.split) != 1 and (self.protocol != "domain-shift" or len(self.dataset) != 1):
            raise DataError(
                f"Expected one `split`, got {self.split!r}. Several are for 'domain-shift' on one dataset."
            )
        if self.domain_column and (self.protocol != "domain-shift" or len(self.dataset) != 1):
            raise DataError("`domain_column` parts one dataset for the protocol 'domain-shift'. Leave it out.")


@dataclass
class TemplateSettings:
    """Settings of a search for a template, as flags or a file say them; documented by the help of each field."""

    model: str = field(metadata={"help": "CLIP or SigLIP: folder or Hub id."})
    proposer: str = field(metadata={"help": "Causal language model that proposes templates: folder or Hub id."})
    dataset: str = field(metadata={"help": "Labelled images: folder, CSV file or Hub id."})
    output_dir: str = field(metadata={"help": "Folder for history.json."})
    template: str = field(default="a photo of a {}.", metadata={"help": "Template to begin with, with one {}."})
    about: str = field(default="", metadata={"help": "What the images show, for the language model."})
    shots: int = field(default=1, metadata={"help": "Training images per class that score a template; 0: all."})
    steps: int = field(default=100, metadata={"help": "Questions to the language model."})
    proposals: int = field(default=8, metadata={"help": "New templates per question."})
    seed: int = field(default=1, metadata={"help": "Seed of the shots and of the proposals."})
    split: str = field(default="train", metadata={"help": "Part of the dataset that scores."})
    test_split: str = field(default="test", metadata={"help": "Part that is classified at the end."})
    device: str | None = field(default=None, metadata={"help": "Device; none: a GPU if there is one."})

    def check(self) -> None:
        """Refuse what no search can be made from.

        Raises:
            DataError: If a number is too small.
        """
        check_template(self.template)
        _check_least(self, shots=0, steps=1, proposals=1, seed=0)

    def facts(self) -> dict[str, Any]:
        """What identifies a search."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("output_dir", "test_split", "device")
        }
