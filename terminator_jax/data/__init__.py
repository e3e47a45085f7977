"""Data: TFDS sources, own pictures, grain pipelines, augmentation, the bundled digits and sonnets.

Import the module that you need, so that nothing waits for what it does not use: `sources`,
`folder`, `digits` and `text` import TFDS, `pipeline`, `augment` and `text` import grain, `errors`,
`cache`, `examples`, `files`, `pictures` and `ngrams` neither.

    from terminator_jax.data import pipeline, sources

    digits = sources.open_split("digits", "train")
    batch = next(pipeline.train_batches(digits, 32, seed=0))
    batch["image"].shape, batch["label"].shape  # (32, 8, 8, 1), (32,)
"""
