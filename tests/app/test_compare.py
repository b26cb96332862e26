"""What the app shows, without a browser: bars of zero-shot and adapters, errors in words, right and wrong."""

from collections import Counter

import pytest

import peft_vlm.classifier
from peft_vlm.app.compare import MAX_CLASSES, Answer, TestImages, cards_html, message_html, parse_classes, unique_names
from peft_vlm.classifier import Prediction, PromptedClassifier
from peft_vlm.errors import ClassNameError, DataError
from tests.hostile.test_shown_text import INJECTIONS
from tests.test_classifier import NAMES
from tests.tiny import colour_names, noise_image


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\n dog \r\n\nbee\n", ("cat", "dog", "bee")),
        ("cat, dog,", ("cat", "dog")),
        ("\ncat, dog\n", ("cat", "dog")),
        ("crane, bird\ncrane, machine", ("crane, bird", "crane, machine")),
        ("\n".join(f"class {i}" for i in range(300)), tuple(f"class {i}" for i in range(300))),
    ],
)
def test_class_names_stand_on_lines_or_between_commas(text: str, names: tuple[str, ...]) -> None:
    """Commas inside names must not cut them where every name has its line."""
    assert parse_classes(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n ", "got none"),
        ("cat\ncat", "same name"),
        ("\n".join(map(str, range(MAX_CLASSES + 1))), "at most 1,000 class names, got 1,001"),
        ("a\x1bb\nc", "control character"),
        ("a\n" + "b" * 6000, "at most 5,000 characters"),
    ],
)
def test_a_class_list_that_cannot_be_used_says_why(text: str, message: str) -> None:
    """A list that is quietly shortened would show probabilities over other classes."""
    with pytest.raises(ClassNameError, match=message):
        parse_classes(text)


def test_names_are_short_but_never_equal() -> None:
    """Two runs end in the same word more often than not; one must not hide the other."""
    assert unique_names(["out/a", "user/b"]) == ["a", "b"]
    assert unique_names(["x/seed1", "y/seed1"]) == ["x/seed1", "y/seed1"]
    assert len(set(unique_names(["x", "x"]))) == 2


def test_zero_shot_stands_beside_the_adapter_with_the_labels_of_predict(app_adapter, comparison) -> None:
    """The app must show what the library says, for each with the adapter's template."""
    image, classes = noise_image(30, 20), ["cat", "bee", "a fox"]
    adapter = PromptedClassifier.from_pretrained(app_adapter, device="cpu")
    base = adapter.model.get_base_model().name_or_path
    alone = PromptedClassifier.from_pretrained(None, base_model=base, device="cpu")
    first, second = comparison.answers(image, classes)
    assert comparison.class_names == tuple(NAMES)
    assert (first.name, first.is_base, second.is_base) == ("zero-shot", True, False)
    assert list(first.predictions) == alone.predict(image, class_names=classes)
    assert list(second.predictions) == adapter.predict(image, class_names=classes)
    assert first.predictions != second.predictions
    in_other_words = comparison.answers(image, classes, template="art of the {}")[1]
    assert list(in_other_words.predictions) == adapter.predict(image, class_names=classes, template="art of the {}")
    assert in_other_words.predictions != second.predictions
    assert len(comparison.answers(image, classes, names=[])) == 1


def test_class_features_are_computed_once_per_list_and_template(comparison, monkeypatch) -> None:
    """Computed again for every image, 300 classes would take seconds a drop."""
    counts = Counter()
    original = peft_vlm.classifier.encode_classes

    def counting(model, prompts, **options):
        counts[prompts.class_names, prompts.templates] += 1
        return original(model, prompts, **options)

    monkeypatch.setattr(peft_vlm.classifier, "encode_classes", counting)
    lists = (["u", "v"], ["w", "x"])
    for _ in range(3):
        for classes in lists:
            for template in ("one {}", "two {}"):
                comparison.answers(noise_image(30, 20), classes, template=template)
    assert len(counts) == 4
    assert set(counts.values()) == {2}, "once for the base model, once for the adapter"


def test_wrong_input_is_an_error_of_each_card_and_a_bad_file_one_of_all(comparison, tmp_path) -> None:
    """An adapter that cannot take a template must not take the answers of the others with it."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="the image"):
        comparison.answers(str(bad), ["a", "b"])
    answers = comparison.answers(noise_image(30, 20), ["a", "b"], template="no place")
    assert all("exactly once" in answer.error and not answer.predictions for answer in answers)
    long = comparison.answers(noise_image(30, 20), ["a", "word " * 900])
    assert all(answer.error for answer in long)
    many = comparison.answers(noise_image(30, 20), [f"class {i}" for i in range(300)])
    assert all(len(answer.predictions) == 5 for answer in many)


@pytest.mark.parametrize("text", [*INJECTIONS.values(), "${alert(1)}", "{{constructor}}", '" onload="x', "' x='"])
def test_names_of_strangers_stay_text_in_the_page(text: str) -> None:
    """A class name out of an adapter's folder would otherwise run in the browser of whoever opens it."""
    answer = Answer(text, (Prediction(text, 0.5),), note=text, text=text)
    for shown in (
        cards_html([answer, Answer(text, error=text)]),
        message_html(text),
        message_html(text, is_error=True),
    ):
        bare = shown
        for own in ("div", "section", "h4", "p", "span"):
            bare = bare.replace(f"</{own}>", "").replace(f"<{own}>", "").replace(f"<{own} ", "")
        assert "<" not in bare
        assert "${" not in shown
        assert "{{" not in shown
        assert not {name for name in ("onload", "onerror") if f'" {name}=' in shown}


def test_right_and_wrong_are_those_of_the_evaluation_and_computed_once(comparison, labelled: TestImages) -> None:
    """A mark beside the wrong image would be believed."""
    name, classifier = next(iter(comparison.adapters.items()))
    result = labelled.result(name, classifier)
    assert result.num_images == len(labelled.dataset)
    assert labelled.result(name, classifier) is result
    captions = labelled.captions(result)
    assert len(captions) == len(labelled.examples)
    said = [p.label for row in classifier.predict(
        [labelled.image(i) for i in range(len(captions))], class_names=labelled.dataset.class_names, top_k=1
    ) for p in row]  # fmt: skip
    true = [labelled.dataset.class_names[labelled.dataset.labels[place]] for place in labelled.examples]
    for caption, label, right in zip(captions, said, true, strict=True):
        assert caption == (f"\u2713 {right}" if label == right else f"\u2717 {label} (is {right})")
    assert set(true) == set(labelled.dataset.class_names) <= set(colour_names())
