"""Every row of docs/methods/index.md is true."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_vlm import PromptedClassifier
from peft_vlm.data.dataset import collate
from peft_vlm.errors import ClassNameError
from peft_vlm.models.towers import towers_of
from peft_vlm.registry import METHODS
from tests.cases import CASES, Case, base_model, class_prompts, images, perturb, prepared, processor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "index.md"


def table() -> dict[str, dict[str, str]]:
    """Cells by method and column."""
    lines = [line.strip().strip("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    found = [dict(zip(header, row, strict=True)) for row in rows]
    return {re.match(r"\[(\w+)\]\(\1\.md\)$", row["method"])[1]: row for row in found}


@pytest.fixture(params=CASES, ids=lambda case: case.method)
def case(request) -> Case:
    return request.param


def adapted(case: Case):
    torch.manual_seed(0)
    model = get_peft_model(base_model(), case.config())
    perturb(model)
    return model


def test_every_method_has_a_row_with_its_page_type_and_paper():
    """A method that is not in the table is not found, and a wrong link leads to another paper."""
    rows = table()
    assert sorted(rows) == sorted(METHODS)
    for name, row in rows.items():
        assert (PAGE.parent / f"{name}.md").is_file()
        assert row["adapter type"] == METHODS[name].adapter
        paper = METHODS[name].paper
        assert row["paper"] == f"[{paper.arxiv_id}]({paper.url})"


def test_the_trained_sides_are_those_with_trainable_tensors(case):
    sides = towers_of(adapted(case)).trained_sides()
    assert table()[case.method]["trained on the side of"].split(", ") == sorted(sides)


def test_the_loss_terms_are_those_of_a_step(case):
    model, dataset = adapted(case), images()
    output = prepared(case, model, dataset)(model.train(), collate([dataset[i] for i in range(0, 24, 3)]))
    assert table()[case.method]["loss terms"].split(", ") == list(output.loss_terms)


def test_what_a_method_needs_is_what_its_objective_asks_for(case):
    need = table()[case.method]["needs"]
    if need == "-":
        METHODS[case.method].objective(class_prompts())
        return
    with pytest.raises((TypeError, ValueError), match=need):
        METHODS[case.method].objective(class_prompts())


def test_new_class_names_are_taken_or_refused(case):
    tools = processor()
    classifier = PromptedClassifier(adapted(case).eval(), tools.tokenizer, tools.image_processor, template="a {}.")
    picture, names = images(per_class=1).image(0), ["quite", "new"]
    if table()[case.method]["new class names"] == "yes":
        assert {p.label for p in classifier.predict(picture, class_names=names)} == set(names)
        return
    with pytest.raises(ClassNameError, match="quite"):
        classifier.predict(picture, class_names=names)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_objective_takes_a_number_that_is_not_finite(case: Case, value: float):
    """Hours later the loss is NaN, or a term has silently won over all others."""
    parameters = inspect.signature(METHODS[case.method].objective).parameters.values()
    numbers = [p.name for p in parameters if "float" in str(p.annotation)]
    both = {"gpa_mean": 1.0, "gpa_std": 1.0} if "gpa_mean" in numbers else {}
    for name in numbers:
        with pytest.raises(ValueError, match=f"`{name}`.* got.*{value}"):
            case.objective(class_prompts(), **(both | {name: value}))
