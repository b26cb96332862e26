"""Checkpoints of strangers: nothing in them runs, and nothing in them is larger than the file."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from peft_vlm.conversion.clip import convert_clip
from peft_vlm.conversion.official_file import read_checkpoint
from peft_vlm.errors import AdapterError
from tests import forked
from tests.hostile.attack import Attack, check_refusal, little_memory, outcomes, table

NAME = "model.pth.tar-50"
BIG = 10**9
FAILED = "cannot be read"
SAFE = "could run code"


def saved(content, **options):
    """Write a file with `torch.save`."""
    return lambda folder: torch.save(content() if callable(content) else content, folder / NAME, **options)


def raw(data: bytes):
    """Write bytes."""
    return lambda folder: (folder / NAME).write_bytes(data) and None


def pickled(*parts: bytes):
    """A file of `torch.save` whose pickle is made by hand."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / NAME, "w") as archive:
            archive.writestr("model/data.pkl", b"\x80\x02" + b"".join(parts) + b".")
            archive.writestr("model/version", b"3\n")
            archive.writestr("model/byteorder", b"little")

    return make


def bomb(folder: Path) -> None:
    """A file whose tensor data unpack to 4 GB."""
    torch.save({"ctx": torch.zeros(1000)}, folder / "small")
    with zipfile.ZipFile(folder / "small") as small, zipfile.ZipFile(folder / NAME, "w") as archive:
        for entry in small.infolist():
            if "/data/" not in entry.filename:
                archive.writestr(entry, small.read(entry))
        with archive.open(zipfile.ZipInfo("small/data/0"), "w", force_zip64=True) as file:
            pass
    with zipfile.ZipFile(folder / NAME, "a", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb", "w", force_zip64=True) as file:
            for _ in range(150):
                file.write(b"\0" * 10**6)


def stored_twice(folder: Path) -> None:
    """Two names for the bytes of one tensor, a hundred times."""
    tensor = torch.zeros(10**6)
    torch.save({f"image_encoder.transformer.resblocks.{n}.VPT_shallow": tensor for n in range(100)}, folder / NAME)


def sparse():
    """A tensor of 10**18 numbers in a few bytes."""
    return {"ctx": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (BIG, BIG))}


def quantised():
    """A tensor of integers with a scale."""
    return {"ctx": torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)}


def nested():
    """A list that is 2**60 long when it is printed."""
    value = ()
    for _ in range(60):
        value = (value, value)
    return {"ctx": value}


class Runs:
    """Runs a command when it is unpickled the ordinary way."""

    def __reduce__(self):
        return os.system, ("touch /tmp/peft-vlm-was-here",)


ATTACKS = table(
    Attack("empty", raw(b""), FAILED),
    Attack("text", raw(b"hello"), SAFE),
    Attack("cut-archive", raw(b"PK\x03\x04" + b"\0" * 40), FAILED),
    Attack("archive-of-nothing", raw(b"PK\x05\x06" + b"\0" * 18), FAILED),
    Attack("a-command", saved({"ctx": Runs()}), SAFE),
    Attack("a-command-in-an-old-file", saved({"ctx": Runs()}, _use_new_zipfile_serialization=False), SAFE),
    Attack("a-command-as-an-optimizer", pickled(b"ctorch.optim.os\nsystem\nX\x02\0\0\0ls\x85R"), ""),
    Attack("plain-pickle", raw(pickle.dumps(Runs())), SAFE),
    Attack("a-bomb", bomb, "unpacks to at most"),
    Attack("stride-0", saved({"ctx": torch.ones(1).expand(BIG)}), "which repeats what is stored"),
    Attack("stride-0-inside", saved({"state_dict": {"ctx": torch.ones(4, 1).expand(4, BIG)}}), "repeats"),
    Attack("overlapping", saved({"ctx": torch.ones(100).as_strided((50, 50), (1, 1))}), "which repeats"),
    Attack("one-storage-for-all", stored_twice, "which repeats what is stored"),
    Attack("sparse", saved(sparse), "plain tensors"),
    Attack("quantised", saved(quantised), "plain tensors"),
    Attack("complex", saved({"ctx": torch.ones(2, dtype=torch.complex64)}), "plain tensors"),
    Attack("meta", saved({"ctx": torch.empty(BIG, BIG, device="meta")}), ""),
    Attack("values-that-explode", saved(nested), "mapping of names to tensors"),
    Attack("keys-that-are-numbers", saved({1: torch.ones(1)}), "mapping of names to tensors"),
    Attack("keys-with-escapes", saved({"\x1b[2J\n": 1}), "'\\x1b[2J\\n'"),
    Attack("a-list", saved([torch.ones(1)]), "mapping of names to tensors"),
    Attack("a-number", saved(3), "mapping of names to tensors"),
    Attack("nested-deeply", pickled(b"]" * 300_000 + b"a" * 299_999), ""),
    Attack("a-long-number", pickled(b"\x8b" + (2**20).to_bytes(4, "little") + b"\1" * 2**20), ""),
    Attack("a-text-that-is-not-there", pickled(b"X" + (2**31 - 1).to_bytes(4, "little") + b"a"), ""),
    Attack("a-storage-that-is-not-there", raw(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), FAILED),
    Attack("a-module-that-holds-itself", pickled(b"c__torch__.X\nX\n)\x81q\0}X\1\0\0\0ah\0sb"), "mapping of names"),
    Attack("unknown-persistent-id", pickled(b"X\x01\0\0\0aQ"), ""),
    Attack("an-empty-stack", pickled(b"0000"), ""),
)


def read(folder: Path) -> None:
    """What every converter does first."""
    read_checkpoint(folder / NAME)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of each attack."""
    folders = {name: tmp_path_factory.mktemp("attack") for name in ATTACKS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about the kinds of tensors that nobody should use
        for name, folder in folders.items():
            ATTACKS[name].make(folder)
    return outcomes(__name__, "read", folders, tmp_path_factory.mktemp("log") / "log")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_checkpoint_is_refused(results, name):
    """Conversion reads files that somebody put on the net."""
    assert not results[name]
    assert not Path("/tmp/peft-vlm-was-here").exists()


def openai_clip() -> dict[str, torch.Tensor]:
    """The names that a CLIP of OpenAI has, with one layer."""
    layer = {
        "attn.in_proj_weight": (192, 64),
        "attn.in_proj_bias": (192,),
        "attn.out_proj.weight": (64, 64),
        "attn.out_proj.bias": (64,),
        "ln_1.weight": (64,),
        "ln_1.bias": (64,),
        "ln_2.weight": (64,),
        "ln_2.bias": (64,),
        "mlp.c_fc.weight": (128, 64),
        "mlp.c_fc.bias": (128,),
        "mlp.c_proj.weight": (64, 128),
        "mlp.c_proj.bias": (64,),
    }
    shapes = {
        f"{tower}transformer.resblocks.0.{name}": size for tower in ("", "visual.") for name, size in layer.items()
    }
    shapes |= {
        "logit_scale": (),
        "text_projection": (64, 32),
        "visual.proj": (64, 32),
        "positional_embedding": (8, 64),
    }
    shapes |= {
        "token_embedding.weight": (50, 64),
        "visual.conv1.weight": (64, 3, 8, 8),
        "visual.class_embedding": (64,),
    }
    shapes |= {"visual.positional_embedding": (5, 64)}
    norms = ("ln_final", "visual.ln_pre", "visual.ln_post")
    shapes |= {f"{norm}.{part}": (64,) for norm in norms for part in ("weight", "bias")}
    return {name: torch.zeros(size) for name, size in shapes.items()}


def change_clip(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """A CLIP with one tensor replaced or left out."""
    tensors = openai_clip()
    tensors[name] = tensor
    torch.save({key: value for key, value in tensors.items() if value is not None}, folder / NAME)


CLIPS = {
    "a-wide-bias": ("visual.transformer.resblocks.0.mlp.c_fc.bias", torch.zeros(10**7)),
    "a-narrow-tower": ("visual.conv1.weight", torch.zeros(32, 3, 8, 8)),
    "no-layer": ("visual.transformer.resblocks.0.ln_1.bias", None),
    "no-embedding": ("token_embedding.weight", None),
    "a-flat-embedding": ("token_embedding.weight", torch.zeros(3200)),
    "nan": ("logit_scale", torch.tensor(float("nan"))),
    "no-patches": ("visual.conv1.weight", torch.zeros(64, 3, 0, 0)),
    "a-scalar-bias": ("visual.transformer.resblocks.0.mlp.c_fc.bias", torch.zeros(())),
    "a-layer-far-away": ("transformer.resblocks.99999999.ln_1.bias", torch.zeros(64)),
}


def convert_all(folder: str) -> None:
    """Convert each of them."""
    for number, (name, tensor) in enumerate(CLIPS.values()):
        change_clip(Path(folder), name, tensor)
        with little_memory():
            check_refusal(
                lambda number=number: convert_clip(Path(folder) / NAME, Path(folder) / str(number), hidden_act="gelu"),
                ValueError,
                "",
            )
        assert not (Path(folder) / str(number)).exists()


def test_a_clip_that_is_none_is_refused_before_memory_is_asked_for(tmp_path):
    """The configuration is read off shapes: a bias of 10**7 numbers asks for 3 TB of weights."""
    torch.save(openai_clip(), tmp_path / NAME)
    assert convert_clip(tmp_path / NAME, tmp_path / "sound", hidden_act="gelu").config.projection_dim == 32
    forked.run(tmp_path / "log", convert_all, str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": []}}', "[" * 99999])
def test_a_strange_open_clip_config_is_one_line(tmp_path, text):
    """It lies beside the weights."""
    torch.save(openai_clip(), tmp_path / NAME)
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(AdapterError, match="open_clip_config.json") as caught:
        convert_clip(tmp_path / NAME, tmp_path / "out")
    assert "\n" not in str(caught.value)
