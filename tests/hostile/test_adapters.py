"""Adapter folders of strangers: refused with one line, before memory is asked for and without a request."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import check_weights, read_config
from peft_vlm.classifier import PromptedClassifier
from peft_vlm.errors import ClassNameError, PeftVLMError
from peft_vlm.evaluation.run import load_model
from peft_vlm.files import CLASSES_NAME, CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME
from peft_vlm.registry import ADAPTERS
from tests import forked
from tests.cases import ADAPTER_CASES, base_model
from tests.hostile.attack import Attack, check_refusal, little_memory, no_connections, outcomes, table
from tests.hostile.folders import both, change, each, linked, piped, tensors, without, written
from tests.tiny import noise_image

BIG = 10**8
ENDLESS = "(a+)+b"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OUT = "read from its own folder only"


def header(values: dict, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + data


#: Made from the CoOp adapter, whose one tensor is the shortest to change.
ATTACKS = table(
    Attack("no-weights", without(WEIGHTS_NAME), OUT),
    Attack("no-config", without(CONFIG_NAME), "Expected 'adapter_config.json'"),
    Attack("weights-linked-out", linked(WEIGHTS_NAME, "/etc/hostname"), OUT),
    Attack("config-linked-out", linked(CONFIG_NAME, "/etc/hostname"), OUT),
    Attack("config-linked-to-itself", linked(CONFIG_NAME, CONFIG_NAME), "adapter_config.json"),
    Attack("config-is-a-pipe", piped(CONFIG_NAME), "to be a file, got something else"),
    Attack("weights-are-a-pipe", piped(WEIGHTS_NAME), "to be a file, got something else"),
    Attack("weights-are-a-folder", both(without(WEIGHTS_NAME), lambda f: (f / WEIGHTS_NAME).mkdir()), "got something"),
    Attack("pickled-weights", both(without(WEIGHTS_NAME), written("adapter_model.bin", b"\x80\x02.")), OUT),
    *(
        Attack(f"classes-from-{name!r}", change(class_names_file=name), "`class_names_file` to be 'class_names.txt'")
        for name in ("/etc/hostname", "../other", "sub/class_names.txt", "..", "a\0b", WEIGHTS_NAME, "")
    ),
    Attack("no-classes-file", change(class_names_file=CLASSES_NAME), "Expected 'class_names.txt' beside"),
    Attack(
        "classes-linked-out",
        both(change(class_names_file=CLASSES_NAME), linked(CLASSES_NAME, "/etc/hostname")),
        OUT,
    ),
    Attack("classes-are-a-pipe", both(change(class_names_file=CLASSES_NAME), piped(CLASSES_NAME)), "got something"),
    Attack(
        "classes-not-text",
        both(change(class_names_file=CLASSES_NAME), written(CLASSES_NAME, b"\xff\xfe\x00")),
        "Expected class names, one a line",
    ),
    Attack(
        "a-base-parameter-as-saved-module",
        both(
            change(modules_to_save=["logit_scale"]),
            tensors(lambda t: t.update({"base_model.model.logit_scale": torch.tensor(9.0)})),
        ),
        "by the configuration",
    ),
    Attack(
        "a-base-parameter-as-part-of-a-saved-module",
        both(
            change(modules_to_save=["logit_scale"]),
            tensors(
                lambda t: t.update({f"base_model.model.logit_scale{end}": torch.tensor(9.0) for end in ("", ".a")})
            ),
        ),
        "`modules_to_save`, got 'logit_scale', which is no module",
    ),
    Attack(
        "a-base-layer-as-a-tensor",
        tensors(lambda t: t.update({"base_model.model.visual_projection.weight": torch.zeros(16, 32)})),
        "unknown",
    ),
    Attack("saved-modules-not-there", change(modules_to_save=["nothing"]), "by the configuration, got 'no tensor'"),
    Attack("saved-modules-a-pattern", change(modules_to_save=[ENDLESS]), "names of modules in `modules_to_save`"),
    Attack("saved-modules-everything", change(modules_to_save=[""]), "names of modules in `modules_to_save`"),
    Attack("endless-exclusion", change(exclude_modules=ENDLESS), "`exclude_modules`=None"),
    Attack("listed-exclusion", change(exclude_modules=["q_proj"]), "`exclude_modules`=None"),
    Attack("endless-target", change(target_modules=ENDLESS), "chooses its modules"),
    Attack("other-target", change(target_modules=".*"), "chooses its modules"),
    Attack("task-type", change(task_type="SEQ_CLS"), "`task_type`=None"),
    Attack("nan", each(lambda t: t * float("nan")), "coop_prompt"),
    Attack("one-infinity", each(lambda t: t.index_fill(1, torch.tensor([0]), float("inf"))), "finite numbers in"),
    *(
        Attack(f"weights-of-{kind}", each(lambda t, kind=kind: t.to(kind)), "floating-point numbers in")
        for kind in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
    ),
    Attack("a-tensor-more", tensors(lambda t: t.update({"other": torch.zeros(1)})), "unknown 'other'"),
    Attack("no-tensors", tensors(lambda t: t.clear()), "got 'no tensor'"),
    Attack("an-escape-in-a-name", tensors(lambda t: t.update({"\x1b[2J\n": torch.zeros(1)})), "unknown '\\x1b"),
    Attack("flat-tensor", each(lambda t: t.flatten()), "by the configuration"),
    Attack("negative-token-ids", change(context_init_ids=[-1, -2]), "token ids of 0 or more"),
    Attack("token-ids-beyond-the-vocabulary", change(context_init_ids=[BIG]), "`context_init_ids` below"),
    Attack("negative-placeholder", change(placeholder_id=-5), "token ids of 0 or more"),
    *(
        Attack(f"{name}-is-{value!r}", change(**{name: value}), f"Expected `{name}` to be")
        for name, value in (
            ("num_text_tokens", "3"),
            ("num_text_tokens", True),
            ("num_text_tokens", None),
            ("context_init_ids", 3),
            ("context_init_ids", ["a"]),
            ("class_names", "cat"),
            ("class_names", [1]),
            ("class_names", {"a": 1}),
            ("template", 5),
            ("template", [["{}"]]),
            ("image_mean", ["0.5"]),
            ("image_mean", [10**400]),
            ("image_size", [1.5]),
            ("base_architecture", []),
            ("format_version", "1"),
            ("format_version", 1.0),
            ("format_version", None),
            ("peft_vlm_version", 3),
            ("base_model_name_or_path", ["a"]),
            ("revision", 3),
            ("inference_mode", "yes"),
            ("init_weights", 1),
            ("auto_mapping", "os"),
            ("modules_to_save", "logit_scale"),
            ("target_modules", {"a": 1}),
        )
    ),
    *(
        Attack(f"config-{number}", written(CONFIG_NAME, text), message)
        for number, (text, message) in enumerate(
            (
                (b"", "Expected JSON"),
                (b"[1]", "Expected names and values"),
                (b"null", "Expected names and values"),
                (b'"text"', "Expected names and values"),
                (b"\xff\xfe", "Expected JSON"),
                (b"[" * 200_000, "nested too deeply"),
                (b'{"a":' * 100_000, "nested too deeply"),
                (b'{"peft_type": "COOP", "num_text_tokens": ' + b"9" * 5000 + b"}", "Expected JSON"),
                (b" " * (2**24 + 1), "at most 16,777,216 bytes"),
                (b'{"peft_type": "NOTHING"}', "`peft_type`"),
                (b'{"peft_type": ["COOP"]}', "`peft_type`"),
                (b'{"peft_type": "\\u001b[2J"}', "`peft_type`"),
                (b"{}", "`peft_type`"),
            )
        )
    ),
    Attack("nan-mean", change(image_mean=[float("nan")] * 3), "Expected `image_mean` to be"),
    Attack("newer-format", change(format_version=10**30), "Install a newer release"),
    *(
        Attack(f"weights-are-{name}", written(WEIGHTS_NAME, content), "Expected a complete safetensors file")
        for name, content in (
            ("empty", b""),
            ("seven-bytes", b"1234567"),
            ("endless-header", b"\xff" * 8 + b"{}"),
            ("long-header", (2**40).to_bytes(8, "little") + b"{}"),
            ("no-json", (4).to_bytes(8, "little") + b"abcd"),
            ("deep", (100_000).to_bytes(8, "little") + b"[" * 100_000),
            ("overlapping", header({"a": ONE, "b": ONE}, b"1234")),
            (
                "larger-than-the-file",
                header({"a": ONE | {"shape": [BIG, BIG]}}, b"1234"),
            ),
            ("shorter-than-it-says", header({"a": ONE | {"shape": [2], "data_offsets": [0, 8]}}, b"1234")),
            ("with-a-negative-size", header({"a": ONE | {"shape": [-1]}}, b"1234")),
        )
    ),
)


def load(folder: Path) -> None:
    """What `peft-vlm predict` and the library do first."""
    load_model(folder, device="cpu")


def load_by_peft(folder: Path) -> None:
    """PEFT's own call, which knows nothing of this package's loading."""
    PeftModel.from_pretrained(base_model(), str(folder))


BY_PEFT = ["no-weights", "weights-linked-out", "nan", "a-base-parameter-as-saved-module"]


@pytest.fixture(scope="module")
def folders(sound, tmp_path_factory):
    """A folder per attack."""
    made = {}
    for number, (name, attack) in enumerate(ATTACKS.items()):
        made[name] = Path(shutil.copytree(sound / "coop", tmp_path_factory.mktemp("attack") / str(number)))
        attack.make(made[name])
    return made


@pytest.fixture(scope="module")
def by_us(folders, tmp_path_factory):
    """What came of each attack."""
    return outcomes(__name__, "load", folders, tmp_path_factory.mktemp("log") / "log")


@pytest.fixture(scope="module")
def by_peft(folders, tmp_path_factory):
    """The same for those whose way through PEFT's own call is another one."""
    some = {name: folders[name] for name in BY_PEFT}
    return outcomes(__name__, "load_by_peft", some, tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_adapter_is_refused(by_us, name):
    """A traceback, a request or 10 GB are what a stranger wants."""
    assert not by_us[name]


@pytest.mark.parametrize("name", BY_PEFT)
def test_pefts_own_call_refuses_it_as_well(by_peft, name):
    """Otherwise `PeftModel.from_pretrained` completes the folder from the Hub, with the user's token."""
    assert not by_peft[name]


#: Integer settings that no attack can make large: identifiers, which the base model replaces or bounds, and a seed.
IDENTIFIERS = {"placeholder_id", "format_version", "num_class_names", "noise_seed"}


def sizes_of(adapter: str) -> list[str]:
    """Settings of an adapter type that are whole numbers, and so may be sizes."""
    settings = ADAPTERS[adapter].config.__dataclass_fields__.values()
    return [field.name for field in settings if "int" in str(field.type) and "list" not in str(field.type)]


SIZES = [(case.adapter, name) for case in ADAPTER_CASES for name in sizes_of(case.adapter) if name not in IDENTIFIERS]


def load_large(folders: list[str]) -> None:
    """Load adapters with one setting of 10**8 each."""
    for folder in map(Path, folders):
        with little_memory(), no_connections():
            check_refusal(lambda path=folder: load(path), PeftVLMError, "xpected")
        with little_memory(), no_connections():
            check_refusal(lambda path=folder: load_by_peft(path), ValueError, "xpected")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_setting_asks_for_memory_before_the_file_is_looked_at(sound, tmp_path, adapter):
    """`num_vision_tokens=10**8` asks for 64 GB; a new setting of a new method is tried without being listed."""
    folders = []
    for name in (name for kind, name in SIZES if kind == adapter):
        folders.append(shutil.copytree(sound / adapter, tmp_path / name))
        change(**{name: BIG} | ({"border": 0, "shape": "full"} if name == "canvas_size" else {}))(folders[-1])
    forked.run(tmp_path / "log", load_large, list(map(str, folders)))


def test_sizes_are_found():
    """A test over nothing passes."""
    assert len(SIZES) >= 15
    assert {"canvas_size", "num_vision_tokens", "class_dim", "num_classes", "start_layer"} <= {
        name for _, name in SIZES
    }


def lora_tensors(**values: torch.Tensor):
    """More tensors in the file of a LoRA, below the base model."""
    return tensors(lambda t: t.update({f"base_model.model.{name}": value for name, value in values.items()}))


#: Made from a LoRA of PEFT's own.
FOREIGN = table(
    *(
        Attack(f"{field}-{number}", change(**{field: pattern}), "can take for ever")
        for field in ("target_modules", "exclude_modules")
        for number, pattern in enumerate((ENDLESS, "(a|a)*b", ".*.*.*.*.*x", "a" * 2000, r"(\\w+\\.)*q_proj"))
    ),
    *(
        Attack(f"{field}-by-pattern", change(**{field: {ENDLESS: 2}}), "can take for ever")
        for field in ("rank_pattern", "alpha_pattern")
    ),
    Attack("endless-layers", change(layers_to_transform=[0], layers_pattern=[ENDLESS]), "can take for ever"),
    Attack("saved-modules-a-pattern", change(modules_to_save=[ENDLESS]), "names of modules"),
    Attack("saved-modules-no-text", change(modules_to_save=[1]), "names of modules"),
    Attack("rank", change(r=BIG), "100000000 x any by the configuration"),
    Attack("rank-by-pattern", change(rank_pattern={"q_proj": BIG}), "a tensor of size `rank_pattern`=100000000"),
    Attack("rank-of-another-type", change(peft_type="LOHA", r=BIG), "which would replace"),
    Attack("a-module-of-python", change(megatron_config={"a": 1}, megatron_core="antigravity"), "would be imported"),
    Attack("more-layers", change(layer_replication=[[0, 2]] * 1000), "repeats layers of the base model"),
    Attack("other-adapters", change(peft_type="XLORA", adapters={"a": "owner/name"}), "names further adapters"),
    Attack("another-model", change(peft_type="SHADOW", shadow_model="owner/name"), "Expected"),
    Attack(
        "another-tokenizer",
        change(peft_type="PROMPT_TUNING", tokenizer_name_or_path="owner/name"),
        "Expected",
    ),
    *(Attack(f"type-{kind}", change(peft_type=kind), "adapter") for kind in map(str.upper, (
        "prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning", "adaption_prompt", "cpt", "xlora",
    ))),
    Attack("a-base-parameter", lora_tensors(logit_scale=torch.tensor(9.0)), "replace a parameter of the base model"),
    Attack(
        "a-base-layer", lora_tensors(**{"visual_projection.weight": torch.zeros(16, 32)}), "replace a parameter"
    ),
    Attack(
        "a-base-parameter-as-saved-module",
        both(change(modules_to_save=["logit_scale"]), lora_tensors(logit_scale=torch.tensor(9.0))),
        "replace a parameter",
    ),
    Attack("an-embedding", lora_tensors(**{"embeddings.token_embedding.weight": torch.zeros(9, 9)}), "replace"),
    Attack("nan", each(lambda t: t * float("nan")), "Expected finite numbers in"),
    Attack("integers", each(lambda t: t.to(torch.int8)), "floating-point numbers in"),
    Attack("no-weights", without(WEIGHTS_NAME), OUT),
    Attack("weights-linked-out", linked(WEIGHTS_NAME, "/etc/hostname"), OUT),
    *(
        Attack(f"{name}-is-{value!r}", change(**{name: value}), "again")
        for name, value in (
            ("r", "2"), ("r", -1), ("r", 0), ("r", [2]), ("target_modules", 5), ("target_modules", [["a"]]),
            ("target_modules", None), ("lora_dropout", "x"), ("bias", 3), ("modules_to_save", "x"),
            ("rank_pattern", 3), ("init_lora_weights", "nothing"), ("layers_to_transform", "x"),
        )
    ),
    *(
        Attack(f"facts-{number}", written(FACTS_NAME, text), "xpected")
        for number, text in enumerate(
            (
                b"", b"[]", b"3", b"\xff", b"[" * 10**5, b" " * (2**24 + 1), b'{"class_names": "cat"}',
                b'{"class_names": [1]}', b'{"template": 5}', b'{"image_mean": [NaN, 1, 1]}',
                b'{"format_version": "1"}',
                b'{"base_architecture": []}', b'{"value_range": "x"}',
            )
        )
    ),
    Attack("facts-are-a-pipe", piped(FACTS_NAME), "got something else"),
    Attack("facts-linked-out", linked(FACTS_NAME, "/etc/hostname"), OUT),
)  # fmt: skip


def load_to_predict(folder: Path) -> None:
    """The class names of an adapter are looked at when it classifies."""
    PromptedClassifier.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def foreign(sound, tmp_path_factory):
    """What came of each attack on an adapter of PEFT's own."""
    made = {}
    for number, (name, attack) in enumerate(FOREIGN.items()):
        made[name] = Path(shutil.copytree(sound / "lora", tmp_path_factory.mktemp("foreign") / str(number)))
        attack.make(made[name])
    log = tmp_path_factory.mktemp("log") / "log"
    return outcomes(__name__, "load_to_predict", made, log, attacks="FOREIGN")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_strangers_lora_is_refused(foreign, name):
    """PEFT imports what a configuration names, and loads tensors over those of the base model."""
    assert not foreign[name], foreign[name][-600:]


@pytest.mark.parametrize("pattern", [r".*\\.(q_proj|v_proj)", ["q_proj"], r"^(?!.*text).*q_proj.*$"])
def test_ordinary_patterns_of_pefts_own_methods_are_not(copy_of, pattern):
    """What LoRA adapters have in their configuration."""
    folder = copy_of("lora")
    if isinstance(pattern, str):
        both(change(target_modules=pattern), tensors(lambda t: None))(folder)
    read_config(folder)
    check_weights(AdapterSource.find(folder), read_config(folder))


@pytest.mark.parametrize("values", [{"template": "x" * 10**6 + "{}"}, {"class_names": ["x" * 10**6, "y"]}])
def test_texts_that_no_tower_reads_are_not_tokenised(copy_of, values):
    """A tokenizer takes 20 seconds for a million letters without a space."""
    folder = copy_of("coop")
    change(**values)(folder)
    check_refusal(lambda: load_to_predict_an_image(folder), ClassNameError, "at most 5,000 characters")


def load_to_predict_an_image(folder: Path) -> None:
    """Templates are filled when an image is classified."""
    PromptedClassifier.from_pretrained(folder, device="cpu").predict(noise_image(9, 9))


@pytest.mark.parametrize("case", ADAPTER_CASES, ids=lambda case: case.adapter)
def test_a_sound_adapter_still_loads(copy_of, case):
    """The folder that the attacks begin from; also as a snapshot of a Hub's cache, whose files are links."""
    folder = copy_of(case.adapter)
    loaded = load_model(folder, device="cpu")
    snapshot, blobs = folder.parent / "cache" / "snapshots" / "abc", folder.parent / "cache" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    again = load_model(snapshot, device="cpu")
    state = loaded.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_links_inside_the_folder_are_followed(copy_of):
    """A user may have two names for one file."""
    folder = copy_of("coop")
    (folder / WEIGHTS_NAME).rename(folder / "real.safetensors")
    (folder / WEIGHTS_NAME).symlink_to("real.safetensors")
    names = PromptedClassifier.from_pretrained(folder, device="cpu").predict(noise_image(9, 9), top_k=2)
    assert len(names) == 2
