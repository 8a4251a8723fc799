"""Plan -> apply -> report: a selection turns a dense model into a narrow one, in place."""
from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from stt.card import write_card
from stt.errors import InputError
from stt.heads import sites_named
from stt.hub import HUB_OPTIONS, check_not_quantized, declared_sliced, push_to_hub
from stt.mlps.fused import fuse_block
from stt.mlps.stt_linear import SiteLayout, STTLinear
from stt.narrow import narrow, narrowed_tensors, remember_widths
from stt.resize import resize
from stt.selection import FORMAT_VERSION, SELECTION, Ids, Selection
from stt.sites import Member, Site, Sites, projection_weight
from stt.surgery import narrow_state, replace_module, sliced_parameters

logger = logging.getLogger(__name__)

ALIGNED = 16  # bytes: what the rows of a grouped product must be a multiple of


class STTTransformer:
    """Replaces the projections of every selected site by narrow STTLinear layers; convolutions and stacks of experts
    lose their other channels where they are.

    `active_neurons` is a Selection, or a mapping from a site, one of its modules, or a key of `layer_name_map`, to unit
    ids. Everything is checked before the first change. Scatter mode of the STTLinear layers unless `inference_time`, as
    published.
    """

    def __init__(self, model: nn.Module, active_neurons: Mapping[str, Ids],
                 layer_name_map: Mapping[str, str] | None = None, device: torch.device | str | None = None,
                 verbose: bool = False, inference_time: bool = False):
        check_not_quantized(model)
        self.model = model if device is None else model.to(device)
        self.inference_time = inference_time
        self.verbose = verbose
        self.sites = sites_named(model, active_neurons, layer_name_map)
        self.selection = selection_for(self.sites, active_neurons, layer_name_map)
        self._dense_parameters = sum(p.numel() for p in model.parameters())

    def transform(self) -> nn.Module:
        """The model itself, sliced. The selection stays on it as `model.stt_selection`, the widths in its config.

        Raises InputError if it is sliced already: its units would no longer be those of the dense model.
        """
        if any(True for _ in sliced_parameters(self.model)):
            raise InputError("the model is sliced already: apply a selection to the dense model")
        chosen = [self.sites[name] for name in self.selection]
        plan = [(site, self._layers(site, self.selection[site.name])) for site in chosen if site.form == "linear"]
        in_place = [site for site in chosen if site.form != "linear"]
        narrow_tensors = narrowed_tensors(self.model, in_place, self.selection)
        remember_widths(self.model, in_place, self.selection)
        narrow(self.model, narrow_tensors)
        for site in in_place:
            if site.kind == "attention" and len(self.selection[site.name]) < site.width:
                resize(self.model, site, self.selection[site.name])
        if any(value.shape[-1] * value.element_size() % ALIGNED for site in in_place if site.form == "experts"
               for value in (narrow_tensors[member.tensor] for member in site.members)):
            self._compute_experts_one_by_one()
        for site, layers in plan:
            for member, layer in zip(site.members, layers, strict=True):
                replace_module(self.model, member.module, layer)
            SiteLayout(layers)
            fuse_block(self.model, site)
        self.model.stt_selection = self.selection.without_new_values()
        self.model.save_pretrained = functools.partial(_save_pretrained, self.model)
        self.model.push_to_hub = functools.partial(push_to_hub, self.model)
        sizes = {name: [len(ids), self.sites[name].width] for name, ids in self.selection.items()}
        base = self.model.config.name_or_path or None
        self.model.config.stt = {"format_version": FORMAT_VERSION, "base": base, "sites": sizes}
        if self.selection.new_values:
            self.model.config.stt["compensate"] = self.selection.meta.get("compensate", "by other values")
        if self.verbose:
            stats = self.get_parameter_stats()
            logger.info("sliced %d sites: %.1f %% of their neurons kept, %.1f %% of the model's parameters removed",
                        len(chosen), 100 * stats["kept_fraction_of_units"], stats["overall_model_reduction_perc"])
        return self.model

    def _compute_experts_one_by_one(self) -> None:
        """Instead of by transformers' grouped product, which takes no such width."""
        configs = {id(module.config): module.config for module in self.model.modules() if hasattr(module, "config")}
        for config in configs.values():
            if getattr(config, "_experts_implementation", None) == "grouped_mm":
                config._experts_implementation = "eager"
                logger.warning("a grouped product of experts needs rows of a multiple of %d bytes: they are computed "
                               "one by one, which is slower; keep a multiple of 8 units (--multiple_of 8)", ALIGNED)

    def get_parameter_stats(self) -> dict[str, float]:
        """Parameters before and now, and the share of units kept."""
        now = sum(p.numel() for p in self.model.parameters())
        units = sum(self.sites[name].width for name in self.selection)
        kept = sum(len(ids) for ids in self.selection.values())
        return {"original_parameters": self._dense_parameters, "parameters": now,
                "kept_fraction_of_units": kept / units,
                "overall_model_reduction_perc": 100 * (1 - now / self._dense_parameters)}

    def get_transformed_mlp_blocks(self) -> dict[str, nn.Module]:
        """The modules that hold the sliced sites, by site name."""
        return {name: self.model.get_submodule(name) for name in self.selection}

    def record_original_active_indices(self) -> dict[str, list[int]]:
        """Kept unit ids of every site, as lists."""
        return {name: ids.tolist() for name, ids in self.selection.items()}

    def _layers(self, site: Site, ids: torch.Tensor) -> list[STTLinear]:
        """The narrow layers of one site, in the order of its members."""
        layers = []
        for member in site.members:
            module = self.model.get_submodule(member.module)
            side = {"out_indices" if member.side == "out" else "in_indices": site.pick(member, ids)}
            layer = STTLinear.from_weights(projection_weight(module), module.bias, **side,
                                           inference_time=self.inference_time)
            if member.channels.shape[1] > 1:  # fused gate and up
                layer.blocks, layer.interleaved = _fused_order(member)
            for part in ("weight", "bias"):
                _fill(layer, part, self.selection.new_values.get(f"{member.module}.{part}"))
            layers.append(layer.train(module.training))
        return layers


def _fill(layer: STTLinear, part: str, value: torch.Tensor | None) -> None:
    """Put a value of a patch into the layer, in its dtype; a bias it has not yet is made."""
    if value is not None:
        shape = layer.weight.shape if part == "weight" else layer.weight.shape[:1]
        if value.shape != shape:
            raise InputError(f"the selection holds a {part} of {tuple(value.shape)} where the sliced layer has "
                             f"{tuple(shape)}: select again on this model")
        value = value.to(layer.weight.device, layer.weight.dtype)
        setattr(layer, part, nn.Parameter(value.clone(), layer.weight.requires_grad))


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True,
                     state_dict: Mapping[str, torch.Tensor] | None = None, push_to_hub: bool = False,
                     repo_id: str | None = None, **kwargs: object) -> None:
    """The class's save_pretrained without padding, and beside it the selection and, where there is none yet, a card:
    what any Trainer saves is read by `stt.load` and, after `import stt`, by `from_pretrained`."""
    check_not_quantized(model)
    upload = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    upload |= {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
    with declared_sliced(model):
        type(model).save_pretrained(model, save_directory, is_main_process, narrow_state(model, state_dict), **kwargs)
    is_adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
    if is_main_process and not is_adapter_alone:
        model.stt_selection.save(Path(save_directory) / SELECTION)
        write_card(model, Path(save_directory))
    if is_main_process and push_to_hub:
        model.push_to_hub(repo_id or Path(save_directory).name, **upload)


def apply(model: nn.Module, selection: Mapping[str, Ids]) -> nn.Module:
    """Slice `model` in place to the selected neurons, compact; the model itself.

    Raises InputError, before anything is changed, for a selection that does not fit it.
    """
    return STTTransformer(model, selection, inference_time=True).transform()


def _fused_order(member: Member) -> tuple[int, int]:
    """(blocks, depth): n consecutive blocks, one of each kind, or one block of n-tuples."""
    per_unit = member.channels.shape[1]
    is_chunked = int(member.channels[1, 0] - member.channels[0, 0]) == 1
    return (per_unit, 1) if is_chunked else (1, per_unit)


def _difference(sites: Sites, made_for: Mapping[str, int]) -> str:
    """How the sites (name -> width) that a selection was made for differ from those of the model at hand."""
    here = {name: site.width for name, site in sites.items()}
    if made_for == here:
        return "the same sites, but layers of other parameters or shapes"
    return (f"{len(made_for)} sites of widths {sorted(set(made_for.values()))}; this one has {len(here)} of "
            f"{sorted(set(here.values()))}")


def selection_for(sites: Sites, given: Mapping[str, Ids], layer_name_map: Mapping[str, str] | None = None) -> Selection:
    """`given` as a Selection over these sites. Raises InputError if it is empty, names something that is no site, was
    made for another model, or keeps no unit of a site."""
    meta = given.meta if isinstance(given, Selection) else {}
    if meta.get("fingerprint", sites.fingerprint) != sites.fingerprint:
        raise InputError(f"the selection was made for another model ({_difference(sites, meta.get('widths', {}))}): "
                         "select again on this model")
    if not given:
        raise InputError("the selection is empty: it must keep units of at least one site")
    names = {member.module: site.name for site in sites.values() for member in site.members
             if member.expert is None and site.kind != "attention"}  # rows of a query projection are no units
    units: dict[str, Ids] = {}
    for key, ids in given.items():
        name = (layer_name_map or {}).get(key, key)
        site = name if name in sites else names.get(name)
        if site is None:
            raise InputError(f"{key!r} is no feed-forward site of this model: the first of its {len(sites)} sites is "
                             f"{next(iter(sites))!r}")
        if site in units:
            raise InputError(f"{site} is given twice, once as {key!r}: give the units of each site once")
        if len(ids) == 0:
            raise InputError(f"the selection keeps no unit of {site}: keep at least one, or leave the site out")
        units[site] = ids
    ordered = {name: units[name] for name in sites if name in units}
    widths = {name: site.width for name, site in sites.items()}
    values = given.new_values if isinstance(given, Selection) else {}
    heads = {name: site.heads for name, site in sites.items() if site.units == "heads"}
    about = {"widths": widths, "fingerprint": sites.fingerprint, **({"heads": heads} if heads else {})}
    return Selection(ordered, meta | about, values)
