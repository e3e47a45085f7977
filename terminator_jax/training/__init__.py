"""The training application: configuration, task, examples, state, step, parallelism, checkpoints,
logs, loop.

`loop.train(config, workdir)` is the whole of it; `python -m terminator_jax.train` calls that.
"""
