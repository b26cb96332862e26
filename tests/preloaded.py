"""Everything that a forked training needs, imported once in the process that forks them."""

import gc

import matplotlib.backends.backend_agg  # noqa: F401
import PIL.Image

import tests.short_run  # noqa: F401

PIL.Image.init()
gc.collect()
gc.freeze()  # children need not walk through what they inherit
