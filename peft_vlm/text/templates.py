"""Prompt templates: one `{}` that the class name replaces."""

from peft_vlm.errors import ClassNameError

#: Seven prompts that OpenAI found to do almost as well on ImageNet as its list of 80 (notebook
#: `Prompt_Engineering_for_ImageNet.ipynb` of openai/CLIP). Average their features: pass the tuple as the template.
IMAGENET_ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def check_template(template: str) -> None:
    """Refuse a template that does not have its place for the class name.

    Args:
        template: Text with `{}`.

    Raises:
        ClassNameError: If `{}` is not there exactly once.
    """
    count = template.count("{}")
    if count != 1:
        raise ClassNameError(
            f"Expected `{{}}` exactly once in the template, got {template!r} with {count}. "
            "Write it where the class name goes, as in 'a photo of a {}.'."
        )


def readable(class_name: str) -> str:
    """The class name as a text shows it: underscores become spaces, outer and doubled spaces go away."""
    return " ".join(class_name.replace("_", " ").split())


def fill(template: str, class_name: str) -> str:
    """Put a class name into a template.

    Args:
        template: Text with `{}` exactly once; other braces stay as they are.
        class_name: Underscores become spaces, as in CoOp's code.

    Returns:
        The prompt, for example `"a photo of a golden retriever."`.

    Raises:
        ClassNameError: If `{}` is not there exactly once.
    """
    check_template(template)
    return template.replace("{}", readable(class_name))
