"""One small block on the bundled sonnets, without compiled programs kept."""

from terminator_jax.training.config import default_config


def get_config():
    config = default_config()
    config.epochs = 2
    config.batch_size = 16
    config.eval_batch_size = 16
    config.log_every_steps = 5
    config.compilation_cache = False
    config.model.name = "nonlinear_transformer"
    config.model.variant = "tiny"
    config.model.options = dict(channels=16, layers=2, window=1, global_every=2, vocabulary=128)
    config.data.name = "sonnets"
    config.data.grid = (6, 10)
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_epochs = 0.5
    return config
