"""Settings that name inputs: which they are, and the same settings with what they name brought."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from blindvalm_jax import addresses
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import inputs

if TYPE_CHECKING:
    from blindvalm_jax.config import Config

GLOBS = ("data.files", "data.eval_files", "eval.tasks")
DIRECTORIES = (
    *("data.windows", "data.images", "data.eval_images", "tokenizer.path", "grounding.tower"),
    *("grounding.tokenizer", "grounding.index", "grounding.prepared", "train.init_from"),
    "eval.tasks_data",
)
TFDS = "data.tfds_dir"
INPUTS = (*GLOBS, *DIRECTORIES, TFDS)


def brought(config: Config, *, but: Collection[str] = ()) -> Config:
    """The settings with paths of this machine in the place of addresses, all of it brought.

    but: settings that are left as they are. `places.as_given` is the way back.

    Raises:
      UserError: see `inputs.bring`.
    """
    for name in INPUTS:
        section, _, key = name.partition(".")
        text = getattr(getattr(config, section), key)
        unread = name in but or (name == TFDS and not config.data.tfds)
        if unread or not addresses.is_address(text):
            continue
        found = here(name, text, dataset=config.data.tfds)
        changed: Any = dataclasses.replace(getattr(config, section), **{key: found})
        config = dataclasses.replace(config, **{section: changed})
    return config


def bring_flags(inputs_of: Mapping[str, str]) -> None:
    """Gives flags paths of this machine in the place of addresses, all of it brought.

    inputs_of: by the name of a flag the setting that it stands for; a flag "tfds" names a dataset.

    Raises:
      UserError: a flag is an address that cannot be one, or see `inputs.bring`.
    """
    given = {name: flags.FLAGS[name] for name in inputs_of if flags.FLAGS[name].value}
    if wrong := addresses.misfit({f"--{name}": flag.value for name, flag in given.items()}):
        raise UserError(wrong)
    dataset: Any = flags.FLAGS["tfds"].value if "tfds" in flags.FLAGS else ""
    for name, flag in given.items():
        setting = inputs_of[name]
        value: Any = flag.value
        if isinstance(value, list):
            flag.value = [here(setting, text) for text in value]
        elif addresses.is_address(value):
            flag.value = here(setting, value, dataset=dataset)


def here(name: str, text: str, *, dataset: str = "") -> str:
    """What an input's setting says, with all that it names brought; dataset: `data.tfds`."""
    if name == TFDS and dataset:  # there may be others beside it
        below = dataset.partition(":")[0].strip("/")
        return inputs.bring(f"{text.rstrip('/')}/{below}").removesuffix(f"/{below}")
    glob = name in GLOBS
    return addresses.replaced(text, lambda address: inputs.bring(address, glob=glob))
