"""A better template for the class prompts, proposed by a language model and scored on training images.

IPO: Interpretable Prompt Optimization for Vision-Language Models, 2024, arXiv 2410.15397. Nothing is trained: a
language model reads the templates that were tried, with their scores, and writes new ones.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import check_not_trained_on, few_shot, image_sample
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import ClassNameError, PeftVLMError, shown
from peft_vlm.evaluation.run import check_path, load_model
from peft_vlm.files import read_json, write_json
from peft_vlm.models.repository import hub_options
from peft_vlm.models.towers import device_of, towers_of
from peft_vlm.settings import TemplateSettings
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import fill, tokenize_for_model

HISTORY_NAME = "history.json"
NUM_SHOWN = 30
"""Templates that the language model is shown, the best so far in ascending order (official code)."""
NUM_TOKENS = 40
"""Tokens of a proposal (official code)."""

Propose = Callable[[str, int, int], Sequence[str]]


def question(tried: Sequence[dict[str, Any]], about: str) -> str:
    """What the language model is asked.

    Args:
        tried: Templates with `accuracy` and `loss`.
        about: What the images show; may be empty.
    """
    lines = [
        "An image is classified by comparing it with one text per class, where <CLASS> is the name of the class.",
        *([f"The images: {about}"] if about else []),
        "Texts that were tried, with their accuracy in percent (higher is better) and loss (lower is better):",
        *(
            f"text: {one['template'].replace('{}', '<CLASS>')} accuracy: {one['accuracy']:.1f} loss: {one['loss']:.3f}"
            for one in sorted(tried, key=_rank)[-NUM_SHOWN:]
        ),
        "Write one new text with <CLASS> in it that is better than all of them, and nothing else.",
        "text:",
    ]
    return "\n".join(lines)


def proposer(name: str, device: torch.device | str = "cpu") -> Propose:
    """A function that asks a causal language model: `(question, number, seed)` gives as many answers.

    Args:
        name: Folder or id of the model; its chat template is used where it has one.
        device: Where it runs.

    Raises:
        PeftVLMError: If there is no such model.
    """
    check_path(name, what="language model", advice="Pass the folder of a causal language model as `proposer`.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(name))
        model = AutoModelForCausalLM.from_pretrained(name, **hub_options(name)).eval().to(device)
    except (OSError, ValueError) as error:
        raise PeftVLMError(f"The language model {name!r} could not be loaded: {error}") from error

    @torch.inference_mode()
    def propose(text: str, number: int, seed: int) -> list[str]:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        longest = getattr(model.config, "max_position_embeddings", None)
        ids = ids if longest is None else ids[:, -(longest - NUM_TOKENS) :]  # the end holds the best, and the task
        ids = ids.to(device)
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NUM_TOKENS}
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=number, pad_token_id=padding, **options
        )
        return tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)

    return propose


def as_template(answer: str) -> str:
    """The first line of an answer as a template; where it lost the place of the class name, that stands at its end.

    Args:
        answer: What a language model wrote.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    text = re.sub(r"^(?:text:|[-*]|\d+[.)](?!\d))\s*", "", lines[0] if lines else "").strip("\"'` ")
    text = "".join(character for character in text if character.isprintable() and character not in "{}")
    before, found, after = text.partition("<CLASS>")
    return f"{before}{{}}{after.replace('<CLASS>', '')}" if found else f"{text} {{}}.".strip()


class _Scorer:
    """Accuracy and loss of templates on images whose features are computed once.

    Args:
        model: CLIP-like model.
        tokenizer: Its tokenizer.
        images: Images with the transform of evaluation.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, images: ImageClassificationDataset
    ) -> None:
        self.model, self.tokenizer, self.class_names = model, tokenizer, images.class_names
        self.features: Float[Tensor, "images dim"] = all_image_features(model, images)
        self.labels = torch.tensor(images.labels)

    @torch.inference_mode()
    def __call__(self, template: str) -> dict[str, Any]:
        """Return the template with its accuracy in percent and cross-entropy, or with the reason why it has none."""
        try:
            fill(template, "name")
            prompts = tokenize_for_model(self.model, self.tokenizer, self.class_names, template=template)
        except ClassNameError as error:
            return {"template": template, "refused": str(error)}
        text = encode_classes(self.model, prompts)
        logits = towers_of(self.model).similarity_logits(self.features.to(text.device), text).cpu()
        accuracy = 100.0 * (logits.argmax(dim=-1) == self.labels).float().mean().item()
        loss = nn.functional.cross_entropy(logits, self.labels).item()
        return {"template": template, "accuracy": accuracy, "loss": loss}


def _rank(one: dict[str, Any]) -> tuple[float, float]:
    return one["accuracy"], -one["loss"]


def search(
    score: Callable[[str], dict[str, Any]], propose: Propose, settings: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Ask for templates step by step; the history is a file that a stopped search continues from.

    Args:
        score: Accuracy and loss of a template.
        propose: Answers of a language model, the same for the same question and seed.
        settings: `template`, `steps`, `proposals`, `seed` and `about`, and whatever else identifies the search.
        path: History; what it holds of an earlier call with these settings is not done again.

    Returns:
        The history: settings, steps, and the best template.

    Raises:
        PeftVLMError: If the file holds the search of other settings.
    """
    same = {name: value for name, value in settings.items() if name != "steps"}
    history: dict[str, Any] = {"settings": settings, "steps": []}
    if path.is_file():
        found = read_json(path)
        given = found.get("settings") if isinstance(found, dict) else None
        if not isinstance(given, dict) or {k: v for k, v in given.items() if k != "steps"} != same:
            raise PeftVLMError(
                f"Expected no search of other settings in {str(path)!r}, got {shown(given)}. Pass another "
                "`output_dir`."
            )
        history = found | {"settings": settings}
    for number in range(len(history["steps"]), settings["steps"] + 1):
        tried = [one for step in history["steps"] for one in step]
        scored = [one for one in tried if "accuracy" in one]
        asked = question(scored, settings["about"])
        new = propose(asked, settings["proposals"], settings["seed"] + 1000 * number) if number else ()
        templates = [as_template(answer) for answer in new] if number else [settings["template"]]
        known = {one["template"] for one in tried}
        step = [score(template) for template in dict.fromkeys(templates) if template not in known]
        history["steps"].append(step)
        scored += [one for one in step if "accuracy" in one]
        if not scored:
            raise PeftVLMError(f"Expected a template to begin with, got {shown(settings['template'])}: {step[0]}.")
        history["best"] = max(scored, key=_rank)
        write_json(path, history)
    return history


def optimize_template(settings: TemplateSettings) -> dict[str, Any]:
    """Search a template on the shots, and measure it on the test images beside the one of the beginning.

    Args:
        settings: Settings of the search.

    Returns:
        `template`, `accuracy` on the shots, `test_accuracy` and `test_accuracy_before`.
    """
    settings.check()
    loaded = load_model(base_model=settings.model, device=settings.device)
    transform, tools = EvalTransform(loaded.image_processor), (loaded.model, loaded.tokenizer)
    pool = load_image_dataset(settings.dataset, split=settings.split, transform=transform)
    test = load_image_dataset(settings.dataset, split=settings.test_split, transform=transform)
    shots = few_shot(pool, shots=settings.shots, seed=settings.seed) if settings.shots else pool
    check_not_trained_on(test, image_sample(shots), num_train=len(shots))
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ask = proposer(settings.proposer, device_of(loaded.model))
    history = search(_Scorer(*tools, shots), ask, settings.facts(), folder / HISTORY_NAME)
    best, on_test = history["best"], _Scorer(*tools, test)
    scores = [on_test(template)["accuracy"] for template in (best["template"], settings.template)]
    result = {"template": best["template"], "accuracy": best["accuracy"]}
    return result | {"test_accuracy": scores[0], "test_accuracy_before": scores[1]}
