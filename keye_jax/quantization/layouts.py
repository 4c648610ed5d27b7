"""How `quantization_config` of config.json says which weights have fewer bits, and how files store them.

Read are block and channel FP8 ("fp8"), compressed-tensors in its formats for whole weights of 4 or 8 bits, AWQ and
GPTQ. Written are "fp8" where all is in blocks of 128 x 128, and compressed-tensors else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

from keye_jax.errors import UserError, shorten
from keye_jax.quantization.schemes import ATTENTION, GROUP, Format, Quantization, Scheme

Layout = Literal["fp8", "float-quantized", "int-quantized", "pack-quantized", "awq", "gptq"]

_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_WRITTEN: dict[Format, Layout] = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
_METHODS = ("fp8", "compressed-tensors", "awq", "gptq")
# Other names that modules of the decoder have in the lists of a file.
_PREFIXES = (("model.", "model.language_model."), ("model.", "language_model.model."))


@dataclasses.dataclass(frozen=True)
class StoredScheme:
    """How files store a weight.

    Attributes:
      layout: names, order and packing of its tensors.
      scheme: what they mean.
      act_order: whether inputs belong to groups in any order, which `g_idx` says.
      zero_offset: what is added to stored zeros of GPTQ.
    """

    layout: Layout
    scheme: Scheme
    act_order: bool = False
    zero_offset: int = 0

    @property
    def is_held(self) -> bool:
        """Whether the model holds such weights as they are; else they become numbers of the model's dtype."""
        return not self.act_order


@dataclasses.dataclass(frozen=True)
class StoredQuantization:
    """What a file says of its weights.

    Attributes:
      method: its name there.
      rules: which modules have which scheme; the first that matches counts.
      is_left_out: says of a module whether it has none.
    """

    method: str
    rules: tuple[tuple[Callable[[str], bool], StoredScheme], ...]
    is_left_out: Callable[[str], bool]

    def of(self, module: str) -> StoredScheme | None:
        """How a module's weight is stored; None where nothing makes it smaller.

        Args:
          module: its name in the released layout, without `.weight`.
        """
        names = [module, *(new + module.removeprefix(old) for old, new in _PREFIXES if module.startswith(old))]
        if any(map(self.is_left_out, names)):
            return None
        return next((stored for rule, stored in self.rules if any(map(rule, names))), None)


class _Refused(ValueError):
    """A field below the one that says how weights are stored, and what it must be."""


def parse(values: Any, *, field: str = "quantization_config") -> StoredQuantization:
    """Reads a `quantization_config`.

    Args:
      field: its name.

    Raises:
      UserError: the scheme is none that is read, or a field of it has another value.
    """
    try:
        return _parse(values)
    except _Refused as error:
        raise UserError(f"config: {field}{error}") from None


def _parse(values: Any) -> StoredQuantization:
    if not isinstance(values, Mapping):
        _fail("", values, "a JSON object")
    method = values.get("quant_method")
    if method == "fp8":
        return _parse_fp8(values)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(values)
    if method in ("awq", "gptq"):
        return _parse_packed(values, method)
    _fail(".quant_method", method, " or ".join(map(repr, _METHODS)))


def resolve(stored: StoredQuantization, layers: int) -> tuple[Quantization, list[str]]:
    """What a model holds of weights that are stored so, and a sentence for what it does not hold as it is stored."""
    found: dict[str, Scheme | None] = {}
    notes = []
    modules = {
        "experts": [f"mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")],
        "attention": [f"self_attn.{name}" for name in ATTENTION],
    }
    for part, names in modules.items():
        schemes = {stored.of(f"model.layers.{layer}.{name}") for layer in range(layers) for name in names}
        first = next(iter(schemes), None)
        found[part] = first.scheme if len(schemes) == 1 and first is not None and first.is_held else None
        if found[part] is None and schemes - {None}:
            why = "layers and matrices have several schemes" if len(schemes) > 1 else "its groups are in any order"
            notes.append(f"{part} are stored with fewer bits ({stored.method}) and become numbers of 16 bits: {why}")
    return Quantization(**found), notes


def write(quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that this package writes."""
    schemes = {"experts": quantization.experts, "attention": quantization.attention}
    ignored = ["lm_head", "visual", "mlp_AR", "sa_indexer", "mlp.gate"]
    ignored += [name for part, name in (("experts", "experts"), ("attention", "self_attn")) if schemes[part] is None]
    if writes_fp8(quantization):
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [GROUP, GROUP],
            "modules_to_not_convert": ignored,
        }
    targets = {"experts": r"re:.*\.mlp\.experts\..*", "attention": r"re:.*\.self_attn\.[qkvo]_proj$"}
    given = {part: scheme for part, scheme in schemes.items() if scheme is not None}
    groups = {
        f"group_{index}": {
            "targets": [targets[part]],
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": written_layout(scheme),
        }
        for index, (part, scheme) in enumerate(given.items())
    }
    formats = {written_layout(scheme) for scheme in given.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(rf"re:(.*\.)?{re.escape(name)}(\..*)?" for name in ignored[1:])],
    }


def writes_fp8(quantization: Quantization) -> bool:
    """Whether the written method is "fp8"."""
    schemes = {quantization.experts, quantization.attention} - {None}
    return schemes == {Scheme("fp8", GROUP, GROUP)}


def written_layout(scheme: Scheme) -> Layout:
    """The format of compressed-tensors that a scheme is written in."""
    return _WRITTEN[scheme.format]


def _weights(scheme: Scheme) -> dict[str, Any]:
    """A scheme as compressed-tensors says it."""
    values: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.format == "fp8" else "int",
        "symmetric": not scheme.zero_points,
        "dynamic": False,
        "actorder": None,
        "group_size": None,
        "block_structure": None,
    }
    if scheme.outputs is None and scheme.group is None:
        return values | {"strategy": "tensor"}
    if scheme.outputs != 1:
        return values | {"strategy": "block", "block_structure": [scheme.outputs, scheme.group]}
    return (
        values
        | ({"strategy": "channel"} if scheme.group is None else {"strategy": "group"})
        | {"group_size": scheme.group}
    )


def _parse_fp8(values: Mapping[str, Any]) -> StoredQuantization:
    if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        _fail(".fmt", values["fmt"], "'e4m3'")
    block = values.get("weight_block_size")
    if block is None:
        scheme = Scheme("fp8", None, None)
    else:
        if not isinstance(block, list) or len(block) != 2:
            _fail(".weight_block_size", block, "a list of two numbers")
        outputs, group = (_count(".weight_block_size", each) for each in block)
        scheme = Scheme("fp8", group, outputs)
    left_out = _names(values, "modules_to_not_convert") + _names(values, "ignored_layers")
    return StoredQuantization("fp8", ((_any, StoredScheme("fp8", scheme)),), _has_part(left_out))


def _parse_compressed_tensors(values: Mapping[str, Any]) -> StoredQuantization:
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _fail(".config_groups", groups, "a JSON object of groups")
    if values.get("sparsity_config") and values["sparsity_config"].get("format", "dense") != "dense":
        _fail(".sparsity_config.format", values["sparsity_config"]["format"], "'dense'")
    rules = []
    for name, group in groups.items():
        where = f".config_groups.{name}"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            _fail(where, group, "a JSON object with 'weights'")
        layout = group.get("format") or values.get("format")
        if layout not in _CT_FORMATS:
            _fail(".format", layout, " or ".join(map(repr, _CT_FORMATS)))
        rules.append((_targets(_names(group, "targets")), _compressed(f"{where}.weights", group["weights"], layout)))
    return StoredQuantization("compressed-tensors", tuple(rules), _targets(_names(values, "ignore")))


def _compressed(where: str, weights: Mapping[str, Any], layout: str) -> StoredScheme:
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        _fail(f"{where}.num_bits", f"{bits} of type {kind}", "8 of type float, or 4 or 8 of type int")
    fmt: Format = "fp8" if kind == "float" else "int4" if bits == 4 else "int8"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    zero_points = weights.get("symmetric") is False
    if strategy == "tensor":
        scheme = Scheme(fmt, None, None, zero_points)
    elif strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2:
            _fail(f"{where}.block_structure", block, "a list of two numbers")
        outputs, group = (_count(f"{where}.block_structure", each) for each in block)
        scheme = Scheme(fmt, group, outputs, zero_points)
    elif strategy in ("group", "channel"):
        whole = strategy == "channel" or size == -1
        scheme = Scheme(fmt, None if whole else _count(f"{where}.group_size", size), 1, zero_points)
    else:
        _fail(f"{where}.strategy", strategy, "'tensor', 'channel', 'group' or 'block'")
    if layout in ("naive-quantized", "mixed-precision"):
        layout = "float-quantized" if fmt == "fp8" else "int-quantized" if fmt == "int8" else "pack-quantized"
    if (layout == "float-quantized") != (fmt == "fp8") or (layout == "int-quantized" and fmt == "int4"):
        _fail(f"{where}.num_bits", f"{bits} of type {kind}", f"what the format {layout!r} holds")
    act_order = weights.get("actorder") in (True, "group", "dynamic")
    return StoredScheme(layout, scheme, act_order)  # pyright: ignore[reportArgumentType] (checked by the caller)


def _parse_packed(values: Mapping[str, Any], method: Literal["awq", "gptq"]) -> StoredQuantization:
    bits = values.get("bits", values.get("w_bit"))
    if bits not in ((4,) if method == "awq" else (4, 8)):
        _fail(".bits", bits, "4" if method == "awq" else "4 or 8")
    size = values.get("group_size", values.get("q_group_size"))
    group = None if size == -1 else _count(".group_size", size)
    fmt: Format = "int4" if bits == 4 else "int8"
    left_out = _has_part(_names(values, "modules_to_not_convert"))
    if method == "awq":
        if values.get("version", "gemm") not in ("gemm", "GEMM"):
            _fail(".version", values["version"], "'gemm'")
        scheme = Scheme(fmt, group, 1, values.get("zero_point", True) is not False)
        return StoredQuantization("awq", ((_any, StoredScheme("awq", scheme)),), left_out)
    if (layout := values.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        _fail(".checkpoint_format", layout, "'gptq' or 'gptq_v2'")
    dynamic = values.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not name.startswith("-:") for name in dynamic):
        _fail(".dynamic", dynamic, "left out, or rules that begin with '-:', which leave modules out")
    patterns = [_pattern(".dynamic", name.removeprefix("-:")) for name in dynamic]
    scheme = Scheme(fmt, group, 1, values.get("sym", True) is False)
    stored = StoredScheme("gptq", scheme, bool(values.get("desc_act")), zero_offset=1 if layout == "gptq" else 0)

    def is_left_out(module: str) -> bool:
        return left_out(module) or any(pattern.match(module) for pattern in patterns)

    return StoredQuantization("gptq", ((_any, stored),), is_left_out)


def _any(_: str) -> bool:
    return True


def _has_part(names: list[str]) -> Callable[[str], bool]:
    """Whether a module's name has one of the names in it, between dots."""
    return lambda module: any(f".{name}." in f".{module}." for name in names)


def _targets(names: list[str]) -> Callable[[str], bool]:
    """Whether compressed-tensors means a module: by its class, its name, or a pattern of names."""
    patterns = [_pattern(".config_groups", name.removeprefix("re:")) for name in names if name.startswith("re:")]

    def holds(module: str) -> bool:
        return "Linear" in names or module in names or any(pattern.match(module) for pattern in patterns)

    return holds


def _pattern(where: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error:
        _fail(where, text, "a pattern of names")


def _names(values: Mapping[str, Any], field: str) -> list[str]:
    names = values.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _fail(f".{field}", names, "a list of names")
    return names


def _count(where: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        _fail(where, value, "a positive number")
    return value


def _fail(where: str, value: Any, allowed: str) -> NoReturn:
    raise _Refused(f"{where} is {shorten(value)}; it must be {allowed}")
