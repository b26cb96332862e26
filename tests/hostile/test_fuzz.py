"""Thousands of mutations of sound files: an error of ours or none, within seconds, without a gigabyte.

`make test-hostile` runs all of it; the ordinary suite a part.
"""

import json
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import check_weights, read_config
from peft_vlm.classifier import PromptedClassifier
from peft_vlm.data import load_benchmark
from peft_vlm.errors import PeftVLMError, PeftVLMWarning
from peft_vlm.export import plain_classifier
from peft_vlm.files import CONFIG_NAME, WEIGHTS_NAME
from peft_vlm.serving.card import ClassifierCard, check_architecture
from peft_vlm.serving.plain import METADATA_KEY, load_exported
from peft_vlm.text.class_features import encode_classes
from peft_vlm.training.checkpoints import MANIFEST_NAME, damage, read_manifest
from tests import forked, short_run
from tests.benchmark_trees import write_trees
from tests.cases import base_model, class_prompts
from tests.hostile.attack import SECONDS, little_memory, no_connections, obeyed
from tests.tiny import clip_processor, colour_names, noise_image

#: Values that programs stumble over.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 10**4, 10**8, 2**31, 2**63, 10**30, -(10**8), 10**400]),
    st.sampled_from([0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "3", "text", "{}", "a {} {}", "..", "/etc/hostname", "owner/name", "a\0b", "\x1b[2J"]),
    st.sampled_from(["\u202e", "\ud800", "\n", " ", "<|endoftext|>", "red", "[bos]"]),
    st.sampled_from(["(a+)+b", ".*", "COOP", "TVP", "LORA", "F32", "F64", "I64", "BOOL", "F4", "gelu", "a" * 10**5]),
    st.sampled_from([[], {}, [[]], [1], [1, 2, 3], [-1], [10**8], ["a"], ["a", "a"], [None], [float("nan")] * 3]),
    st.sampled_from([{"a": 1}, {"": ""}, {"a": {"b": [{}]}}, [10**8] * 3, [0, 10**12], ["x"] * 3000]),
    st.integers(-(2**40), 2**40),
    st.integers(-40, 40),
    st.text(max_size=8),
)  # fmt: skip
SOME_BYTES = st.sampled_from(
    [b"", b"\0", b"\xff", b"[" * 20_000, b'{"a":' * 5000, b"}", b'"', b"9" * 5000, b"1e999", b","]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inside:
        yield from places(entry, (*path, key))


@st.composite
def changed_json(draw: Callable[[Any], Any], text: str) -> bytes:
    """A JSON text with a value, a name or some bytes changed."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([path for path in places(value) if path] or [("a",)]))
        holder = value
        for key in above:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "whole"]))
        if kind == "whole" and draw(st.booleans()):
            value = deepcopy(draw(VALUES))
        elif kind == "remove":
            del holder[last]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "a", "peft_type", "__metadata__", "\x1b", "logit_scale"]))] = holder.pop(
                last
            )
        else:
            holder[last] = deepcopy(draw(VALUES))
        if not isinstance(value, dict | list) or not value:
            break
    data = json.dumps(value).encode()
    return draw(changed_bytes(data)) if draw(st.integers(0, 3)) == 0 else data


@st.composite
def changed_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Bytes with some replaced, cut off or repeated."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([0, 1, 8, len(data)])))))
    return data[:start] + draw(st.one_of(SOME_BYTES, st.binary(max_size=4))) + data[end:]


@st.composite
def changed_header(draw: Callable[[Any], Any], file: bytes) -> bytes:
    """A safetensors file with another header, length, or tensors."""
    size = int.from_bytes(file[:8], "little")
    header, data = file[8 : 8 + size], file[8 + size :]
    kind = draw(st.sampled_from(["header", "header", "header", "length", "data"]))
    if kind == "header":
        header = draw(changed_json(header.decode()))
        length = len(header)
    else:
        length = draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63])) if kind == "length" else size
        data = draw(changed_bytes(data)) if kind == "data" else data
    return length.to_bytes(8, "little") + header + data


@contextmanager
def limits() -> Iterator[None]:
    """Within this nothing may take long, much memory, or a connection; errors are ours."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with little_memory(), no_connections(), warnings.catch_warnings():
            warnings.simplefilter("ignore", PeftVLMWarning)
            yield
    except PeftVLMError as error:
        if obeyed(str(error)):
            raise AssertionError(f"more than a line: {str(error)!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(examples: int, strategy: st.SearchStrategy[bytes], use: Callable[[bytes], Any]) -> None:
    """Use so many mutations, the same in each run."""
    own = {"max_examples": examples, "derandomize": True, "database": None, "deadline": None}

    @settings(**own, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(data: bytes) -> None:
        with limits():
            use(data)

    one()


def fuzz_config(folder: str, examples: int, whole: bool) -> None:
    """`adapter_config.json` of one adapter."""

    def use(data: bytes) -> None:
        (Path(folder) / CONFIG_NAME).write_bytes(data)
        if whole:
            PromptedClassifier.from_pretrained(folder, device="cpu").predict(noise_image(9, 9))
        else:
            check_weights(AdapterSource.find(folder), read_config(folder))

    fuzz(examples, changed_json((Path(folder) / CONFIG_NAME).read_text()), use)


def fuzz_weights(folder: str, examples: int, whole: bool) -> None:
    """`adapter_model.safetensors` of one adapter."""

    def use(data: bytes) -> None:
        path = Path(folder) / WEIGHTS_NAME
        path.unlink(missing_ok=True)  # a file that is mapped must not change
        path.write_bytes(data)
        if whole:
            PromptedClassifier.from_pretrained(folder, device="cpu").predict(noise_image(9, 9))
        else:
            check_weights(AdapterSource.find(folder), read_config(folder))

    fuzz(examples, changed_header((Path(folder) / WEIGHTS_NAME).read_bytes()), use)


def fuzz_card(folder: str, examples: int, whole: bool) -> None:
    """The card in an exported classifier."""
    path = Path(folder) / "classifier.safetensors"
    with safe_open(path, framework="pt") as file:
        card = file.metadata()[METADATA_KEY]
    sound = path.read_bytes()
    size = int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8 : 8 + size])

    def use(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        if not whole:
            check_architecture(ClassifierCard.from_json(text, where="x").architecture, num_tensors=99, where="x")
            return
        changed = json.dumps(header | {"__metadata__": {METADATA_KEY: text}}).encode()
        path.unlink()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + sound[8 + size :])
        load_exported(path).predict([noise_image(9, 9)])

    fuzz(examples, changed_json(card), use)


def fuzz_manifest(folder: str, examples: int, whole: bool) -> None:
    """`manifest.json` of a checkpoint."""
    checkpoint = Path(folder) / "checkpoint-2"
    sound = (checkpoint / MANIFEST_NAME).read_text()

    def use(data: bytes) -> None:
        (checkpoint / MANIFEST_NAME).write_bytes(data)
        if not whole:
            damage(checkpoint)
            read_manifest(checkpoint)
            return
        with tempfile.TemporaryDirectory() as run:
            copied = shutil.copytree(checkpoint, Path(run) / checkpoint.name)
            short_run.train(run, "coop", resume=str(copied), max_steps=3, save_strategy="no")

    fuzz(examples, changed_json(sound), use)


def fuzz_split(folder: str, examples: int, whole: bool) -> None:
    """A split file of CoOp's, which comes from a link on the internet."""
    path = Path(folder) / "dtd" / "split_zhou_DescribableTextures.json"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        images = load_benchmark("dtd", folder, shots=2)
        assert all(Path(images.path_of(index)).is_relative_to(folder) for index in range(len(images)))
        if whole:
            images.image(0)

    fuzz(examples, changed_json(path.read_text()), use)


FILES: dict[str, tuple[Callable[[str, int, bool], None], str]] = {
    "config": (fuzz_config, ""),
    "weights": (fuzz_weights, ""),
    "card": (fuzz_card, "exported"),
    "manifest": (fuzz_manifest, "run"),
    "split": (fuzz_split, "benchmarks"),
}
#: Adapters whose files are changed: of each shape one, and one of PEFT's own.
ADAPTERS = ("coop", "promptsrc", "promptkd", "rpp", "skip_tuning", "tvp", "lora")


@pytest.fixture(scope="session")
def material(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, an exported classifier, a run with a checkpoint, and benchmarks."""
    folder = tmp_path_factory.mktemp("material")
    model = base_model()
    (folder / "exported").mkdir()
    classifier = plain_classifier(
        model, encode_classes(model, class_prompts()), colour_names(6), image_processor=clip_processor()
    )
    classifier.save(folder / "exported" / "classifier.safetensors")
    forked.run(folder / "log", short_run.train, str(folder / "run"), "coop", max_steps=2)
    write_trees(folder / "benchmarks")
    for name in ADAPTERS:
        shutil.copytree(sound / name, folder / name)
    return folder


def cases(per_file: int) -> list[tuple[str, str, int]]:
    """So many mutations of each kind of file, divided among the adapters."""
    rows = []
    for kind, (_, place) in FILES.items():
        targets = [place] if place else list(ADAPTERS)
        rows += [(kind, target, -(-per_file // len(targets))) for target in targets]
    return rows


def attack(kind: str, material: Path, target: str, tmp_path: Path, examples: int, *, whole: bool) -> None:
    """Run the mutations in a process of its own, which a crash of a library ends."""
    folder = shutil.copytree(material / target, tmp_path / "target")
    log = tmp_path / "log"
    child = forked.start(log, FILES[kind][0], str(folder), examples, whole, environ={"CUDA_VISIBLE_DEVICES": ""})
    code = forked.wait(child, log, timeout=1500)
    assert code == 0, f"exit code {code}: {log.read_text()[-4000:]}"


@pytest.mark.parametrize(("kind", "target", "examples"), cases(140))
def test_mutated_files_are_refused_by_their_reader(kind, material, target, tmp_path, examples) -> None:
    """A traceback of another library, a hang, or memory that a file asks for."""
    attack(kind, material, target, tmp_path, examples, whole=False)


@pytest.mark.parametrize(("kind", "target"), [("config", "coop"), ("weights", "tvp"), ("card", "exported")])
def test_mutated_files_are_refused_by_the_public_call(kind, material, target, tmp_path) -> None:
    """What the reader lets through meets models, tokenizers and PEFT."""
    attack(kind, material, target, tmp_path, 12, whole=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "target", "examples"), cases(2000))
def test_thousands_of_mutated_files_are_refused_by_their_reader(kind, material, target, tmp_path, examples) -> None:
    """The same, 2,000 of each kind."""
    attack(kind, material, target, tmp_path, examples, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "target", "examples"), cases(50))
def test_fifty_mutated_files_are_refused_by_the_public_call(kind, material, target, tmp_path, examples) -> None:
    """The same, 50 of each kind."""
    attack(kind, material, target, tmp_path, examples, whole=True)
