"""One small block on the digits, without compiled programs kept: what most tests train."""

from terminator_jax.training.config import default_config


def get_config():
    config = default_config()
    config.epochs = 2
    config.batch_size = 64
    config.eval_batch_size = 80
    config.log_every_steps = 5
    config.model.variant = "digits"
    config.model.options = dict(
        factors=(12,),
        skips=((),),
        dropout=(0.3,),
        branches=((3, "x", "h"),),
        global_layers=(1,),
        global_hidden=4,
        local_hidden=4,
        local_layers=1,
        channel_hidden=4,
        channel_layers=1,
        interaction_channel_hidden=4,
        interaction_spatial_hidden=4,
        interaction_layers=1,
    )
    config.data.name = "digits"
    config.data.mean = (0.305,)
    config.data.std = (0.376,)
    config.data.padding = 1
    config.data.padding_mode = "zeros"
    config.optimizer.learning_rate = 0.003
    config.optimizer.warmup_epochs = 1.0
    return config
