"""Templates that a language model proposes: the same for the same seed, continued where stopped, never lost."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPProcessor, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peft_vlm.cli import main
from peft_vlm.errors import PeftVLMError
from peft_vlm.experiments.templates import as_template, proposer, question, search
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer

WORDS = ["a", "photo", "of", "the", "drawing", "colour", "<CLASS>", "in", "small", "?", "bright", "[UNK]", "[PAD]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A CLIP, images of four colours, and a random language model of thirteen words."""
    root = tmp_path_factory.mktemp("templates")
    for seed, split in enumerate(("train", "test")):
        for number, row in enumerate(colour_rows(3, classes=4, seed=seed)):
            path = root / "data" / split / colour_names(4)[row["label"]] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    tiny_clip().save_pretrained(root / "clip")
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(root / "clip")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(root / "lm")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=9, bos_token_id=9)
    GPT2LMHeadModel(config).save_pretrained(root / "lm")
    return root


def command(root, output, **settings) -> list[str]:
    own = {"model": root / "clip", "dataset": root / "data", "proposer": root / "lm", "output_dir": output}
    own |= {"template": "a {}.", "shots": 2, "steps": 3, "proposals": 4} | settings
    return ["optimize-template", "--json", *(word for key, value in own.items() for word in (f"--{key}", str(value)))]


def test_a_search_is_the_same_again_and_continues_where_it_stopped(folders, tmp_path, capsys):
    """Three steps at once, and one step with two more in a second call, end in the same file."""
    assert main(command(folders, tmp_path / "whole")) == 0
    result = json.loads(capsys.readouterr().out)
    whole = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert main(command(folders, tmp_path / "parts", steps=1)) == 0
    assert len(json.loads((tmp_path / "parts" / "history.json").read_text())["steps"]) == 2
    assert main(command(folders, tmp_path / "parts")) == 0
    assert json.loads((tmp_path / "parts" / "history.json").read_text()) == whole
    assert [len(step) for step in whole["steps"]][0] == 1
    tried = [one for step in whole["steps"] for one in step]
    assert len(tried) >= 6
    assert len({one["template"] for one in tried}) == len(tried)
    assert all(one["template"].count("{}") == 1 for one in tried)
    scored = [one for one in tried if "accuracy" in one]
    assert whole["best"] == max(scored, key=lambda one: (one["accuracy"], -one["loss"]))
    assert result["template"] == whole["best"]["template"]
    capsys.readouterr()
    assert main(command(folders, tmp_path / "whole", seed=2)) == 2
    assert "no search of other settings" in capsys.readouterr().err
    assert json.loads((tmp_path / "whole" / "history.json").read_text()) == whole


def test_a_model_with_a_chat_template_is_asked_by_it(folders, tmp_path):
    """A chat model that gets a bare text continues it instead of answering."""
    shutil.copytree(folders / "lm", tmp_path / "chat")
    plain = proposer(str(folders / "lm"))("the small photo", 2, 1)
    file = tmp_path / "chat" / "chat_template.jinja"
    file.write_text("{% for message in messages %}{{ message.content }} bright{% endfor %}")
    assert proposer(str(tmp_path / "chat"))("the small photo", 2, 1) == proposer(str(folders / "lm"))(
        "the small photo bright", 2, 1
    )
    assert proposer(str(folders / "lm"))("the small photo", 2, 1) == plain
    assert len(plain) == 2


@pytest.mark.parametrize(
    ("answer", "template"),
    [
        ('"A drawing of a <CLASS>."\nIt is better because', "A drawing of a {}."),
        ("text: the <CLASS> and <CLASS>", "the {} and "),
        ("2. a small {thing}", "a small thing {}."),
        ("3) the <CLASS>", "the {}"),
        ("- <CLASS> texture", "{} texture"),
        ("3D render of a <CLASS>", "3D render of a {}"),
        ("1.5 metres of <CLASS>", "1.5 metres of {}"),
        ("2024 photo", "2024 photo {}."),
        ("\n\n", "{}."),
        ("a \x1b[31mred\x00 <CLASS>", "a [31mred {}"),
    ],
)
def test_an_answer_becomes_a_template(answer, template):
    """One without the place of the class name would give all classes one text."""
    assert as_template(answer) == template


def test_the_question_shows_the_best_in_ascending_order():
    tried = [{"template": f"{n} {{}}", "accuracy": float(n % 50), "loss": 1.0} for n in range(60)]
    lines = [line for line in question(tried, "colours").splitlines() if line.startswith("text: ")]
    assert len(lines) == 30
    assert lines[-1] == "text: 49 <CLASS> accuracy: 49.0 loss: 1.000"
    assert "The images: colours" in question(tried, "colours")


def test_what_cannot_be_scored_stays_in_the_history(tmp_path):
    """A refused template that is forgotten would be proposed and refused for ever."""
    settings = {"template": "a {}", "steps": 2, "proposals": 1, "seed": 1, "about": ""}

    def score(template):
        return {"template": template} | ({"refused": "long"} if "x" in template else {"accuracy": 1.0, "loss": 2.0})

    history = search(score, lambda text, number, seed: ["x <CLASS>"], settings, tmp_path / "h.json")
    assert history["steps"] == [[score("a {}")], [score("x {}")], []]
    assert history["best"]["template"] == "a {}"
    with pytest.raises(PeftVLMError, match="a template to begin with"):
        search(score, lambda *_: [], settings | {"template": "x {}"}, tmp_path / "other.json")


def test_wrong_input_is_a_line(folders, tmp_path, capsys):
    assert main(command(folders, tmp_path / "a", proposer=tmp_path / "none")) == 2
    assert "language model" in capsys.readouterr().err
    assert main(command(folders, tmp_path / "a", proposals=0)) == 2
    assert "`--proposals` of 1 or more, got 0" in capsys.readouterr().err
    assert main(command(folders, tmp_path / "a", template="no place")) == 2
    assert not (tmp_path / "a" / "history.json").exists()
