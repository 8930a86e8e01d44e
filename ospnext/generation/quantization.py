"""From the settings `quant`, `quant_attn` and `quant_policy` to a policy of the model, checked against a checkpoint."""

from __future__ import annotations

from ospnext.errors import ConfigError
from ospnext.generation.config import GenerateConfig
from ospnext.models.loading import LoadReport
from ospnext.models.quant_policy import ATTENTIONS, LINEARS, QuantPolicy
from ospnext.ops import HiF8Recipe


def quant_policy(config: GenerateConfig) -> QuantPolicy | None:
    """What the settings ask for; None where nothing is quantized.

    Raises:
        ConfigError: a name is unknown, or `compat` does not know the other settings; the message begins with the key.
    """
    asked = config.quant_policy
    if config.quant == config.quant_attn == "none":
        return None
    try:
        return QuantPolicy(
            quant=config.quant,
            quant_attn=config.quant_attn,
            linears=LINEARS if asked.linears is None else tuple(asked.linears),
            attention=ATTENTIONS if asked.attention is None else tuple(asked.attention),
            blocks=str(asked.blocks),
            attention_blocks=None if asked.attention_blocks is None else str(asked.attention_blocks),
            recipe=HiF8Recipe(scale_mode=asked.scale_mode, granularity=asked.granularity),
            compat=asked.compat,
        )
    except ConfigError as error:
        raise ConfigError(f"quant_policy.{error}") from error


def require_reportable(policy: QuantPolicy | None, report: LoadReport) -> None:
    """Refuse to report on HiFloat8 where nothing computes in it by contract."""
    if report.quantization or (policy is not None and policy.compat == "none"):
        return
    if policy is not None:
        raise ConfigError(f"--report-quant does not count layers of compat={policy.compat}; leave one of them out")
    raise ConfigError(
        "--report-quant: nothing computes in HiFloat8; add quant=hif8 or quant_attn=hif8, or leave --report-quant out"
    )


def require_fit(policy: QuantPolicy | None, report: LoadReport) -> None:
    """Refuse, before weights are read, a policy for blocks or layers that the checkpoint does not have as plain ones,
    and one that would quantize nothing unnoticed.
    """
    if policy is None:
        return
    layers, stored = report.config.num_layers, report.quantization
    try:
        policy.block_numbers(layers)
        policy.attention_block_numbers(layers)
    except ConfigError as error:
        raise ConfigError(f"quant_policy.{error}") from error
    for key, section, names, already, what in (
        (
            "quant",
            "linears",
            tuple(policy.linear_names(layers)),
            stored.linears,
            "weights of linears as HiFloat8 codes",
        ),
        ("quant_attn", "attention", tuple(policy.attention_names(layers)), stored.attention, "attention in HiFloat8"),
    ):
        if getattr(policy, key) == "none":
            continue
        if already.keys() & set(names):
            said = f"{key}={getattr(policy, key)}"
            raise ConfigError(f"{said}, but {report.path} has {what} already; leave {key} out")
        if not names:
            said = f"{key}={getattr(policy, key)}"
            raise ConfigError(f"quant_policy.{section} is empty: {said} quantizes nothing; null stands for all")
