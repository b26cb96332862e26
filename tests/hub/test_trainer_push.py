"""Publishing from the trainer and from the command line."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from peft_vlm import VLMTrainingArguments
from peft_vlm.cli.program import main
from tests.cases import base_model, logits_of
from tests.hub.adapters import SKIP_TUNING, evaluate, put_base_model, trainer_for, write_images
from tests.hub.server import Fault

pytestmark = pytest.mark.plots

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "class_names.txt", "metrics.json"]
FILES += ["report.json", "training_curve.png", "training_summary.json", "zero_shot.json"]


@pytest.fixture
def colours(hub, tmp_path) -> Path:
    """The Hub has the base model, and there are test images."""
    put_base_model(hub)
    return write_images(tmp_path / "colours")


def test_the_trainer_publishes_the_whole_folder_without_pickles(hub, colours, tmp_path):
    """The repository is made before the training; checkpoints go to a folder of their own, the adapter at the end."""
    settings = {"push_to_hub": True, "hub_model_id": "me/run", "hub_license": "mit", "hub_private_repo": True}
    settings |= {"save_strategy": "epoch", "hub_strategy": "checkpoint"}
    trainer = trainer_for(SKIP_TUNING, tmp_path / "run", **settings)
    assert hub.model("me/run").private
    trainer.train()
    evaluate(tmp_path / "run", colours)
    assert trainer.push_to_hub("finished").changed
    assert hub.model("me/run").messages == ["Checkpoint of step 3, not finished", "finished"]
    files = hub.model("me/run").files
    assert [name for name in sorted(files) if not name.startswith("last-checkpoint/")] == FILES
    assert "last-checkpoint/adapter_model.safetensors" in files
    assert not [name for name in files if name.endswith(("training_args.bin", "last-checkpoint/README.md"))]
    assert b"More Information Needed" not in files["README.md"]
    loaded = PeftModel.from_pretrained(base_model(), "me/run")
    assert torch.equal(logits_of(SKIP_TUNING, loaded), logits_of(SKIP_TUNING, trainer.model.model.eval()))


def test_the_folder_of_a_run_has_a_card_with_facts(hub, colours, tmp_path):
    """PEFT leaves a template there."""
    trainer = trainer_for(SKIP_TUNING, tmp_path / "run")
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    trainer.create_model_card(license="mit")
    assert ModelCard.load(tmp_path / "run" / "README.md").data.license == "mit"
    assert str(tmp_path) not in card, "a folder of this computer"
    assert "![loss and accuracy over the epochs](training_curve.png)" in card
    assert "3 steps in" in card
    assert "More Information Needed" not in card
    assert "# Skip Tuning: run" in card
    assert "| `start_layer` | `1` |" in card
    assert "@inproceedings{wu2025skip," in card


def test_unfinished_adapters_are_not_published(tmp_path):
    with pytest.raises(ValueError, match="got 'every_save': an adapter is published when it is finished"):
        VLMTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy="every_save", use_cpu=True)


def test_the_command_evaluates_and_publishes(hub, colours, tmp_path, capsys):
    trainer_for(SKIP_TUNING, tmp_path / "run").train()
    words = ["publish", str(tmp_path / "run"), "me/by-command", "--license", "mit"]
    assert main([*words, "--dataset", str(colours), "--shots", "2", "--private", "--json"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert published["changed"] is True
    assert sorted(hub.model("me/by-command").files) == FILES
    assert hub.model("me/by-command").private
    assert main(words) == 0
    assert "no new commit" in capsys.readouterr().out
    hub.faults.append(Fault("POST", status=401))
    assert main(words) == 2
    assert "was not published: the Hub does not know you" in capsys.readouterr().err
