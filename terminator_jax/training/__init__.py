"""The training application; `python -m terminator_jax.train` calls `loop.train(config, workdir)`.

- `config`, `validation`, `paths`: the fields of a configuration; `experiments/` changes them
- `cli`: what the commands share
- `tasks`: what is trained for: data, loss, metrics; a new modality is a class there
- `setup`, `initial`, `freezing`: put together devices, data, model, optimizer and first values
- `loop`: trains, logs, evaluates, saves
- `state`, `step`, `optimizer`, `averages`, `parallel`: the functions of a step and how they run
- `checkpoint`, `integrity`, `lock`, `provenance`: what a run keeps, and that it is whole
- `recorder`, `logs`, `history`, `meter`, `metrics`, `diagnostics`, `card`, `curve`, `trace`: what a
  run tells
- `interrupt`, `distributed`: signals, and other processes
- `evaluation`, `report`, `generation`: the other commands
- `compilation_cache`: compiled programs that are kept
"""
