"""Names of tensor axes, used in every annotation of the package, and the batch that datasets hand to objectives.

| axis     | meaning                                                      |
|----------|--------------------------------------------------------------|
| batch    | images of one step                                           |
| classes  | class prompts; rows of the class features                    |
| selected | the classes that a sampling or skipping rule selects for a step |
| sampled  | an image's own class and the classes that a step has drawn |
| prompts  | tokenised texts (templates x classes)                        |
| tokens   | positions of one sequence, text or patches                   |
| slots    | positions of a sequence that a prompt takes                  |
| before, after | positions of a sequence before and after the slots      |
| vocabulary | token ids of a language model                              |
| width    | hidden size of one tower                                     |
| dim      | size of the space that image and text features share         |
| images   | all images of a dataset or a cache                           |
| teachers | teachers of one student                                      |
| channels, rows, cols | pixels                                           |
| canvas   | sides of the square that a pixel prompt is drawn on          |
| patches  | image patches of a batch, flattened one after the other      |
"""

from typing import TypedDict

from jaxtyping import Float, Int
from torch import Tensor


class Batch(TypedDict, total=False):
    """One batch as collated by the data side; an objective reads the columns it names in its Requirements.

    `pixel_values` are normalised with the mean and standard deviation of the model's image processor; `labels` index
    the class names; `index` is the position in the training dataset, which caches use as their key.

    Batches of questions about images also hold token ids of question and answer, `token_labels` (the answer's ids,
    -100 elsewhere), whatever columns the model's processor makes beside `pixel_values`, which then may have another
    shape, and the picture for a second model, a CLIP, normalised for that one.
    """

    pixel_values: Float[Tensor, "batch channels rows cols"]
    labels: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch tokens"]
    token_labels: Int[Tensor, "batch tokens"]
    clip_pixel_values: Float[Tensor, "batch channels rows cols"]
