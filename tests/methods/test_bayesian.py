"""Bayesian prompts by hand: averaged probabilities, the divergence, draws, caches, memory, what is refused."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_vlm import BayesianConfig, BayesianObjective, CoOpConfig, PromptedClassifier
from peft_vlm.data.dataset import collate
from peft_vlm.errors import AdapterError
from peft_vlm.evaluation.classify import TextClassifier, evaluate_classifier
from peft_vlm.methods.bayesian import preset_for
from peft_vlm.methods.bayesian.objective import standard_normal_kl
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import ClassFeatureCache, conditioned_logits, encode_classes, tokenize_classes
from peft_vlm.text.class_features import mean_over_samples
from tests.cases import CASES as ALL_CASES
from tests.cases import class_prompts, images, kept_for_backward, perturb, pixels, prepared, processor
from tests.tiny import CONTEXT_LENGTH, colour_names, tiny_clip, tiny_tokenizer

(CASE,) = [case for case in ALL_CASES if case.method == "bayesian"]
both = pytest.mark.parametrize("conditional", [False, True])


def adapted(**settings):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), CASE.config(**settings))
    perturb(model)
    return model.eval()


def classifier_of(model) -> PromptedClassifier:
    tools = processor()
    return PromptedClassifier(
        model, tools.tokenizer, tools.image_processor, class_names=colour_names(), template="a {}."
    )


@both
@torch.no_grad()
def test_probabilities_of_coop_contexts_are_averaged(conditional):
    """By hand: context + m + noise exp(v / 2), one CoOp model per sample and image; averaged logits would differ."""
    model = adapted(conditional=conditional)
    layer = towers_of(model).token_embedding
    noise = torch.from_numpy(np.random.RandomState(0).standard_normal((3, 32)).astype(np.float32))
    features = image_features(model, pixels())
    actual = conditioned_logits(model, class_prompts(), features).softmax(dim=-1)
    plain = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)).eval()
    for row, feature in zip(actual, features, strict=True):
        if conditional:
            unit = feature / feature.norm()
            mean, log_variance = (
                by_hand(getattr(layer, f"bayesian_{part}_network")["default"], unit)
                for part in ("mean", "log_variance")
            )
        else:
            mean, log_variance = (getattr(layer, f"bayesian_{part}")["default"] for part in ("mean", "log_variance"))
        probabilities = []
        for draw in noise:
            vector = mean + draw * (log_variance / 2).exp()
            towers_of(plain).token_embedding.coop_prompt["default"].copy_(layer.bayesian_prompt["default"] + vector)
            logits = towers_of(plain).similarity_logits(feature[None], encode_classes(plain, class_prompts()))
            probabilities.append(logits.softmax(dim=-1)[0])
        assert_close(row, torch.stack(probabilities).mean(dim=0), rtol=1e-4, atol=1e-6)


def by_hand(network, feature: torch.Tensor) -> torch.Tensor:
    """Linear, ELU, linear, ELU, linear."""

    def elu(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values > 0, values, values.exp() - 1)

    hidden = elu(network.weight1 @ feature + network.bias1)
    return network.weight3 @ elu(network.weight2 @ hidden + network.bias2) + network.bias3


def test_the_divergence_is_a_mean_over_the_width():
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    expected = 0.5 * ((1 + 1 - 1 - 0) + (np.e + 0 - 1 - 1)) / 2
    assert standard_normal_kl(mean, log_variance).item() == pytest.approx(expected)
    assert standard_normal_kl(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_averaged_probabilities_serve_as_logits():
    logits = torch.randn(5, 3, 4)
    averaged = logits.softmax(dim=-1).mean(dim=0)
    assert_close(mean_over_samples(logits).softmax(dim=-1), averaged)
    assert torch.equal(mean_over_samples(logits[:1]), logits[0])
    assert bool((mean_over_samples(logits * 1e4) > -torch.inf).any()), "in the logarithm nothing underflows"


@both
def test_batches_of_any_size_give_each_image_its_own_answer(conditional):
    """The official code adds the residual of image j to context vector j where the batch has as many images."""
    model = adapted(conditional=conditional)
    with torch.no_grad():
        features = image_features(model, pixels())
        whole = conditioned_logits(model, class_prompts(), features)
        for count in (1, 2, 3):  # 2: the number of context vectors
            parts = [conditioned_logits(model, class_prompts(), part) for part in features.split(count)]
            assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
        chunks = conditioned_logits(model, class_prompts(), features, chunk_size=2)
    assert_close(chunks, whole, rtol=1e-4, atol=1e-4)


@both
def test_training_draws_anew_and_a_seed_repeats_it(conditional):
    """Draws that stay the same would train CoOp on a few fixed contexts; draws without a seed no run could repeat."""
    model = adapted(conditional=conditional, num_samples=400).train()
    layer = towers_of(model).token_embedding
    features = image_features(model, pixels())
    torch.manual_seed(1)
    first, second = layer.shifts(features), layer.shifts(features)
    torch.manual_seed(1)
    assert torch.equal(layer.shifts(features), first)
    assert not torch.equal(first, second)
    mean, log_variance = layer.posterior(features)
    noise = (first - mean[:, None]) / (log_variance / 2).exp()[:, None]
    assert abs(noise.mean().item()) < 0.05
    assert noise.std(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval().shifts(features), layer.shifts(features))
    assert len(first) == (len(features) if conditional else 1)


def test_predictions_use_the_noise_of_the_recorded_seed(tmp_path):
    """The same numbers for everybody who loads the adapter, whatever was drawn before."""
    model = adapted(noise_seed=7)
    expected = classifier_of(model).predict(images(per_class=1).image(0))
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path).eval()
    assert classifier_of(again).predict(images(per_class=1).image(0)) == expected
    layer = towers_of(again).token_embedding
    first = np.random.RandomState(7).standard_normal((3, 32)).astype(np.float32)
    assert np.array_equal(layer.sampling["default"].noise.numpy(), first)
    other = classifier_of(adapted(noise_seed=8)).predict(images(per_class=1).image(0))
    assert [p.probability for p in other] != [p.probability for p in expected]


@both
def test_every_classifier_gives_the_averaged_probabilities(conditional):
    """A classifier with the mean context alone would be another one, and nothing would say so."""
    model, data = adapted(conditional=conditional), images(per_class=1)
    with torch.no_grad():
        every = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
        expected = conditioned_logits(model, class_prompts(), image_features(model, every))
    tools = processor()
    logits = TextClassifier(model, tools.tokenizer, template="a {}.").logits_for(colour_names())(every)
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    result = evaluate_classifier(model, data, class_prompts())
    assert torch.equal(result.predicted, expected.argmax(dim=-1))
    assert_close(result.confidence, expected.softmax(dim=-1).amax(dim=-1), rtol=1e-4, atol=1e-5)
    pictures = [data.image(i) for i in range(len(data))]
    for row, predictions in zip(expected.softmax(-1), classifier_of(model).predict(pictures), strict=True):
        assert predictions[0].probability == pytest.approx(float(row.max()), rel=1e-3)


def test_class_features_of_all_samples_are_computed_once():
    model, cache = adapted(), ClassFeatureCache()
    features = cache.get(model, class_prompts())
    assert features.shape == (3, 6, 16)
    assert cache.get(model, class_prompts()) is features
    assert cache.num_computed == 1
    with model.disable_adapter():
        assert cache.get(model, class_prompts()).shape == (6, 16)
    several = tokenize_classes(tiny_tokenizer(), colour_names(), template=["a {}.", "{}!"], max_length=CONTEXT_LENGTH)
    assert encode_classes(model, several, chunk_size=4).shape == (3, 6, 16)


def test_class_features_of_a_conditional_adapter_are_refused():
    model = adapted(conditional=True)
    with pytest.raises(AdapterError, match=r"may also depend on the image.*an export is not possible\."):
        encode_classes(model, class_prompts())


def test_weights_of_the_other_kind_are_refused_by_the_header(tmp_path):
    """A configuration and weights that do not belong together are found before a model is built."""
    adapted(conditional=True).save_pretrained(tmp_path / "image")
    adapted().save_pretrained(tmp_path / "vectors")
    (tmp_path / "image" / "adapter_model.safetensors").replace(tmp_path / "vectors" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="by the configuration, got 'no tensor'"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path / "vectors")


@both
def test_threads_do_not_meet_in_the_context(conditional):
    """One thread's shift in another's class prompts would classify by a mixture of two images."""
    model = adapted(conditional=conditional, num_samples=6)
    with torch.no_grad():
        features = image_features(model, pixels(4))

    def scores(row: int) -> torch.Tensor:
        with torch.no_grad():
            return conditioned_logits(model, class_prompts(), features[row : row + 1])

    expected = [scores(row) for row in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for row, actual in enumerate(pool.map(scores, [0, 1, 2, 3] * 5)):
            assert_close(actual, expected[row % 4], rtol=1e-5, atol=1e-5)


def test_two_kinds_of_adapter_side_by_side():
    model = adapted()
    model.add_adapter("image", CASE.config(conditional=True, num_samples=2, init_weights=False))
    assert encode_classes(model, class_prompts()).shape == (3, 6, 16)
    model.set_adapter("image")
    with torch.no_grad():
        logits = conditioned_logits(model, class_prompts(), image_features(model, pixels()))
    assert logits.shape == (4, 6)
    with pytest.raises(AdapterError, match="depend on the image"):
        encode_classes(model, class_prompts())
    model.set_adapter("default")
    assert encode_classes(model, class_prompts()).shape == (3, 6, 16)


@both
def test_the_backward_pass_keeps_one_text_pass_whatever_batch_and_samples(conditional):
    """What autograd keeps per image and sample would be a text tower's activations for every class."""
    kept = []
    for count, samples in ((2, 2), (8, 2), (2, 8)):
        model, dataset = adapted(conditional=conditional, num_samples=samples).train(), images()
        objective, batch = prepared(CASE, model, dataset), collate([dataset[i] for i in range(count)])
        kept.append(kept_for_backward(lambda objective=objective, model=model, b=batch: objective(model, b).loss))
    one_pass = 6 * 10 * 32 * 4  # bytes of one hidden state of the class prompts; a pass keeps dozens
    assert kept[1] - kept[0] < 6 * 2 * one_pass / 2
    assert kept[2] - kept[0] < 6 * 2 * one_pass / 2


@both
def test_where_a_training_starts(conditional):
    """A vector as wide as the official one drowns the words of a small model; its width is a setting."""
    for std in (None, 0.05):
        model = get_peft_model(tiny_clip(), CASE.config(conditional=conditional, residual_std=std))
        mean, log_variance = towers_of(model).token_embedding.posterior(image_features(model, pixels()))
        deviation = (log_variance / 2).exp()
        if not conditional:
            assert torch.count_nonzero(mean) == 0
        if std is None:
            assert 0.5 < deviation.min() <= deviation.max() < 3
        else:
            assert deviation.max() < 0.1


def test_the_objective_refuses_other_adapters_and_weights():
    with pytest.raises(ValueError, match="`kl_weight` of 0 or more, got -1"):
        BayesianObjective(class_prompts(), kl_weight=-1)
    model, dataset = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2)), images()
    objective = BayesianObjective(class_prompts(), image_cache="none")
    objective.prepare(model, dataset)
    with pytest.raises(AdapterError, match="active Bayesian adapter"):
        objective(model, collate([dataset[0], dataset[1]]))


def test_the_preset_takes_samples_and_epochs():
    preset = preset_for()
    assert preset.config == {"num_text_tokens": 4, "context_init": "a photo of a", "num_samples": 20}
    assert preset.training["per_device_train_batch_size"] == 1
    assert preset_for(samples=40).config["num_samples"] == 40
    assert preset_for(epochs=60).training["num_train_epochs"] == 60
    assert BayesianConfig(**preset.config).num_samples == 20
    with pytest.raises(ValueError, match="'few_shot'"):
        preset_for("few_shot")
