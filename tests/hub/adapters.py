"""A tiny base model on the loopback Hub, and adapters for it as a user makes them: trained, evaluated."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPModel, PrinterCallback

from peft_vlm import VLMTrainer, VLMTrainingArguments
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from tests.cases import CASES, NUM_CLASSES, Case, base_model, class_prompts, images, processor
from tests.hub.server import LoopbackHub
from tests.hub.storage import LFS_SUFFIXES, File, Repository
from tests.tiny import colour_names, colour_rows

BASE = "me/tiny-clip"
(SKIP_TUNING,) = [case for case in CASES if case.method == "skip_tuning"]


def put_base_model(hub: LoopbackHub) -> None:
    """The tiny CLIP with its processor, as if somebody had published it."""
    with tempfile.TemporaryDirectory() as folder:
        base_model().save_pretrained(folder)
        processor().save_pretrained(folder)
        files = {p.name: File(p.read_bytes(), p.name.endswith(LFS_SUFFIXES)) for p in Path(folder).iterdir()}
    repository = hub.repositories["model", BASE] = Repository(BASE)
    repository.commit("main", "the base model", files)


def write_images(folder: Path) -> Path:
    """A test split of colour images, as a folder."""
    for number, row in enumerate(colour_rows(2, classes=NUM_CLASSES, seed=7)):
        path = folder / "test" / colour_names()[row["label"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return folder


def trainer_for(case: Case, folder: Path, **arguments: object) -> VLMTrainer:
    """A trainer of three steps on the base model of the Hub."""
    torch.manual_seed(3)
    model = get_peft_model(CLIPModel.from_pretrained(BASE), case.config())
    own = {"num_train_epochs": 1, "learning_rate": 0.05, "warmup_epochs": 0, "save_strategy": "no"}
    args = VLMTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, seed=3, **(own | arguments))
    trainer = VLMTrainer(model, args, train_dataset=images(per_class=2), objective=case.objective(class_prompts()))
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(adapter: Path, dataset: Path) -> None:
    """What `peft-vlm evaluate --baseline` writes into the adapter's folder."""
    arguments = EvaluationArguments(
        protocol="few-shot", dataset=[str(dataset)], adapter=str(adapter), output_dir=str(adapter)
    )
    arguments.baseline, arguments.plots, arguments.shots, arguments.seed = True, False, 2, 3
    run_evaluation(arguments)


def trained(case: Case, folder: Path, dataset: Path) -> PeftModel:
    """Train and evaluate; the adapter and its reports are in the folder."""
    trainer = trainer_for(case, folder)
    trainer.train()
    evaluate(folder, dataset)
    return trainer.model.model.eval()
