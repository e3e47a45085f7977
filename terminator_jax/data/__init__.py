"""Data: TFDS sources, grain pipelines, augmentation and the bundled digits.

Import the module that you need, so that nothing waits for what it does not use: `sources` and
`digits` import TFDS, `pipeline` and `augment` import grain, `errors` and `cache` neither.

    from terminator_jax.data import pipeline, sources

    digits = sources.open_split("digits", "train")
    batch = next(pipeline.train_batches(digits, 32, seed=0))
    batch["image"].shape, batch["label"].shape, batch["mask"].shape  # (32, 8, 8, 1), (32,), (32,)
"""
