"""The configuration of a run: reads, validates, saves and compares it.

An experiment is a file with a function `get_config()` that starts from `default_config()` and
changes what it needs:

    from terminator_jax.training.config import default_config

    def get_config():
        config = default_config()
        config.data.name = "mnist"
        config.optimizer.learning_rate = 0.001
        return config
"""

import contextlib
import copy
import dataclasses
import difflib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from terminator_jax.errors import InputError, one_line
from terminator_jax.loading import lists_to_tuples
from terminator_jax.models import make_config
from terminator_jax.training.paths import experiment_file, split_argument
from terminator_jax.training.validation import check, find, flatten, short

# The beginning of a flag for an option of the model.
OPTION_FLAG = "--config.model.options."

# Fields that may differ when a run resumes: how long it goes on, and what does not change what it
# computes.
RESUMABLE_FIELDS = {
    "checkpoint_every_steps",
    "early_stopping_epochs",
    "compilation_cache",
    "data.data_dir",
    "data.download",
    "data.in_memory",
    "diagnostics_every_steps",
    "epochs",
    "keep_every_epochs",
    "log_every_steps",
    "on_nonfinite",
    "profile",
    "remat",
}


def default_config() -> ConfigDict:
    """Returns every field with a default of its type; locked, so that a misspelt one is an error.

    Example:
        >>> default_config().optimizer.name
        'kar3'
    """
    config = ConfigDict(
        dict(
            seed=0,  # initial parameters, order of the examples, augmentation, dropout
            epochs=30,
            batch_size=64,  # over all devices and processes
            accumulate_steps=1,  # batches whose gradients are averaged for one update
            ema_decay=0.0,  # of the moving average of the parameters; 0 for none
            eval_batch_size=64,
            parallel="pmap",  # or "jit", which divides one program of the whole batch
            dtype="float32",  # of the computation: or "bfloat16"; "float64" with JAX_ENABLE_X64=1
            remat=False,  # recomputes each block in the backward pass: less memory, more time
            profile=False,  # writes a trace of a few steps into the workdir
            compilation_cache=True,  # keeps compiled programs in the user's cache directory
            log_every_steps=20,
            diagnostics_every_steps=0,  # norms by part, features by block; 0 for never
            on_nonfinite="stop",  # at a loss or gradient of NaN or infinity; or "skip" the step
            best_metric="",  # of an evaluation, for the best checkpoint; "" is the task's own
            checkpoint_every_steps=500,  # besides the end of each epoch; 0 for only that
            keep_every_epochs=0,  # checkpoints to keep besides the last and the best; 0 for none
            early_stopping_epochs=0,  # ends a run after so many without a better one; 0 for never
            init_from="",  # a run, its model.safetensors or a release's file with the first values
            freeze="",  # a regular expression: parameters whose names it finds are not trained
            model=dict(
                name="terminator",
                variant="cifar",
                options=dict(),  # fields of the variant to replace
            ),
            data=dict(
                name="cifar10",
                train_split="train",
                eval_split="test",
                data_dir="",  # "" is $TFDS_DATA_DIR or TFDS's own default
                download=True,  # what is not prepared yet
                in_memory=True,  # decodes all images at the start
                resize=0,  # pixels per side; 0 keeps the size
                channels=0,  # 1, 3 or 4 converts all images; -1 to what most have; 0 keeps them
                match_classes="name",  # of data with those of a trained model; or "number"
                eval_fraction=0.1,  # of own images without splits, the part for `test`
                split_seed=0,  # decides which images these are
                stratify=True,  # takes this part of each class
                mean=(0.5,),  # per channel, of pixels in [0, 1]
                std=(0.25,),
                padding=0,  # pixels by which the random crop may shift; 0 for no crop
                padding_mode="symmetric",  # or "zeros"
                flip=False,
                rand_augment=0,  # operations of RandAugment that change each picture; 0 for none
                rand_augment_strength=0.3,  # of the largest change by each of them
                mixup_alpha=0.0,  # MixUp's alpha; 0 disables it
                cutmix_alpha=0.0,  # CutMix's; with both, each image has one of them
                sequence=False,  # images become sequences of pixels, row by row
                permutation=(),  # order of a sequence's pixels; () keeps it
                grid=(16, 16),  # rows and columns of bytes of a text
                hidden=0.5,  # share of a text's bytes that evaluation masks
                hidden_seed=0,  # decides which bytes these are
            ),
            loss=dict(
                label_smoothing=0.09,
                slow_neural=1.0,  # weight of the slow neural loss
                channel_sum=False,  # sums the channels before the difference
                l2=5e-5,
            ),
            optimizer=dict(
                name="kar3",
                learning_rate=0.001,
                warmup_epochs=2.0,
                beta1=0.5,  # kar3
                beta2=0.95,  # kar2, kar3
                momentum=0.9,  # sgd
                weight_decay=1e-4,  # adamw, of weights only: see optimizer.decay_mask
                clip_norm=0.0,  # the largest norm of the whole gradient; 0 for any
            ),
        )
    )
    return config.lock()


def published_recipe() -> ConfigDict:
    """Returns the published network and recipe for 32×32 images; an experiment names its data.

    Example:
        >>> published_recipe().optimizer.learning_rate
        0.001215
    """
    config = default_config()
    config.epochs = 100
    config.batch_size = 64
    config.eval_batch_size = 80
    config.model.variant = "cifar"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.padding = 4
    config.data.padding_mode = "symmetric"
    config.data.flip = True
    config.optimizer.name = "kar3"
    config.optimizer.learning_rate = 0.001215
    config.optimizer.warmup_epochs = 8.0
    return config


def read(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads an experiment's file, applies `overrides` and validates the result.

    Args:
        path: a Python file with a function `get_config()`, or the name of one: see
            `paths.experiment_file`. It may import its neighbours. After a colon, as in
            `file.py:small`, comes an argument for `get_config`.
        overrides: as on the command line: `["--config.optimizer.learning_rate=0.01"]`.

    Raises:
        InputError: if there is no such file, it fails, or a field is unknown, of the wrong type or
            out of range.
    """
    name, argument = split_argument(path)
    path = experiment_file(name)
    try:
        with _importing_from(path.absolute().parent):
            config = runpy.run_path(str(path))["get_config"](*argument)
    except Exception as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{_place(path, error)} fails: {problem}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config() of {path} must return a ConfigDict, not {config!r:.40}")
    return override(config, overrides)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets a file import its neighbours, which are forgotten: those of another may be named so."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder:
                del sys.modules[name]


def _place(path: Path, error: Exception) -> str:
    """Returns the last line of an experiment's file, or of its neighbours, that led to an error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).absolute().parent == path.absolute().parent]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(path)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a configuration with flags such as `--config.data.flip=True` applied; validates it.

    Example:
        >>> config = default_config()
        >>> override(config, ["--config.epochs=3"]).epochs, config.epochs
        (3, 30)
        >>> override(default_config(), ["--config.epoch=3"])
        Traceback (most recent call last):
        ...
        terminator_jax.errors.InputError: there is no config.epoch: did you mean config.epochs?
    """
    options = [argument for argument in overrides if argument.startswith(OPTION_FLAG)]
    config = copy.deepcopy(config)  # absl changes what it is given; references stay references
    config = _parse(config, [argument for argument in overrides if argument not in options])
    if options:
        config = _parse(_with_options(config, options), options)
    check(config, default_config())
    return config


def _parse(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies flags; raises InputError for one that does not fit."""
    for argument in overrides:
        _check_field(config, argument)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=["", *overrides]
        )
        positional = values(["", *overrides])[1:]
    except flags.Error as error:
        raise InputError(_flag_error(config, error)) from error
    if positional:
        raise InputError(f"unexpected argument {positional[0]!r}: fields are --config.name=value")
    return values.config


def _with_options(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Adds the variant's own value of each option that a flag names to the configuration.

    A flag can only change a field that exists and whose type is known.
    """
    try:
        variant = make_config(config.model.name, config.model.variant, {})
    except ValueError as error:
        raise InputError(str(error)) from error
    known = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    own = {}
    for argument in arguments:
        name, equals, _ = argument.removeprefix(OPTION_FLAG).partition("=")
        if not equals:
            raise InputError(f"{argument} has no value: write {argument}=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"there is no config.model.options.{name}: {hint}")
        own[name] = known[name]
    with config.unlocked():
        config.model.options = own | config.model.options.to_dict()
    return config


def _check_field(config: ConfigDict, argument: str) -> None:
    """Raises InputError if the flag is not one for a field that exists."""
    flag = argument.split("=", 1)[0].lstrip("-")
    if not argument.startswith("-"):
        return  # the value of the flag before it
    if not flag.removeprefix("no").startswith("config."):
        raise InputError(f"unknown flag {argument!r}: --help lists them; fields are --config.…")
    find(config, flag.split(".", 1)[1])


def _flag_error(config: ConfigDict, error: flags.Error) -> str:
    """Rewords absl's "flag --config.a=b: reason"."""
    text = one_line(error)
    flag, _, value = text.removeprefix("flag --config.").partition("=")
    if not value:
        return text
    wanted = type(find(config, flag)).__name__
    return f"config.{flag} must be of type {wanted}, not {value.split(': ')[0]!r}"


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads a configuration that `to_json` wrote, and validates it.

    Fields that are newer than the text get their defaults, which do not change a run.

    Raises:
        InputError: if it has other fields than this version knows.
    """
    found = lists_to_tuples(json.loads(text))
    if not isinstance(found, dict):
        raise InputError(f"a configuration must be a JSON object, not {short(found):.40}")
    values = _fill_defaults(found, default_config().to_dict())
    try:
        config = ConfigDict(values)
    except (TypeError, ValueError, AttributeError) as error:  # of a name that no field can have
        raise InputError(f"no configuration: {one_line(error)}") from error
    check(config, default_config())
    return config.lock()


def _fill_defaults(values: Any, defaults: Any) -> Any:
    """Returns `values` with the defaults of missing fields."""
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    both = {name: _fill_defaults(values.get(name, own), own) for name, own in defaults.items()}
    return {**both, **{name: value for name, value in values.items() if name not in both}}


def differences(saved: ConfigDict, wanted: ConfigDict) -> dict[str, str]:
    """Returns both values of the fields that differ, except those that may when a run resumes.

    Example:
        >>> other = default_config()
        >>> other.batch_size = 32
        >>> differences(default_config(), other)
        {'batch_size': '64 there, 32 now'}
    """
    old, new = dict(flatten(saved)), dict(flatten(wanted))
    if old["init_from"] and new["init_from"]:  # two spellings of one path are the same
        old, new = ({**c, "init_from": os.path.realpath(c["init_from"])} for c in (old, new))
    return {
        path: f"{short(old.get(path))} there, {short(new.get(path))} now"
        for path in sorted((old | new).keys() - RESUMABLE_FIELDS)
        if old.get(path) != new.get(path)
    }


def changes(config: ConfigDict) -> list[tuple[str, str, str]]:
    """Lists the fields that are not as in `default_config()`: path, value, and that default.

    Example:
        >>> changes(override(default_config(), ["--config.epochs=3"]))
        [('epochs', '3', '30')]
    """
    known = dict(flatten(default_config()))
    return [
        (path, short(value), short(known[path]) if path in known else "that of the variant")
        for path, value in flatten(config)
        if path not in known or value != known[path]
    ]
