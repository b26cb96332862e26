"""What RPP's pretrained prompts give as a start for few-shot training of PromptSRC and MaPLe, beside words.

    python examples/train_rpp.py --use_cpu --share_qkv all --slot_residual replaced --shots \\
        --output_dir outputs/rpp_shared
    python benchmarks/rpp_start.py --adapter outputs/rpp_shared/pretrained --use_cpu

Shared prompts alone fit: an adapter with separate prompts for queries, keys and values, such as the one in
`model_cards/rpp-student`, is refused. PromptSRC starts from the prompts of both towers, MaPLe from those of the text
tower, since its vision tokens are projections. Emoji, 16 shots, the settings that each method recommends, with the
tokens and depths of the adapter. Minutes on two CPU cores.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn

from peft_vlm import MaPLeConfig, MaPLeObjective, PromptSRCConfig, PromptSRCObjective
from peft_vlm.adapters.config import read_config
from peft_vlm.experiments.compare import Experiment, TrainerLearner, ZeroShot, load_task
from peft_vlm.methods.rpp import start_shared_prompts
from peft_vlm.registry import METHODS, RunSize

ASSETS = Path(__file__).parents[1] / "examples" / "assets"
TEMPLATE = "a photo of a {}."


def learners(adapter: Path, *, shots: int, classes: int, use_cpu: bool) -> list[TrainerLearner]:
    """PromptSRC and MaPLe, each from words and from the pretrained prompts of the same shape."""
    config: Any = read_config(adapter)
    text, vision = config.depths["text"], config.depths["vision"]
    deep = {"text_depth": text, "num_vision_tokens": config.num_vision_tokens, "vision_depth": vision}
    size = RunSize(num_images=shots * classes, num_classes=classes, fewest=shots, is_small=True)
    kinds: dict[str, tuple[type, Callable[..., Any], dict[str, Any]]] = {
        "promptsrc": (PromptSRCConfig, PromptSRCObjective, deep),
        "maple": (MaPLeConfig, MaPLeObjective, {"depth": text}),
    }
    found = []
    for name, (make_config, objective, own) in kinds.items():
        recommended = METHODS[name].recommended
        assert recommended is not None
        preset = recommended(size)

        def wrap(base: nn.Module, *, starts: bool, make: Any = make_config, own: dict[str, Any] = own) -> nn.Module:
            model = get_peft_model(base, make(num_text_tokens=config.num_text_tokens, **own))
            if starts:
                start_shared_prompts(model, adapter)
            return model

        def with_seed(prompts: Any, seed: int, make: Any = objective, options: Any = preset.objective) -> Any:
            return make(prompts, **options)

        for start in (False, True):
            found.append(
                TrainerLearner(
                    f"{name}_from_{'rpp' if start else 'words'}",
                    lambda base, wrap=wrap, start=start: wrap(base, starts=start),
                    with_seed,
                    dict(preset.training) | {"use_cpu": use_cpu},
                )
            )
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="RPP adapter with share_qkv='all'")
    parser.add_argument("--model", default=str(ASSETS / "clip_student"))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rpp_start"))
    args = parser.parse_args()
    experiment = Experiment.for_clip(
        args.model,
        augmentation={"scale": [0.9, 1.0], "flip_probability": 0.0},
        output_dir=args.output_dir,
        use_cpu=args.use_cpu,
    )
    task = load_task(ASSETS / "emoji", "few_shot", template=TEMPLATE, shots=args.shots)
    classes = len(task.train.class_names)
    rows = [ZeroShot(), *learners(args.adapter, shots=args.shots, classes=classes, use_cpu=args.use_cpu)]
    report = experiment.run([task], rows, args.seeds)
    if args.json:
        print(json.dumps(report))
        return
    for name, row in report["methods"].items():
        spread = statistics.stdev(row["accuracy"]) if len(args.seeds) > 1 else 0.0
        print(f"{name}: {statistics.mean(row['accuracy']):.1f} +- {spread:.1f} % {row['accuracy']}")


if __name__ == "__main__":
    main()
