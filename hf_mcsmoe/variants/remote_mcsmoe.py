"""Models whose forward a variant changes, saved as remote code. This file travels with every checkpoint of one.

A variant is one file beside this one, `<name>_mcsmoe.py`, with a subclass of `VariantModel`. The class of a model is
generated from it and a class of Transformers; `config.variant` holds the variant's name and its options. A folder gets
the files that the variant's file imports, directly or not, with imports of the package turned into relative ones.
"""

import copy
import importlib
import inspect
import os
import re
import tempfile
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from hf_mcsmoe.modeling.companions_mcsmoe import copy_companions, source_of
from hf_mcsmoe.modeling.configuration_mcsmoe import PREFIX, auto_map, class_prefix
from hf_mcsmoe.modeling.folders_mcsmoe import COMMIT_ARGUMENTS, completed_folder, repository
from hf_mcsmoe.modeling.generated_mcsmoe import library_class, library_name, model_class, serve_generic_heads

MODEL_TYPE, OF = "mcsmoe_variant", "Variant"
# An import of a file that travels, in the package and beside a checkpoint.
IMPORT = re.compile(r"^from (?:hf_mcsmoe\.(?:modeling|variants))?\.(\w+_mcsmoe) import", re.MULTILINE)


class VariantConfigMixin:
    """What a family's configuration gains: its own name, and the variant's name and options."""

    model_type = MODEL_TYPE
    base_model_type: str | None = None
    variant: dict | None = None
    # Made with the class: some models call `to_dict` in their forward, where a compiler cannot follow imports.
    auto_classes: ClassVar[dict[str, str]] = {}
    variant_name: ClassVar[str | None] = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for `config.json`."""
        output = super().to_dict()
        output["auto_map"] = dict(self.auto_classes)
        return output


class VariantConfig(VariantConfigMixin, PreTrainedConfig):
    """Entry point of `AutoConfig`: answers with the generated configuration of the family that a file names."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of `config_dict["base_model_type"]` with its variant.

        Raises:
            ValueError: it names no family that the installed Transformers knows, or no variant.
        """
        variant = config_dict.get("variant")
        if not isinstance(variant, dict) or not {"name", "options"} <= variant.keys():
            raise ValueError(
                f"`variant` must hold `name` and `options`, not {variant!r}. The config.json was edited: take "
                "it from the original checkpoint."
            )
        config_class = config_class_for(variant["name"], config_dict.get("base_model_type"))
        return config_class.from_dict(config_dict, **kwargs)


def config_class_for(variant: str, base_model_type: str | None) -> type[PreTrainedConfig]:
    """Return the generated configuration class of a variant of a family.

    Raises:
        ValueError: the installed Transformers does not know the family.
    """
    if not isinstance(base_model_type, str) or base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"AutoConfig of this Transformers knows no model type {base_model_type!r}, so a variant of it could not "
            "be loaded: it is not supported. A later version of transformers may know it."
        )
    return generated_config(class_prefix(variant) + OF + CONFIG_MAPPING[base_model_type].__name__)


@cache
def generated_config(name: str) -> type[PreTrainedConfig]:
    """Return the class called `<prefix>Variant<BaseConfig>`.

    Raises:
        AttributeError: `name` does not name a configuration class of Transformers.
    """
    prefix, _, base_name = name.partition(OF)
    base = getattr(importlib.import_module("transformers"), base_name, None) if base_name else None
    if not isinstance(base, type) or not issubclass(base, PreTrainedConfig):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    code = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in prefix).strip("_")
    paths = {key: path.rpartition(".")[2].removeprefix(PREFIX) for key, path in auto_map(base.model_type).items()}
    classes = {key: f"{code}_mcsmoe.{prefix}{model}" for key, model in paths.items()}
    fields = {
        "__module__": __name__,
        "__doc__": f"`{base.__name__}` of a model whose forward a variant changes.",
        "__annotations__": {"base_model_type": str | None, "variant": dict | None},
        "base_model_type": base.model_type,
        "auto_classes": classes | {"AutoConfig": f"{Path(__file__).stem}.{VariantConfig.__name__}"},
        "model_type": MODEL_TYPE,
        "variant": None,
        "variant_name": code,
    }
    return type(name, (VariantConfigMixin, base), fields)


class VariantModel:
    """First base of the generated model classes: changes the modules after `__init__`, and saves a complete folder."""

    # Begins the names of the generated classes; `class_prefix` of the variant's name.
    prefix: ClassVar[str]
    # Whether the variant brings experts that the library's implementations compute, whatever the family.
    brings_experts: ClassVar[bool] = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the base model for `config`, then change it as the variant's options say."""
        serve_generic_heads(config, partial(generated, _mixin(type(self))))
        wanted = config._experts_implementation
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        change(self, config.variant["options"])
        _choose_implementation(self, wanted)
        self.init_weights()  # of what is new

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return what is asked for; while a dense base model is built, which has no experts, the one that it takes."""
        if self.brings_experts and not vars(self).get("has_own_experts"):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def install(self, **options: Any) -> None:
        """Change the modules of a model of the library, which is empty or holds its weights."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VariantModule):
            module.init_weights(getattr(self.config.get_text_config(), "initializer_range", 0.02))
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a complete folder: weights, configuration, code, and what lay beside the source's weights.

        Written beside the target and moved in when complete. Takes the arguments of
        `PreTrainedModel.save_pretrained`, and a `tokenizer` in place of the source's.

        Raises:
            ValueError: the model carries adapters, or the folder is that of the model it was made from.
        """
        given = (
            inspect.signature(PreTrainedModel.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        )
        kwargs = {key: value for key, value in given.items() if key not in ("self", "save_directory", "kwargs")}
        kwargs |= given.get("kwargs", {})
        target, is_main = Path(os.path.realpath(save_directory)), kwargs.get("is_main_process", True)
        push_to_hub = kwargs.pop("push_to_hub", False) and is_main
        repo_id, private = kwargs.pop("repo_id", target.name), kwargs.pop("private", None)
        commit = {key: kwargs.pop(key) for key in COMMIT_ARGUMENTS if key in kwargs}
        if push_to_hub:
            api, repo_id = repository(repo_id, private, kwargs.get("token"), commit.get("revision"))
        if not self.should_save_on_this_rank(is_main):
            with tempfile.TemporaryDirectory() as scratch:  # which stays empty
                super().save_pretrained(scratch, **kwargs)
            return
        self._check_savable(target, kwargs.get("state_dict"))
        with completed_folder(target) as folder:
            self._save_with_code(folder, **kwargs)
            written = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        if push_to_hub:
            api.upload_folder(repo_id=repo_id, folder_path=target, allow_patterns=written, **commit)

    def _check_savable(self, target: Path, state: Any) -> None:
        if state is None and any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError(
                "The model carries adapters of PEFT, whose names no load would know: call merge_and_unload() of the "
                "PEFT model first, or save the adapters alone with the PEFT model's save_pretrained."
            )
        source = source_of(self)
        if source and target == source and not (source / "remote_mcsmoe.py").is_file():
            raise ValueError(
                f"{target} holds the original model, which saving here would destroy: name another folder."
            )

    def _save_with_code(self, folder: Path, tokenizer: Any = None, **kwargs: Any) -> None:
        # The base family's reverse conversion would take fused experts apart, and no load would join them.
        super().save_pretrained(folder, **kwargs | {"save_original_format": False})
        copy_code({path.partition(".")[0] for path in type(self.config).auto_classes.values()}, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if source := source_of(self):
            copy_companions(source, folder, () if tokenizer is None else ("tokenizer",))


class VariantModule(nn.Module):
    """Base of a variant's own modules, which have weights of their own."""

    def init_weights(self, std: float) -> None:
        """Fill what no checkpoint filled, by functions of `transformers.initialization`."""


def variant_name(mixin: type) -> str:
    """Return the name of a variant: that of its file, without "_mcsmoe"."""
    return mixin.__module__.rpartition(".")[2].removesuffix("_mcsmoe")


def become(model: PreTrainedModel, mixin: type[VariantModel], options: dict[str, Any]) -> None:
    """Turn a model of Transformers, in place, into that of a variant with these options.

    Args:
        options: arguments of the variant's `install`, of types that JSON knows.

    Raises:
        ValueError: the model is of no class of Transformers itself, is spread over devices or offloaded, or `install`
            refuses it.
    """
    cls = subclass(mixin, type(model))  # first, since it may refuse
    base_model_type = type(model.config).model_type
    config_class = config_class_for(variant_name(mixin), base_model_type)
    check_whole(model)
    mixin.install(model, **options)
    own_configs(model)
    config = model.config
    config.__class__ = config_class
    # Instance attributes would win over the class's; the base's name would choose the base's weight conversions.
    for stale in ("model_type", "auto_map", "architectures"):
        vars(config).pop(stale, None)
    config.base_model_type = base_model_type
    config.variant = {"name": variant_name(mixin), "options": options}
    model.__class__ = cls
    vars(model).pop("_weight_conversions", None)
    _adopt(model, mixin)
    _choose_implementation(model, None)


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose forwards Accelerate has replaced, where a change of class would do nothing.

    Raises:
        ValueError: the model is spread over devices or offloaded, or some of its weights are not there.
    """
    hooked = any("_hf_hook" in vars(module) for module in model.modules())
    if hooked or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is spread over devices, offloaded or without weights, so that a change of its "
            "modules would have no effect: load it without device_map, change it, save it, and load that with one."
        )


def check_counts(**numbers: Any) -> None:
    """Raise ValueError where a number, by its name, is no whole one from 1 on."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, not {number!r}.")


def own_configs(model: nn.Module) -> None:
    """Give a model a copy of each configuration in it, which other models may share, to be changed freely."""
    copies: dict[int, Any] = {}  # as deepcopy keeps them: what is the same object stays so, also a part of another
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, copies)


def _choose_implementation(model: Any, wanted: str | None) -> None:
    """Set by what implementation a variant's own experts are computed."""
    if model.brings_experts:
        vars(model)["has_own_experts"] = True
        model.config._experts_implementation = model.get_correct_experts_implementation(wanted)


def change(model: Any, options: dict[str, Any]) -> None:
    """Install a variant in a model just built, unless the base model inside of it did so already."""
    if not any(isinstance(module, VariantModel) for module in model.modules() if module is not model):
        model.install(**options)
    _adopt(model, _mixin(type(model)))


def _adopt(model: Any, mixin: type) -> None:
    """Re-class the library models inside `model`, so that none is converted to the base family's file format.

    And let what a device map must not split go by the names that its classes have now.
    """
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and not isinstance(module, VariantModel):
            module.__class__ = subclass(mixin, type(module))
    bases = {type(module): vars(type(module)).get("generated_from") for module in model.modules()}
    whole = set(model._no_split_modules or ())
    model._no_split_modules = whole | {cls.__name__ for cls, base in bases.items() if base and base.__name__ in whole}


def _mixin(cls: type) -> type[VariantModel]:
    """Return the variant's own base of a generated class, or of one that is made of it."""
    return next(base for base in cls.__mro__ if "generated_from" in vars(base)).__bases__[0]


def subclass(mixin: type, base: type[nn.Module]) -> type[Any]:
    """Return the generated subclass `<prefix><base>` of a mixin and a class of Transformers.

    Args:
        mixin: its `prefix` begins the name, and its module's `__getattr__` leads to `generated_in`.

    Raises:
        ValueError: the class is not one of Transformers, so a checkpoint could not name it.
    """
    name = library_name(base)
    if name is None:
        raise ValueError(
            f"{base.__name__} is defined in {base.__module__}, not in Transformers: a variant is made of a model of "
            "one of Transformers' own classes, neither of a compressed one nor of another variant."
        )
    return generated(mixin, mixin.prefix + name)


def generated_in(mixins: tuple[type, ...], name: str) -> type[Any]:
    """Return the generated class of a name that a variant's file is asked for.

    Raises:
        AttributeError: the name leads to no class of Transformers.
    """
    for mixin in sorted(mixins, key=lambda mixin: -len(mixin.prefix)):
        if name.startswith(mixin.prefix):
            return generated(mixin, name)
    raise AttributeError(f"module {mixins[0].__module__!r} has no attribute {name!r}")


@cache
def generated(mixin: type, name: str) -> type[Any]:
    """Return the class called `<prefix><Base>`, or `<prefix><Base>__<module>` where Transformers exports no `Base`.

    Raises:
        AttributeError: the name leads to no class of Transformers.
    """
    base = library_class(name.removeprefix(mixin.prefix))
    if base is None:
        raise AttributeError(f"module {mixin.__module__!r} has no attribute {name!r}")
    fields: dict[str, Any] = {
        "__module__": mixin.__module__,
        "__qualname__": name,
        "__doc__": f"`{base.__name__}` as {mixin.__name__} changes it.",
        "generated_from": base,
    }
    if not issubclass(base, PreTrainedModel):
        return type(name, (mixin, base), fields)
    # Read off the source of a class's module, which for a generated class is the variant's file.
    brings = mixin.brings_experts or base._can_set_experts_implementation()
    fields["_can_set_experts_implementation_cached_value"] = brings
    fields["_can_set_attn_implementation_cached_value"] = base._can_set_attn_implementation()
    return model_class(
        name, mixin, base, lambda config: config_class_for(variant_name(mixin), config.model_type), fields
    )


def copy_code(entries: Iterable[str], folder: Path) -> None:
    """Copy files of code and all that they import of ours into `folder`, where they import each other relatively.

    Args:
        entries: their names, which those of classes in `auto_map` begin with.
    """
    names, done = [*entries], set[str]()
    while names:
        name = names.pop()
        if name in done:
            continue
        text = _source(name).read_text(encoding="utf-8")
        names += IMPORT.findall(text)
        done.add(name)
        (folder / f"{name}.py").write_text(IMPORT.sub(r"from .\1 import", text), encoding="utf-8")


def _source(name: str) -> Path:
    """Return where a file that travels lies: beside this one, or in the package's other room of such files."""
    here = Path(__file__).parent / f"{name}.py"
    return here if here.is_file() else Path(__file__).parents[1] / "modeling" / f"{name}.py"


def __getattr__(name: str) -> type[PreTrainedConfig]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return generated_config(name)
