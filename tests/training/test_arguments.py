"""Every argument that the trainer inherits counts, or is refused by name; impossible values get a message of ours."""

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from accelerate import ParallelismConfig
from transformers import Trainer, TrainingArguments

from peft_vlm import SkipTuningObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.training.inputs import evaluation_loader, train_loader
from tests.cases import class_prompts, images
from tests.short_run import train

#: Read by the base class or by this package as they stand.
USED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate optim weight_decay
gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps logging_strategy logging_steps
logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_use_gather_object eval_accumulation_steps
batch_eval_metrics save_only_model save_strategy save_steps save_total_limit push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_revision load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed
use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout deepspeed debug fsdp
skip_memory_metrics resume_from_checkpoint
""".split()
#: Read by the scripts that make a trainer, as transformers says of them, or by its launcher.
OF_SCRIPTS = ("do_train", "do_eval", "do_predict", "local_rank")
#: What is done in any case: the last upload is waited for, so that none is left out.
ALWAYS = ("hub_always_push",)
#: Refused, each with a value, and settings without which it would be read or another message come first.
REFUSED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "remove_unused_columns": True,
    "label_names": ["label"],
    "length_column_name": "size",
    "optim_target_modules": ["q_proj"],
    "average_tokens_across_devices": False,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "auto_find_batch_size": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "all",
    "eval_do_concat_batches": False,
    "save_on_each_node": True,
    "enable_jit_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
    "fsdp_config": {"limit_all_gathers": True},
    "include_for_metrics": ["inputs"],
    "accelerator_config": {"split_batches": True},
    "parallelism_config": ParallelismConfig(),
}
#: Refused under one optimizer or schedule, and read under another: the value, and what reads it.
CONDITIONAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "lr_scheduler_type": ("cosine", {"lr_schedule": "transformers"}),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_schedule": "transformers", "lr_scheduler_type": "cosine"}),
    "warmup_steps": (3, {"lr_schedule": "transformers"}),
    "adam_beta1": (0.5, {"optim": "adamw_torch"}),
    "adam_beta2": (0.5, {"optim": "adamw_torch"}),
    "adam_epsilon": (0.5, {"optim": "adamw_torch"}),
    "optim_args": ("a=1", {"optim": "adamw_torch"}),
}


def arguments(folder: Path, **settings: Any) -> VLMTrainingArguments:
    """Settings of a short run."""
    own = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    return VLMTrainingArguments(str(folder), **(own | settings))


def read_names() -> set[str]:
    """Attributes of arguments that the code of transformers, accelerate's and ours reads."""
    folder = Path(transformers.__file__).parent
    files = [*folder.glob("trainer*.py"), folder / "training_args.py", *(folder / "integrations").glob("*.py")]
    files += sorted(Path(inspect.getfile(VLMTrainer)).parent.glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r"(?:args|self)\.(?=(\w+))", text)) | set(re.findall(r'"(\w+)"', text))


def test_every_argument_of_transformers_counts_or_is_refused() -> None:
    """A field that a newer transformers adds would be taken, and read by nobody."""
    decided = [*USED, *OF_SCRIPTS, *ALWAYS, *REFUSED, *CONDITIONAL]
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in sorted(fields - set(decided)):
        pytest.fail(f"decide about {name}: nothing here says whether it is used or refused")
    assert len(decided) == len(set(decided)), "a field is decided twice"
    assert set(USED) <= read_names()
    assert len(fields) > 100


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_reads_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """The run would be reported with a setting that changed nothing."""
    named = rf"`{name}`|'inputs' in `include_for_metrics`|`split_batches` in `accelerator_config`"
    with pytest.raises(ValueError, match=f"^Expected .*({named})"):
        arguments(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", CONDITIONAL)
def test_settings_of_another_optimizer_or_schedule_are_refused(tmp_path: Path, name: str) -> None:
    """A warm-up in steps under the schedule per epoch, or betas of SGD, would be recorded and never used."""
    value, where = CONDITIONAL[name]
    with pytest.raises(ValueError, match=f"Expected no `{name}` under `(lr_schedule='epoch_cosine'|optim='sgd')`"):
        arguments(tmp_path, **{name: value})
    arguments(tmp_path, **{name: value}, **where)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optim": "adamw_torch", "momentum": 0.5}, "momentum"),
        ({"lr_schedule": "transformers", "warmup_epochs": 1}, "warmup_epochs"),
        ({"lr_schedule": "transformers", "warmup_learning_rate": 1e-4}, "warmup_learning_rate"),
    ],
)
def test_our_own_settings_are_refused_under_those_of_transformers(tmp_path: Path, settings: dict, name: str) -> None:
    """The other way round."""
    with pytest.raises(ValueError, match=f"Expected no `{name}` under"):
        arguments(tmp_path, **settings)


def test_every_argument_of_the_trainer_counts_or_is_refused() -> None:
    """`data_collator` of a copied script would be ignored."""
    used = "model args train_dataset eval_dataset processing_class compute_metrics callbacks optimizers".split()
    used += ["optimizer_cls_and_kwargs", "preprocess_logits_for_metrics"]
    refused = ["data_collator", "model_init", "compute_loss_func"]  # tests/training/test_inputs.py
    for name in sorted(set(inspect.signature(Trainer.__init__).parameters) - {"self", *used, *refused}):
        pytest.fail(f"decide about {name}: nothing here says whether it is used or refused")
    own = list(inspect.signature(VLMTrainer.__init__).parameters)
    assert own[: len(used) + len(refused) + 1] == list(inspect.signature(Trainer.__init__).parameters)


IMPOSSIBLE: dict[str, tuple[Any, ...]] = {
    "per_device_train_batch_size": (0, -1, 1.5, "4", True),
    "per_device_eval_batch_size": (0, None),
    "gradient_accumulation_steps": (0, 0.5),
    "num_train_epochs": (-1, math.nan, math.inf, "3"),
    "max_steps": (0, -2, 1.5),
    "learning_rate": (-0.1, math.nan, math.inf, "1e-3", None),
    "vision_learning_rate": (-0.1, math.nan),
    "warmup_learning_rate": (-0.1, math.nan, None),
    "warmup_epochs": (-1, 0.5),
    "weight_decay": (-1e-4, math.nan, math.inf),
    "momentum": (5, -0.1, math.nan),
    "max_grad_norm": (-1.0, math.nan),
    "adam_beta1": (1.5,),
    "adam_epsilon": (math.nan,),
    "seed": ("x", -1, 2**40, 1.5, None),
    "data_seed": ("x", -1),
    "logging_steps": (-1, math.nan),
    "save_steps": (-1, math.nan),
    "eval_steps": (-1,),
    "eval_delay": (math.nan,),
    "warmup_steps": (-1,),
    "save_total_limit": (0, -1, 1.5),
    "dataloader_num_workers": (-1, 0.5),
    "dataloader_prefetch_factor": (0,),
    "eval_accumulation_steps": (0,),
    "torch_empty_cache_steps": (0,),
    "ddp_timeout": (0,),
    "ddp_bucket_cap_mb": (0,),
    "bf16": ("false", 1),
    "load_best_model_at_end": ("no",),
    "push_to_hub": ("false",),
    "dataloader_drop_last": (None,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_impossible_values_are_answered_in_words(tmp_path: Path, name: str, value: object) -> None:
    """torch would speak of a division by zero, or train with NaN."""
    with pytest.raises(ValueError, match=rf"^Expected `{name}` to be .*, got|^Expected a run with steps, got"):
        arguments(tmp_path, **{name: value})


def test_arguments_can_be_copied(tmp_path: Path) -> None:
    """What the base class fills in must not be taken for what a user has set."""
    args = arguments(tmp_path, lr_schedule="transformers", lr_scheduler_type="cosine", warmup_steps=3)
    assert dataclasses.replace(args, seed=5).seed == 5


OWN_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "optim": {"optim": "adamw_torch"},
    "vision_learning_rate": {"vision_learning_rate": 0.1},
}


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_an_objective_with_its_own_optimizer_refuses_settings_of_another(tmp_path: Path, name: str) -> None:
    """TVP's normalised gradient has neither momentum nor weight decay."""
    with pytest.raises(ValueError, match=f"Expected no `{name}`, got .*`TVPObjective` brings an optimizer of its own"):
        train(tmp_path, "tvp", max_steps=1, save_strategy="no", **OWN_OPTIMIZERS[name])


def test_a_rate_for_parameters_that_are_not_there_is_refused(tmp_path: Path) -> None:
    """CoOp trains a context of text tokens alone."""
    with pytest.raises(ValueError, match="Expected no `vision_learning_rate`, got 0.1: `CoOpObjective` trains with"):
        train(tmp_path, "coop", max_steps=1, vision_learning_rate=0.1)


def test_data_loaders_read_as_the_arguments_say(tmp_path: Path) -> None:
    """Each loader is made in a place of its own, and could forget a setting."""
    settings = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_in_order": False}
    args = arguments(tmp_path, **settings, dataloader_multiprocessing_context="spawn")
    objective = SkipTuningObjective(class_prompts(), image_cache="none")
    for loader in (train_loader(images(), objective, args, batch_size=4), evaluation_loader(images(), args)):
        assert (loader.num_workers, loader.prefetch_factor, loader.in_order) == (1, 3, False)
        assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_the_arguments_say_where_to_go_on(tmp_path: Path) -> None:
    """`train()` of a script that sets `resume_from_checkpoint` would begin again."""
    train(tmp_path, "coop", max_steps=2)
    trainer = train(tmp_path, "coop", max_steps=4, resume_from_checkpoint="True")
    assert trainer.first_step == 2
