"""Data: TFDS sources, own pictures, grain pipelines, augmentation, the bundled digits and sonnets.

- `examples`: what a source of data must have
- `sources`: TFDS's sets of pictures; `builders`, `download`, `preparation`, `cache`, `digits`: how
  they come to be there
- `own`: own pictures, in a `folder` of `files` or in `arrays`; `pictures`: in memory, scaled
- `named`: the pictures that a command line names
- `text`, `ngrams`: texts, and how likely their bytes are
- `pipeline`, `augment`, `randaugment`: batches of examples in random order, changed at random

Import the module that you need, so that nothing waits for what it does not use: `sources`, `own`,
`digits` and `text` import TFDS; `pipeline`, `augment` and `text` import grain.

    from terminator_jax.data import pipeline, sources

    digits = sources.open_split("digits", "train")
    batch = next(pipeline.train_batches(digits, 32, seed=0))
    batch["image"].shape, batch["label"].shape  # (32, 8, 8, 1), (32,)
"""
