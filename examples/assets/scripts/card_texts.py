"""Texts of the cards; `write_cards.py` fills in every number."""

LINEAGE = {
    "clip_student": "Trained from scratch.",
    "clip_teacher": (
        "Grown from `clip_student`: layers whose output projections are zero were inserted, so that it started as "
        "exactly the student, and training went on with a re-warmed learning rate; each emoji occurs twice per epoch. "
        "The pairs and times below are those of this second run alone."
    ),
}

MODEL_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# {name}

A small CLIP (`transformers.CLIPModel`) for 48 px pictures of things: UI icons and emoji. It exists so that the methods
of this repository can be tried, tested and compared on a real, if small, vision-language model without any download.

{lineage}

```python
from transformers import AutoProcessor, CLIPModel

model = CLIPModel.from_pretrained("examples/assets/{name}")
processor = AutoProcessor.from_pretrained("examples/assets/{name}")
```

- {parameters} M parameters, {megabytes} MB in float16
- vision: {vision[image_size]} px, patch {vision[patch_size]}, {vision[num_hidden_layers]} layers of width \
{vision[hidden_size]}, {vision[num_attention_heads]} heads
- text: {text[num_hidden_layers]} layers of width {text[hidden_size]}, {text[num_attention_heads]} heads, \
{text[vocab_size]} byte-pair tokens of its own tokenizer, context {text[max_position_embeddings]}
- shared space: {dim} dimensions

## Training data

{images} drawings from {num_sets} collections ({num_families} design families) of the npm package `@iconify/json`, with
the icon's name (styles and sizes removed), its aliases, and for emoji the CLDR name, keywords and subgroup as
captions. Images by licence: {licences}. `../collections.json` and the NOTICE file name every collection, author and
licence; `../pretraining_images.parquet` lists every image. Brand logos and flags are left out. Whether weights are
derived works of the drawings is unsettled; the collections that ask for attribution get it in NOTICE.

## Training

{pairs} image-text pairs, {minutes} minutes on two shared CPU cores ({cpu_minutes} CPU minutes), contrastive loss
{first_loss} at the start and {last_loss} at the end, where {last_accuracy} % of the images of a batch of 256 found
their caption (images augmented). Recipe and options: `../scripts/train_clip.py`; log: `training_log.json`, seed 0,
one run.

![training curve](training_curve.png)

## Zero-shot accuracy

Measured by `../scripts/evaluate_clip.py`, recorded in `evaluation.json`, checked by `tests/assets`. Class names alone
in three templates; "n-way" is the mean of 100 draws of n concepts. No image, design family or emoji vendor of these
sets was trained on.

{accuracies}

## Limits

- It knows drawings, not photos: `fashion` is hardly recognised without adaptation.
- No open vocabulary: concepts that no caption named are recognised little better than chance (unseen concepts above).
- English words only; names of brands, people and places are unknown to it.
- One run with one seed; hyper-parameters were chosen on the training loss alone.
"""

MLLM_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A small multimodal language model (`transformers.{architecture}`) that says what a picture of an icon or emoji shows
and in which colour it is drawn. It exists so that visual prompts and selective tuning
can be tried, tested and compared on real, if small, models of several families without any download.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("examples/assets/{name}")
processor = AutoProcessor.from_pretrained("examples/assets/{name}")
inputs = processor(images=[picture], text=[{text!r}], return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True))
```

- {parameters} M parameters, {megabytes} MB in float16
- vision: {vision[image_size]} px, patch {vision[patch_size]}, {vision[num_hidden_layers]} layers of width \
{vision[hidden_size]}; started from the bundled `clip_student`
- language: {language[num_hidden_layers]} layers of width {language[hidden_size]} ({language[model_type]}), from \
scratch, with its own tokenizer of {vocabulary} tokens

## Training

The drawings of the bundled CLIPs (see their card for collections and licences), each with one question: what it is
(the icon's or emoji's name), whether it is a given thing, or the colour of its ink. A third of the images stand small
inside a black, coloured or noisy border, so that the shrunken images of visual prompts are not foreign to the model.
{images} image-question pairs, {cpu_minutes} CPU minutes on a shared CPU ({minutes} minutes by the clock, beside other
work); loss {first_loss} at the start, {last_loss} at the end. The learning rate fell to zero after 20 CPU minutes,
rose to half of its peak and fell to zero again in a second start. One run, seed {seed}; recipe and options:
`../scripts/train_mllm.py`; log: `training_log.json`.

![training curve](training_curve.png)

## Accuracy on images of design families it never saw

Measured by `../scripts/evaluate_mllm.py` on at most {evaluated} images per set, recorded in `evaluation.json`, checked
by `tests/assets`. "Chosen" means the most likely of the class names, "written" the answer the model writes itself.

{accuracies}

## Limits

- It knows names of drawings and little else: no sentences, no reasoning, no photos.
- It answers any other question with a name. Questions for yes or no were in its training, but it answers them no
  better than by chance (see the table).
- Undertrained by its small budget; the loss was still falling when the learning rate reached zero.
"""

ICONS_CARD = """\
# icons: UI icons of unseen design families

What does an icon show? {num_classes} classes, 48 px, drawn on white; grey unless the icon has colours.
No design family of this set is in the pretraining data of the bundled models, and no two splits share a family.
Families (all collections by one designer or derived from one another) are the unit of the split: {families}.

{splits}

Columns: `image`, `label` (`ClassLabel`), `domain` (plain, pixel art, hand drawn), `family`, `set`, `icon`, `licence`,
`author`, `pretraining_correlation`, `nearest_in_pretraining`.

- Test images by domain: {domains}. Pixel art and hand drawings occur in the test split alone (domain shift); the few
  hand drawings are too few for a figure of their own. Shots are plain.
- Base-to-new: the first {num_base} classes in the order of the labels are base, the others new.
- Classes with fewer than 16 training images: {rare}.
- Synonyms (trash, bin, delete) are merged by the list in `../scripts/icon_names.py`.
- Near-duplicates are gone: an image is dropped when its drawing, scaled to 24 x 24 by its bounding box, correlates
  above 0.97 with any pretraining image (the highest value is kept in `pretraining_correlation`) or with another image
  of the set.
- Icon names are what their designers called them: some are ambiguous, so 100 % is not attainable.

Licences: {licences}. Authors are in each row and in NOTICE.

Classes: {classes}.

Built by `../scripts/build_datasets.py`.
"""

EMOJI_CARD = """\
# emoji: an unseen vendor in three styles

Microsoft's Fluent emoji (MIT), 48 px on white. The bundled models never saw this vendor; they were trained on the
emoji of others. Each file has two label columns: `label`, the CLDR subgroup ({num_classes} classes), and `concept`,
the emoji itself ({num_concepts} classes).

{splits}

Files without suffix are the flat style; `_3d` and `_high_contrast` (one colour) are the same concepts in other styles,
for domain shift. Splits are by concept: the test emoji are other drawings of other things than the shots, in every
style.

- Columns: `image`, `label`, `concept`, `style`, `seen`, `set`, `icon`, `licence`, `author`, `pretraining_correlation`,
  `nearest_in_pretraining`.
- `seen` is false for concepts whose name was kept out of all pretraining captions, icons and other vendors included
  (flat: {unseen}). Their words may occur in other captions.
- Classes are small: the smallest have fewer than 16 shots; see the table.
- Subgroups of plain shapes, signs, clocks and flags are left out, and so are drawings that correlate above 0.97 with
  any pretraining image (see `../icons/README.md`) or within a style with each other.

Classes: {classes}.

Built by `../scripts/build_datasets.py`. Names and subgroups: emojibase-data (MIT).
"""

FASHION_CARD = """\
# fashion: photos of clothing

Fashion-MNIST (Zalando SE, MIT), from the Debian package `dataset-fashion-mnist`: a domain far from icons, where
zero-shot accuracy is low and adaptation gains much.

{splits}

Columns: `image` (48 px, grey, inverted to a white background, enlarged from 28 px), `label` (`ClassLabel`),
`source_row` (row in the official training or test file). `train` and `val` come from the official training photos,
`test` holds the first 300 photos of each class of the official test file. Photos of one garment look alike, so here
only near-copies (correlation above 0.99 with a test photo) are dropped from the shots.

Built by `../scripts/build_datasets.py`.
"""

ASSETS_README = """\
# Bundled models and data

Real, small, and made by scripts in this repository: nothing here needs a model hub. Not part of the installed package.

{sizes}

- `clip_student`, `clip_teacher`: CLIPs trained from scratch on openly licensed icons and emoji
- `mllm_llava`, `mllm_idefics3`, `mllm_paligemma`: multimodal language models of three families; they name drawings
  and colours
- `icons`, `emoji`, `fashion`: image classification sets that no bundled model was trained on
- `pretraining`: a part of the training images with their names as labels, for prompt pretraining (RPP)
- `pretraining_images.parquet`: every training image by collection and name, with a hash of its pixels
- `collections.json`: every collection with author, licence and use; the NOTICE file is made from it

Zero-shot top-1 accuracy (%):

{accuracies}

Answers of the multimodal models (%):

{answers}

Each folder has its own README with what it is, how it was made and what its limits are.

## How it was made

```bash
cd examples/assets/scripts
pip install -r requirements.txt
python build_corpus.py --cache DOWNLOADS --output CORPUS        # 2 minutes; fetches with npm and apt-get
python build_datasets.py --cache DOWNLOADS --corpus CORPUS      # 2 minutes; icons, emoji, fashion
python build_pretraining_set.py --corpus CORPUS --committed     # the labelled part of the corpus
python write_notice.py --cache DOWNLOADS                        # collections.json and NOTICE
python train_clip.py --corpus CORPUS --architecture student --pairs 760000 --output RUN
python train_clip.py --corpus CORPUS --architecture teacher --grow-from RUN/model --pairs 640000 --minutes 50 \\
    --masked-share 0.7 --muon-lr 3.5e-3 --adam-lr 7e-4 --constant-share 0.1 --emoji-repeats 2 --output RUN2
python evaluate_clip.py ../clip_student --write                 # after copying RUN/model there
python train_mllm.py --corpus CORPUS --family llava --seed 0 --minutes 20 --output RUN3
python train_mllm.py --corpus CORPUS --family llava --seed 0 --minutes 32 --output RUN3          # goes on
python evaluate_mllm.py ../mllm_llava --images 300 --write      # after copying RUN3/model there
                                                                # the same with idefics3, seed 1, and paligemma, seed 2
python write_cards.py
```

Training resumes by itself when it is started again, logs to `training_log.json`, and uses a GPU when there is one.
The teacher's `--minutes` ends the run (learning rate at zero) when the pairs are not reached in time; elsewhere give
the pairs of its card instead. On a shared CPU, `MALLOC_MMAP_THRESHOLD_=4294967296` and
`MALLOC_TRIM_THRESHOLD_=17179869184` in the environment keep glibc from returning memory after every operation.
The `--minutes` of `train_mllm.py` are CPU minutes; it can be given `--threads 2`.
`python train_clip.py --smoke --output RUN`, and `train_mllm.py` likewise, trains a tiny model for 30 seconds on the
committed icons.
"""
