"""PromptKD in two stages: a teacher with PromptSRC on few labelled images, then a small student on unlabelled ones.

Paper: PromptKD: Unsupervised Prompt Distillation for Vision-Language Models, arXiv 2403.02781.
Time: the demo preset takes 15 to 25 minutes on 2 CPU cores (results: docs/methods/promptkd.md).
    python examples/train_promptkd.py                                       # bundled CLIPs and data, no network
    python examples/train_promptkd.py --teacher openai/clip-vit-large-patch14 --model openai/clip-vit-base-patch16 \
        --dataset <Hub id or folder> --preset base_to_new --template "a photo of a {}."

The student sees the whole training split without labels, new classes included (transductive); no test image is seen.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import CLIPModel

from peft_vlm import PromptKDConfig, PromptKDObjective, PromptSRCConfig, PromptSRCObjective
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import Experiment, Task, TrainerLearner, ZeroShot, load_task
from peft_vlm.experiments.report import show_results
from peft_vlm.methods import promptkd, promptsrc

ASSETS = Path(__file__).parent / "assets"
# Ours, for the bundled 48 px CLIPs (6 and 9 vision layers); the official presets are for ViT-B/16 and ViT-L/14.
DEMO = {
    "augmentation": {"scale": (0.6, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
    "templates": None,  # of the frozen text features: the training template
    "promptsrc": {
        "config": {"num_text_tokens": 1, "context_init": "a", "text_depth": 3, "vision_depth": 4},
        "objective": {"gpa_mean": 4.0, "gpa_std": 1.5},
        "training": {"learning_rate": 0.01, "num_train_epochs": 5, "per_device_train_batch_size": 32},
    },
    "promptkd": {
        "config": {"vision_depth": 4, "projector_depth": 1},
        "objective": {"weight": 10.0, "teacher_cache": "views", "num_views": 3, "align_steps": 2160},
        "training": {"learning_rate": 0.01, "max_steps": 324, "per_device_train_batch_size": 32},
    },
}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="student CLIP: folder or Hub id")
    parser.add_argument("--teacher", default=str(ASSETS / "clip_teacher"), help="teacher CLIP: folder or Hub id")
    parser.add_argument("--dataset", help="folder, CSV or Hub id with image and label; the bundled sets by default")
    parser.add_argument("--template", default="a {} icon", help="text around a class name, with one {}")
    parser.add_argument("--context", help="words that the template begins with and the learned context starts from")
    parser.add_argument("--preset", choices=["demo", "base_to_new", "cross_dataset"], default="demo")
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default="base_to_new", help="for --dataset")
    parser.add_argument("--shots", type=int, default=16, help="labelled images per class for PromptSRC")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--depth", type=int, help="layers with prompts, instead of the presets'")
    parser.add_argument("--epochs", type=int, help="of both stages, instead of the presets' numbers")
    parser.add_argument("--align_steps", type=int, help="of the projector alone, instead of the preset's number")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/promptkd"))
    add_console_flags(parser)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of both stages: for the adapters, the objectives, the training and the augmentation."""
    settings: dict[str, Any] = dict(DEMO)
    if args.preset != "demo":
        stages = {"promptkd": promptkd.preset_for(args.preset), "promptsrc": promptsrc.preset_for("teacher")}
        settings = {stage: vars(preset) for stage, preset in stages.items()}
        augmentation = {"scale": (0.08, 1.0), "flip_probability": 0.5}
        settings |= {"augmentation": augmentation, "templates": promptsrc.OFFICIAL_TEMPLATES}
    for stage in ("promptsrc", "promptkd"):
        parts = {part: dict(settings[stage][part]) for part in ("config", "objective", "training")}
        if stage == "promptsrc" and args.context is not None:
            parts["config"]["context_init"] = args.context
        if args.depth is not None:
            parts["config"] |= {key: args.depth for key in parts["config"] if key in ("text_depth", "vision_depth")}
        epochs = {} if args.epochs is None else {"num_train_epochs": args.epochs, "max_steps": -1}
        parts["training"] |= {"use_cpu": args.use_cpu} | epochs
        if stage == "promptkd" and args.align_steps is not None:
            parts["objective"]["align_steps"] = args.align_steps
        settings[stage] = parts
    return settings


def learners_of(settings: dict[str, Any], load_teacher: Any, make_prompts: Any, seen: dict[Any, Any]) -> list[Any]:
    """The rows of the table; `seen` has the classes with labelled images by the list of all classes."""
    stage1, stage2 = settings["promptsrc"], settings["promptkd"]
    dim = load_teacher().config.projection_dim
    teachers: dict[int, Any] = {}  # by seed; trained before the students that learn from it

    def adapter(config_class: Any, config: dict[str, Any]) -> Any:
        return lambda model: get_peft_model(model, config_class(**config))

    def few_shot(name: str, **more: Any) -> TrainerLearner:
        def objective(prompts: Any, seed: int) -> Any:
            frozen = make_prompts(prompts.class_names, settings["templates"] or prompts.templates)
            return PromptSRCObjective(prompts, frozen_prompts=frozen, **stage1["objective"])

        return TrainerLearner(name, adapter(PromptSRCConfig, stage1["config"]), objective, stage1["training"], **more)

    def distilled(name: str, *, projector_only: bool = False) -> TrainerLearner:
        config, options = stage2["config"] | {"class_dim": dim}, dict(stage2["objective"])
        if projector_only:  # the student's tower stays frozen, so its features are stored like the teacher's
            config["vision_depth"], options["student_cache"] = 0, options.get("teacher_cache", "none")

        def objective(prompts: Any, seed: int) -> Any:
            known = {"seen_classes": seen[prompts.class_names], "transductive": True}
            return PromptKDObjective(prompts, teacher=teachers[seed], **known, **options)

        return TrainerLearner(name, adapter(PromptKDConfig, config), objective, stage2["training"], on_pool=True)

    return [
        ZeroShot("student_zero_shot"),
        few_shot("student_promptsrc"),
        ZeroShot("teacher_zero_shot", load_model=load_teacher),
        few_shot("teacher_promptsrc", load_model=load_teacher, after=lambda m, seed: teachers.update({seed: m})),
        distilled("student_projector_only", projector_only=True),
        distilled("student_promptkd"),
    ]


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The bundled icons and emoji, or the dataset of the command line."""
    if args.dataset:
        return [load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)]
    return [
        load_task(ASSETS / "icons", "base_to_new", template="a {} icon", shots=args.shots),
        load_task(ASSETS / "emoji", "few_shot", template="{} emoji", shots=args.shots),
    ]


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings, tasks = settings_of(args), tasks_of(args)
    options = {"text_model": args.teacher, "augmentation": settings["augmentation"]}
    experiment = Experiment.for_clip(args.model, output_dir=args.output_dir, use_cpu=args.use_cpu, **options)
    seen = {task.train.class_names: task.seen_classes for task in tasks}
    learners = learners_of(settings, lambda: CLIPModel.from_pretrained(args.teacher), experiment.prompts, seen)
    show_results(experiment.run(tasks, learners, args.seeds), args.output_dir, learner="student_promptkd")


if __name__ == "__main__":
    main()
