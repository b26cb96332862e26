"""Memory of a training by layer, from configurations alone: the adapted model is built on torch's `meta` device.

Its tensors have a shape and no values. What autograd would keep is counted as it is kept: the layers of the
method run, frozen layers below the lowest trained tensor keep nothing, and recomputed ones keep their input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GradientCheckpointingLayer,
)

from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.errors import PeftVLMError, UnsupportedModelError
from peft_vlm.experiments.run import RunPlan, new_adapter, plan_of
from peft_vlm.models.language_layers import language_layers_of
from peft_vlm.models.repository import hub_options
from peft_vlm.models.towers import FAMILIES, Towers, check_base_config, towers_of, unwrap
from peft_vlm.models.vision import encode_visual_tokens, input_size_of
from peft_vlm.registry import METHODS
from peft_vlm.settings import RunSettings
from peft_vlm.text.class_features import PromptObjective, StoredFeaturesLayer, conditioned_context
from peft_vlm.text.prompts import ClassPrompts, reserve_slots, tokenize_for_model

#: Characters per token where no tokenizer is at hand, and tokens of a chat around question and answer.
CHARACTERS, CHAT_TOKENS = 4, 16
#: Bytes of optimizer state per trained parameter.
SGD_STATE, OTHER_STATE = 4, 8


@dataclass
class LayerMemory:
    """Bytes of one transformer layer, or of what a tower has beside its layers.

    Args:
        name: Its name in the Hugging Face model.
        parameters: Parameters and buffers, in bytes.
        trainable: Trainable parameters, their number.
        activations: Tensors that autograd keeps for the backward pass of a batch.
        states: Hidden states of one row (image, text or question) that enter the layer, as a cache would store them.
        keys_values: Keys and values of one question, as an evaluation holds them; 0 outside a language model.
    """

    name: str
    parameters: int = 0
    trainable: int = 0
    activations: int = 0
    states: int = 0
    keys_values: int = 0


@dataclass
class DryRun:
    """Memory of one step of a training, in bytes of tensors, without the allocator's reserve and temporary tensors.

    Args:
        layers: By layer, in the order of the model.
        optimizer_bytes: Bytes per trainable parameter of the optimizer.
        teacher: Parameters of a teacher.
        recomputed: With gradient checkpointing the largest layer, whose activations exist again in the backward pass.
        notes: What was assumed.
    """

    layers: list[LayerMemory]
    optimizer_bytes: int
    teacher: int = 0
    recomputed: int = 0
    notes: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, int]:
        """Bytes by kind; `peak` is their sum."""
        trainable = sum(layer.trainable for layer in self.layers)
        parts = {
            "parameters": sum(layer.parameters for layer in self.layers),
            "teacher": self.teacher,
            "gradients": 4 * trainable,
            "optimizer": self.optimizer_bytes * trainable,
            "activations": sum(layer.activations for layer in self.layers) + self.recomputed,
        }
        return parts | {"peak": sum(parts.values())}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"totals": self.totals()}

    def __str__(self) -> str:
        """A table in MB."""
        titles = ("parameters", "trainable", "activations", "states/row", "keys+values")
        lines = [f"{'layer, MB':44}" + "".join(f"{title:>13}" for title in titles)]
        for layer in self.layers:
            sizes = (layer.activations, layer.states, layer.keys_values)
            cells = [f"{layer.parameters / 1e6:13.3f}", f"{layer.trainable:13,}", *(f"{s / 1e6:13.3f}" for s in sizes)]
            lines.append(f"{layer.name:44}" + "".join(cells))
        totals = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in self.totals().items())
        return "\n".join([*lines, f"MB of one step: {totals}", *self.notes])


class _StaysEmpty(AlignDevicesHook):
    """Marks a model that has no weights and gets none, so that adapters may be put on it."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Load nothing."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Unload nothing."""
        return output


class _Comparisons(TorchDispatchMode):
    """Answers comparisons of values that are not there: nothing is equal, all else holds. So no image is padding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            raise UnsupportedModelError(
                "Expected a model whose shapes follow from its configuration, got one that reads values in its "
                "forward pass. Measure a step of it instead."
            )
        if func.overloadpacket in (aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le):
            if any(isinstance(arg, FakeTensor) for arg in args):
                shape = torch.broadcast_shapes(*(arg.shape for arg in args if isinstance(arg, Tensor)))
                return torch.tensor(func.overloadpacket is not aten.eq).expand(shape)
        if func.overloadpacket in (aten.index, aten.index_put_):
            args = (args[0], [part for index in args[1] for part in _positions(index)], *args[2:])
        return func(*args, **kwargs)


def _positions(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index; one that is a mask as the positions that it selects, whose number a tensor without values takes."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    mask = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
    return mask.nonzero(as_tuple=True)


def _without_values(model: nn.Module) -> None:
    """Make a model on `meta` one whose tensors have a device, the CPU, and still no values."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied ones stay tied
                    empty: Any = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    is_trained = tensor.requires_grad
                    made[id(tensor)] = nn.Parameter(empty, is_trained) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[id(tensor)]


class _Counter:
    """Attributes what autograd keeps to the transformer layer that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
        self.names = {id(module): _plain(name) for name, module in named}
        self.rows: dict[str, LayerMemory] = {}
        self.owner: dict[int, str] = {}
        for name, module in model.named_modules():
            self.owner[id(module)] = self.row_of(name)
        self.current = next(iter(self.rows), "")
        own = [*model.parameters(), *model.buffers()]
        self._seen = {t.untyped_storage()._cdata for t in own}
        self._held: list[Tensor] = []  # held, so that the identity of a freed storage is not given away again

    def row_of(self, name: str) -> str:
        """The layer that a module or parameter lies in, or its tower; its row is made in the order of the model."""
        plain = _plain(name)
        layer = next((n for n in self.names.values() if f"{plain}.".startswith(f"{n}.")), None)
        if layer is None:
            towers = {n.split(".layers.")[0].removesuffix(".encoder") for n in self.names.values()}
            inside = [tower for tower in towers if f"{plain}.".startswith(f"{tower}.")]
            layer = max(inside, key=len) + " (rest)" if inside else "rest"
        if layer not in self.rows:
            self.rows[layer] = LayerMemory(layer)
        return layer

    def count_parameters(self) -> None:
        """Fill the columns of parameters."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in tensors:
            row = self.rows[self.row_of(name)]
            row.parameters += tensor.nbytes
            row.trainable += tensor.numel() if tensor.requires_grad else 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, each storage once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.rows[self.current].activations += storage.nbytes()
        return tensor

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the layer that runs, and what enters it."""
        self.current = self.owner.get(id(module), self.current)
        row = self.rows[self.current]
        if id(module) in self.names and args and isinstance(args[0], Tensor):
            row.states = max(row.states, args[0].nbytes // len(args[0]))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within this."""
        with ExitStack() as stack:
            handle = nn.modules.module.register_module_forward_pre_hook(self.enter)
            stack.callback(handle.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
            stack.enter_context(_Comparisons())
            yield


def _plain(name: str) -> str:
    """A module's name in the model without adapters."""
    return name.replace("base_model.model.", "").replace(".base_layer", "").removesuffix("base_layer")


def dry_run(settings: RunSettings, arguments: Callable[[dict[str, Any]], Any]) -> DryRun:
    """Count the memory of a step of the training that the settings describe; a model's configuration alone is read.

    Args:
        settings: Model, data, method and their settings.
        arguments: Makes the training arguments out of recommended settings.

    Raises:
        UnsupportedModelError: If the shapes of the model do not follow from its configuration.
    """
    plan = plan_of(settings, arguments)
    settings, args = plan.settings, plan.args
    base = _empty_model(plan.model_config)
    offered: dict[str, Any] = {"seed": args.seed, "class_names": list(plan.pool.class_names)}
    teacher = 0
    if settings.teacher:
        other = _empty_model(AutoConfig.from_pretrained(settings.teacher, **hub_options(settings.teacher)))
        teacher = sum(tensor.nbytes for tensor in (*other.parameters(), *other.buffers()))
        offered["class_dim"] = unwrap(other).config.projection_dim  # type: ignore[union-attr]
    if not plan.config.get("class_specific"):
        offered.pop("class_names")
    model = new_adapter(base, settings.method, None, plan.config, offered)
    del base._hf_hook
    _without_values(model)
    batch = args.per_device_train_batch_size
    if plan.is_clip_like:
        assert settings.template is not None
        prompts, notes = _class_prompts(model, settings.model, plan.pool.class_names, settings.template)
        prompts = _selected(prompts, _texts_per_step(plan, len(prompts.class_names)))
        run = _towers_step(prompts, batch)
    else:
        *inputs, notes = _question_inputs(settings.model, model, plan.pool, settings.question, batch)
        run = _questions_step(*inputs)
    recomputes = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)  # of newer versions
    counted = _count_step(model, run, checkpointing=recomputes, has_sgd=args.has_sgd)
    counted.teacher, counted.notes = teacher, notes
    return counted


def _empty_model(config: Any) -> nn.Module:
    """A base model on `meta`, in the type in which a training loads it.

    Args:
        config: Its configuration.
    """
    kind = next((family for family in FAMILIES if isinstance(config, family.config_class)), None)
    with torch.device("meta"):
        if kind is not None:
            check_base_config(config)
            model: nn.Module = kind(config)
        else:
            model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32)
    model._hf_hook = _StaysEmpty(execution_device="meta", offload=True, place_submodules=True)  # type: ignore
    return model


def _count_step(model: PeftModel, run: Any, *, checkpointing: bool, has_sgd: bool) -> DryRun:
    """Count one step.

    Args:
        model: Adapted model on `meta`.
        run: Runs what a training step runs, given the model.
        checkpointing: Whether layers recompute their activations.
        has_sgd: Whether torch's SGD with momentum trains.

    Raises:
        UnsupportedModelError: If the model reads values.
    """
    model.train()
    plain = _Counter(model)
    plain.count_parameters()
    with plain.counting():
        run(model)
    recomputed = 0
    if checkpointing:
        recomputed = max((plain.rows[name].activations for name in plain.names.values()), default=0)
        unwrap(model).activation_checkpointing_enable()
        lean = _Counter(model)
        with lean.counting():
            run(model)
        for name, row in plain.rows.items():
            row.activations = lean.rows[name].activations
    _count_keys_and_values(model, plain.rows)
    rows = [row for row in plain.rows.values() if row.parameters or row.activations]
    return DryRun(rows, SGD_STATE if has_sgd else OTHER_STATE, recomputed=recomputed)


def _count_keys_and_values(model: nn.Module, rows: dict[str, LayerMemory]) -> None:
    """Keys and values of a question in each layer of a language model."""
    base: Any = unwrap(model)
    if isinstance(base, tuple(FAMILIES)):
        return
    text, layers = base.config.get_text_config(), language_layers_of(model)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name, row in rows.items():
        if name.startswith(f"{layers.name}."):
            row.keys_values = 2 * row.states // text.hidden_size * heads * width


def _empty(model: nn.Module, *shape: int) -> Tensor:
    """A tensor without values, like the weights of a model."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return like.detach().new_empty(shape)


def _towers_step(prompts: ClassPrompts, batch_size: int) -> Any:
    """A step of a CLIP-like model: all images through one tower, all class prompts through the other.

    Args:
        prompts: Class prompts, without the places of a learned context.
        batch_size: Images.
    """

    def run(model: PeftModel) -> None:
        towers: Towers = towers_of(model)
        rows, cols = input_size_of(model) or (224, 224)
        images = towers.finish_image(towers.embed_image(_empty(model, batch_size, 3, rows, cols)), 0)
        texts = _texts(model, prompts, images.shape[-1])
        scores = nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).mT
        nn.functional.cross_entropy(scores, torch.zeros(batch_size, dtype=torch.long))

    return run


def _texts(model: PeftModel, prompts: ClassPrompts, dim: int) -> Tensor:
    """Features of the class prompts, not normalised; where the adapter stores them no text runs."""
    towers = towers_of(model)
    if isinstance(towers.text_head, StoredFeaturesLayer):
        return _empty(model, len(prompts.class_names), dim)
    ids, layer = reserve_slots(model, prompts).input_ids, conditioned_context(model)
    if layer is None:
        return towers.finish_text(towers.embed_text(ids), ids, 0)
    width = unwrap(model).config.text_config.hidden_size  # type: ignore[union-attr]
    with layer.shifted_by(_empty(model, 1, width)):  # one image or sample at a time
        return towers.finish_text(towers.embed_text(ids), ids, 0)


def _questions_step(columns: dict[str, Tensor], text_tokens: int, answer_tokens: int) -> Any:
    """A step of a model that writes text: its images, and a language model over visual and text tokens.

    Args:
        columns: Inputs of the vision side on `meta`.
        text_tokens: Tokens of a question with its answer, without visual ones.
        answer_tokens: Tokens of an answer.
    """

    def run(model: PeftModel) -> None:
        base: Any = unwrap(model)
        count = len(columns["pixel_values"])
        visual = encode_visual_tokens(model, columns)
        text = visual.new_empty(count, text_tokens, visual.shape[-1])
        decoder = base.get_decoder()
        while decoder.get_decoder() is not decoder:
            decoder = decoder.get_decoder()
        hidden = torch.cat([visual.unflatten(0, (count, -1)), text], dim=1)
        states = decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits = base.get_output_embeddings()(states[:, -answer_tokens:]).flatten(0, 1).float()
        nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    return run


def _class_prompts(
    model: nn.Module, source: str, names: Sequence[str], template: str
) -> tuple[ClassPrompts, list[str]]:
    """Class prompts by the model's tokenizer where it is on this computer, else of estimated lengths; and a note.

    Args:
        model: Model without values.
        source: Its folder or Hub id.
        names: Class names.
        template: Text around one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        return tokenize_for_model(model, tokenizer, names, template=template), []
    except (OSError, PeftVLMError):
        pass
    text: Any = unwrap(model).config.text_config  # type: ignore[union-attr]
    longest = text.max_position_embeddings
    lengths = [min(longest, 2 + -(-len(template.format(name)) // CHARACTERS)) for name in names]
    end = text.vocab_size - 1 if text.eos_token_id in (None, 2) else text.eos_token_id
    ids = torch.full((len(names), max(lengths)), end)
    for number, length in enumerate(lengths):
        ids[number, : length - 1] = torch.arange(length - 1) + 3 + number % 97
    ids[:, 0] = min(text.vocab_size - 2, text.bos_token_id or 0)
    note = f"No tokenizer of {source!r} on this computer: prompts of one token per {CHARACTERS} characters."
    return ClassPrompts(tuple(names), ("{}",), ids), [note]


def _texts_per_step(plan: RunPlan, num_classes: int) -> int:
    """Class prompts that a step of the method's objective runs.

    Args:
        plan: The run.
        num_classes: All classes.
    """
    objective: Any = METHODS[plan.settings.method].objective
    if not (isinstance(objective, type) and issubclass(objective, PromptObjective)):
        return num_classes
    settings = {name: parameter.default for name, parameter in signature(objective).parameters.items()}
    settings |= {"seed": plan.args.seed} | plan.objective
    batch_size = plan.args.per_device_train_batch_size
    return objective.texts_per_step(num_classes, batch_size=batch_size, settings=settings)


def _selected(prompts: ClassPrompts, count: int) -> ClassPrompts:
    """Some class prompts in place of all, of every length; the longest one among them, which the others are padded to.

    Args:
        prompts: All.
        count: How many.
    """
    if count >= len(prompts.class_names):
        return prompts
    ends = (prompts.input_ids != prompts.input_ids[:, -1:]).sum(dim=1)  # behind its end a prompt repeats one token
    order = ends.argsort(stable=True)
    return prompts.select(order[torch.linspace(0, len(order) - 1, count).round().long()] if count > 1 else order[-1:])


def _question_inputs(
    source: str, model: nn.Module, images: Any, question: str, batch_size: int
) -> tuple[dict[str, Tensor], int, int, list[str]]:
    """Vision inputs without values, text tokens, answer tokens, and a note, by the model's processor or by estimates.

    Args:
        source: Folder or Hub id of the model.
        model: Model without values.
        images: Labelled images.
        question: What is asked.
        batch_size: Questions.
    """
    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        rows, cols = input_size_of(model) or (336, 336)
        answer = max(len(name) for name in images.class_names) // CHARACTERS + 2
        pixels = _empty(model, batch_size, 3, rows, cols)
        note = f"No processor of {source!r} on this computer: one image of {rows} x {cols}, estimated text."
        return {"pixel_values": pixels}, len(question) // CHARACTERS + CHAT_TOKENS + answer, answer, [note]
    collator = QuestionCollator(processor)
    asked = ImageQuestionDataset.from_images(images, question=question, collator=collator)
    longest = max(range(len(asked)), key=lambda place: len(images.class_names[images.labels[place]]))
    batch = asked.collate([asked[longest]])
    names = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
    columns = {
        name: _empty(model, batch_size * len(batch[name]), *batch[name].shape[1:]).to(batch[name].dtype)
        for name in names
        if name in batch
    }
    answer = int((batch["token_labels"] >= 0).sum())
    with _Comparisons(), torch.no_grad():
        visual = len(encode_visual_tokens(model, columns)) // batch_size
    text = max(answer + 1, batch["input_ids"].shape[1] - visual)
    return columns, text, answer, []
