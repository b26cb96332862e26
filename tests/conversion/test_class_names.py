"""Names read off the token embeddings of official files: their spelling, and how they are found again."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, PromptKDConfig
from peft_vlm.conversion.formats import convert, export
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.errors import ClassNameError, PeftVLMWarning
from peft_vlm.evaluation.run import load_model
from peft_vlm.text import encode_classes
from peft_vlm.text.prompts import ClassPrompts, places_of
from tests.cases import NUM_CLASSES, images, promptkd_config
from tests.source_tree import ROOT
from tests.tiny import tiny_clip

STUDENT = ROOT / "examples" / "assets" / "clip_student"
#: Names of the benchmarks of this field, and what a file's tokens say of them: no capitals, no spaces around digits.
SPELLED = {
    "golden retriever": "golden retriever",
    "Dr. No!": "dr. no!",
    "A300B4": "a300b4",
    "747-400": "747-400",
    "Boeing 747": "boeing 747",
    "2012 BMW 3 Series": "2012 bmw 3 series",
    "F-16A/B": "f-16a/b",
    "DHC-8-100": "dhc-8-100",
    "jack-o'-lantern": "jack-o'-lantern",
    "children's hospital": "children's hospital",
    "balloon (toy)": "balloon (toy)",
    "ladybug, lady beetle": "ladybug, lady beetle",
    "what? yes!": "what? yes!",
    "No. 5": "no. 5",
    "3.5 litre": "3.5 litre",
    "Audi S5 Coupe": "audi s5 coupe",
    "black & white": "black & white",
    "forget_me_not": "forget me not",
}


def written(names, folder):
    """An official CoOp file of the bundled CLIP with the class prompts of these names."""
    loaded = load_model(base_model=STUDENT, device="cpu")
    config = CoOpConfig(num_text_tokens=2, class_names=list(names), template="{}.")
    export(get_peft_model(loaded.model, config), folder / "model.pth.tar-1", tokenizer=loaded.tokenizer)
    return folder / "model.pth.tar-1"


def test_names_of_the_benchmarks_are_read_with_their_punctuation_and_digits(tmp_path):
    """A name that nobody would write goes into the adapter, and no list of classes holds it."""
    file = written(SPELLED, tmp_path)
    with pytest.warns(PeftVLMWarning, match="may be spelled otherwise, such as 'dr. no!'. Pass the class names"):
        report = convert(file, tmp_path / "a", base_model=STUDENT, class_position="end")
    assert len(SPELLED) > 15
    assert report.config.class_names == list(SPELLED.values())


def test_the_given_spelling_is_kept_where_its_tokens_are_those_of_the_file(tmp_path, recwarn):
    names = [name for name in SPELLED if "_" not in name]
    file = written(names, tmp_path)
    settings = {"base_model": STUDENT, "class_position": "end"}
    report = convert(file, tmp_path / "a", class_names=names, **settings)
    assert report.config.class_names == names
    assert not [w for w in recwarn if issubclass(w.category, PeftVLMWarning)]
    with pytest.raises(ClassNameError, match=r"got 'Dr. Yes!' for class 1, where .* has"):
        convert(file, tmp_path / "b", class_names=[names[0], "Dr. Yes!", *names[2:]], **settings)


def test_plain_words_need_no_warning(tmp_path, recwarn):
    file = written(["golden retriever", "cat"], tmp_path)
    convert(file, tmp_path / "a", base_model=STUDENT, class_position="end")
    assert not [w for w in recwarn if issubclass(w.category, PeftVLMWarning)]


def test_two_numbers_are_one_in_the_file_and_found_all_the_same(tmp_path):
    """The tokens of "06 2012" and "062012" are equal: no rule can tell them apart."""
    file = written(["06 2012"], tmp_path)
    with pytest.warns(PeftVLMWarning, match="'062012'"):
        report = convert(file, tmp_path / "a", base_model=STUDENT, class_position="end")
    assert report.config.class_names == ["062012"]
    assert places_of(["06 2012"], ["cat", "062012"]) == [1]


def test_names_are_one_for_us_only_if_they_are_one_for_the_tokenizer():
    """A rule of our own for equal names must not be wider than the model's."""
    tokenizer = load_model(base_model=STUDENT, device="cpu").tokenizer
    names = [*SPELLED, "dr . no !", "a 300 b 4", "jack o lantern", "childrens hospital", "BMW", "b m w", "3 .5 litre"]
    count = 0
    for first in names:
        for second in names:
            ids = [
                tokenizer(name.replace("_", " "), add_special_tokens=False)["input_ids"] for name in (first, second)
            ]
            assert (places_of([first], [second]) == [0]) == (ids[0] == ids[1]), (first, second)
            count += 1
    assert count > 500


def test_the_exact_spelling_wins_and_nothing_is_given_twice():
    assert places_of(["Dr. No!", "dr . no !"], ["dr . no !", "Dr. No!"]) == [1, 0]
    assert places_of(["dr. no!", "DR. NO!"], ["Dr. No!"]) == [0, None]
    assert places_of(["dr. no!"], ["Dr. No!", "dr . no !"]) == [None]
    assert places_of(["cat", "golden_retriever"], ["golden retriever", "dog"]) == [None, 0]


def test_a_student_finds_its_classes_under_another_spelling():
    """PromptKD stores vectors by name; a converted teacher's names are those of a file."""
    torch.manual_seed(0)
    names = ["dr. no!", "a300b4", "red", "green", "blue", "black"]
    model = get_peft_model(tiny_clip(), promptkd_config(class_names=names)).eval()
    assert isinstance(model.active_peft_config, PromptKDConfig)
    ids = torch.zeros(3, 4, dtype=torch.long)
    vectors = encode_classes(model, ClassPrompts(("Blue", "A300B4", "Dr. No!"), ("{}.",), ids))
    own = encode_classes(model, ClassPrompts(tuple(names), ("{}.",), torch.zeros(6, 4, dtype=torch.long)))
    assert_close(vectors, own[[4, 1, 0]], rtol=0, atol=0)
    with pytest.raises(ClassNameError, match="the first is 'Dr. Who!'"):
        encode_classes(model, ClassPrompts(("Dr. Who!",), ("{}.",), ids[:1]))


def test_a_dataset_finds_the_classes_of_an_adapter_under_another_spelling():
    data = images(per_class=1)
    moved = data.with_class_names(("Blue", *reversed(data.class_names[:4]), "PURPLE"))
    assert isinstance(moved, ImageClassificationDataset)
    assert [moved.class_names[label] for label in moved.labels] == [
        "red",
        "orange",
        "yellow",
        "green",
        "Blue",
        "PURPLE",
    ]
    assert len(moved.labels) == NUM_CLASSES
