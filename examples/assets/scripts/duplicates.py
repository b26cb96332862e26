"""Near-duplicate drawings: correlation of grey images after scaling each drawing's bounding box to 24 x 24."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pixels import on_white

THRESHOLD = 0.97
SIDE = 24


def _crop_to_drawing(grey: np.ndarray) -> np.ndarray:
    """The part of a grey image (rows, columns) that is not background (the brightest value at the border)."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    marked = np.abs(grey.astype(np.int16) - int(np.median(border))) > 24
    if not marked.any():
        return grey
    rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    return grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def fingerprint(image: np.ndarray) -> np.ndarray:
    """Zero-mean unit-norm vector (576,) of an image: grey, RGB, or RGBA over white, uint8."""
    if image.ndim == 3:
        rgb = on_white(image) if image.shape[-1] == 4 else image
        image = np.asarray(Image.fromarray(rgb).convert("L"))
    small = Image.fromarray(_crop_to_drawing(image)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def fingerprints(images: np.ndarray) -> torch.Tensor:
    """Fingerprints (images, 576) of a stack or list of images."""
    return torch.from_numpy(np.stack([fingerprint(image) for image in images]))


def nearest(queries: torch.Tensor, references: torch.Tensor, *, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Highest correlation of each query with any reference, and that reference's row.

    Candidates are found in bfloat16 and the best four are recomputed in float32.
    """
    low, best, rows = references.bfloat16(), [], []
    for part in queries.split(chunk):
        candidates = F.linear(part.bfloat16(), low).topk(min(4, len(references)), dim=1).indices
        exact = torch.einsum("nd,nkd->nk", part, references[candidates])
        value, index = exact.max(dim=1)
        best.append(value)
        rows.append(candidates.gather(1, index[:, None])[:, 0])
    return torch.cat(best).numpy(), torch.cat(rows).numpy()


def drop_twins(prints: torch.Tensor, *, threshold: float = THRESHOLD) -> np.ndarray:
    """Rows to keep so that no two of them correlate above `threshold`; of twins, the earlier row stays."""
    kept = torch.empty_like(prints)
    rows: list[int] = []
    for row, vector in enumerate(prints):
        count = len(rows)
        if count == 0 or float((kept[:count] @ vector).max()) <= threshold:
            kept[count] = vector
            rows.append(row)
    return np.array(rows)
