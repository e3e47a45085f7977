"""The training application; `python -m terminator_jax.train` calls `loop.train(config, workdir)`.

- `config`: the fields of a configuration, `experiments/` changes them
- `tasks`: what is trained for: data, loss, metrics; a new modality is a class there
- `setup`: puts together devices, data, model, optimizer and state
- `loop`: trains, logs, evaluates, saves
- `state`, `step`, `optimizer`, `parallel`: the pure functions of a step and how they run
- `checkpoint`, `logs`, `metrics`, `trace`, `interrupt`: what the loop uses
- `evaluation`, `generation`: the other two commands
"""
