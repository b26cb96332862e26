"""Publishing from the trainer: the finished run by `hub.publish`, unfinished checkpoints for a resume elsewhere."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from peft_vlm.files import CARD_NAME
from peft_vlm.hub.adapter_folder import AdapterFolder
from peft_vlm.hub.card import render_card
from peft_vlm.hub.publish import Published, publish, saved_adapter
from peft_vlm.training.arguments import VLMTrainingArguments


def write_card(folder: Path, *, license: str | None) -> None:
    """Replace the card that PEFT has put into an adapter folder by one with facts.

    Args:
        folder: The adapter.
        license: Identifier of its licence; None if it is not known yet.
    """
    card = render_card(AdapterFolder.read(folder), repo_id=str(folder), license=license)
    card.save(folder / CARD_NAME)


def publish_run(folder: Path, args: VLMTrainingArguments, repo_id: str, **options: Any) -> Published:
    """Publish a finished run with the settings of its arguments.

    Args:
        folder: The adapter.
        args: Licence, token, branch and visibility that `options` do not name.
        repo_id: Repository.
        **options: Passed to `publish`.
    """
    given = {key: value for key, value in options.items() if value is not None}
    own = {"license": args.hub_license, "token": args.hub_token, "revision": args.hub_revision}
    return publish(folder, repo_id, **{**own, "private": args.hub_private_repo, **given})


def push_checkpoint(args: VLMTrainingArguments, repo_id: str, checkpoint: Path, *, step: int) -> PushInProgress | None:
    """Upload a checkpoint in the background, where the arguments ask for it.

    Args:
        args: `hub_strategy` "checkpoint" keeps one, in the folder `last-checkpoint`; "all_checkpoints" keeps all.
        repo_id: Repository.
        checkpoint: Its folder.
        step: Number of the step, for the commit message.

    Returns:
        The upload under way; None if nothing is to be uploaded.
    """
    if args.hub_strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        return None
    last = args.hub_strategy == HubStrategy.CHECKPOINT
    job = HfApi(token=args.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=checkpoint,
        path_in_repo="last-checkpoint" if last else checkpoint.name,
        commit_message=f"Checkpoint of step {step}, not finished",
        ignore_patterns=[CARD_NAME],
        revision=args.hub_revision,
        run_as_future=True,
    )
    return PushInProgress([job])


class PublishingTrainer(Trainer):
    """Hugging Face's Trainer whose uploads are complete adapter folders with a card made from facts."""

    def push_to_hub(self, commit_message: str | None = None, **options: Any) -> Published | None:
        """Save and publish the adapter with its reports and a card; see `peft_vlm.publish`.

        Evaluate first: `peft-vlm evaluate --baseline --adapter FOLDER --output_dir FOLDER ...` with the run's folder.
        Plain models are uploaded by the base class.

        Args:
            commit_message: Summary of the commit.
            **options: Passed to `publish`; licence, token, branch and visibility default to those of the arguments.

        Returns:
            Where it is; None on all but the main process, and for plain models.
        """
        folder = saved_adapter(self.model.model, self.args.output_dir)
        if folder is None:
            super().push_to_hub(commit_message or "End of training", **options)
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token=options.get("token"), private=options.get("private"))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish_run(folder, self.args, self.hub_model_id, commit_message=commit_message, **options)

    def create_model_card(self, license: str | None = None, **options: Any) -> None:
        """Write the card of the run's folder; that of the base class for plain models.

        Args:
            license: Identifier of the licence; None for the one of the arguments.
            **options: Of the base class.
        """
        folder = saved_adapter(self.model.model, self.args.output_dir)
        if folder is None:
            super().create_model_card(license=license, **options)
        elif self.is_world_process_zero():
            write_card(folder, license=license or self.args.hub_license)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint for a resume elsewhere, without the base class's pickled arguments."""
        if self.is_world_process_zero():
            step = self.state.global_step
            self._finish_current_push()
            self.push_in_progress = push_checkpoint(self.args, self.hub_model_id, Path(checkpoint_folder), step=step)
