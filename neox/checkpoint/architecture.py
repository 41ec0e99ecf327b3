"""Whether a configuration and a checkpoint are of one model, and what model a checkpoint is of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from neox import log
from neox.checkpoint.evidence import Description, collect
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.tensor_facts import Fact, Facts
from neox.config import ModelConfig, NeoXConfig
from neox.config.architecture import ARCHITECTURE, TRAITS, Trait, open_keys, same
from neox.config.values import listed, show
from neox.errors import CheckpointError

# No tensor means something else for them, and there are reasons to change them: a longer context.
_FINE_TUNED = (
    "rotary_emb_base",
    "sliding_window_width",
    "layernorm_epsilon",
    "rms_norm_epsilon",
    "bias_gelu_fusion",
)


def recorded(checkpoint: Checkpoint) -> Facts:
    """What a checkpoint says about its architecture, by the traits of neox.config.architecture.

    Most are keys; `kv_width`, `rotary_dim`, `is_gated` and `ffn_size` are what num_kv_heads,
    rotary_pct, activation and intermediate_size come to, which tensors show. Not collective. Raises
    CheckpointError for files that cannot be read.
    """
    return collect(checkpoint).facts


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The values of all keys of `ARCHITECTURE`, for those who have no configuration.

    Raises CheckpointError naming the keys that the checkpoint leaves open.
    """
    evidence = collect(checkpoint)
    facts, whole = evidence.facts, evidence.whole
    if whole is None:
        missing = open_keys({name: fact.value for name, fact in facts.items()})
    else:
        missing = [key for key in ARCHITECTURE if key not in whole.values()]
    if whole is None or missing:
        raise CheckpointError(
            f"{checkpoint.folder} does not tell {listed(missing, 'and')}: tensors do not show it, "
            "and there is no manifest.json and no YAML file in `configs` that says it. Give "
            "--config with the file that the model was trained with."
        )
    return _as_stored(whole, facts)


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """`describe` as a configuration of the model alone, of the longest context it may have."""
    values = describe(checkpoint)
    return ModelConfig(**values, seq_length=values["max_position_embeddings"])


def _as_stored(description: Description, facts: Facts) -> dict[str, Any]:
    """The described keys; where the tensors show another depth, head or inner width, that one."""
    stored = {name: facts[name].value for name in ("num_layers", "no_weight_tying")}
    values, ffn = {**description.values(), **stored}, facts["ffn_size"].value
    model = ModelConfig(**values, seq_length=1)
    if model.ffn_size != ffn:
        width = 3 * ffn if model.is_gated else ffn  # see ModelConfig.ffn_size
        values |= {"intermediate_size": width, "expansion_factor": None, "mlp_multiple_of": 1}
    return values


def check_architecture(
    config: NeoXConfig, checkpoint: Checkpoint, *, finetune: bool = False
) -> None:
    """Raises one CheckpointError with every key that contradicts what the checkpoint says.

    Values are compared by their meaning. With `finetune`, keys that may be changed then are told in
    a line each instead. Files whose tensors contradict are verified first, since damage can look
    like another shape. Not collective: every rank sees the same files and decides the same.
    """
    facts = recorded(checkpoint)
    found = _contradictions(config, facts)
    for name in _FINE_TUNED:
        if finetune and name in found:
            log.info(f"finetune: {found.pop(name)}; the configuration's is used")
    if not found:
        return
    for path in dict.fromkeys(path for name in found for path in facts[name].files):
        checkpoint.verify_file(path)  # a damaged header shows anything
    advice = "Give the configuration the checkpoint's values"
    if any("configs/" in message for message in found.values()):
        advice += ", or correct the checkpoint's YAML file if the model was trained otherwise"
    said = [*(f"{message}." for message in found.values()), f"{advice}."]
    if len(found) == 1:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit the configuration: {' '.join(said)}"
        )
    heading = f"{checkpoint.folder} does not fit the configuration in {len(found)} keys:"
    raise CheckpointError("\n  ".join([heading, *said]))


def _contradictions(config: NeoXConfig, facts: Facts) -> dict[str, str]:
    """By trait. Each is compared as if those before it were the checkpoint's, so that a wrong
    hidden_size is not told a second time by the widths that follow from it."""
    found: dict[str, str] = {}
    model = config
    for trait in TRAITS.values():
        fact = facts.get(trait.name)
        if fact is None or not trait.matters(model):
            continue
        if not same(trait.value(model), fact.value, fact.tolerance):
            told = _tell(trait, config, model, fact, knows_heads="num_attention_heads" in facts)
            found[trait.name] = f"{told} ({fact.where})"
            model = replace(model, **trait.implies(fact.value))
    return found


def _tell(
    trait: Trait, config: NeoXConfig, model: NeoXConfig, fact: Fact, *, knows_heads: bool
) -> str:
    """One contradiction. `model` is `config` with what the checkpoint decided before it."""
    ours, theirs = _ours(config, trait.keys[0]), fact.value
    heads = _ours(config, "num_attention_heads")
    match trait.name:
        case "kv_width" if knows_heads:
            return f"{ours}, but the checkpoint's is {theirs // model.head_dim}"
        case "kv_width":
            return (
                f"{ours} and {heads}, which makes the keys {trait.value(model)} wide, but the "
                f"checkpoint's are {theirs} wide"
            )
        case "rotary_dim" if knows_heads:
            return f"{ours}, but the checkpoint's is {theirs / model.head_dim:g}"
        case "rotary_dim":
            return (
                f"{ours} and {heads}, which rotates {model.rotary_dim} dimensions of a head, but "
                f"the checkpoint's rotate {theirs}"
            )
        case "ffn_size":
            given = [key for key in trait.keys if config.origin(key) != "default"]
            ours = listed([_ours(config, key) for key in given] or [ours], "and")
            return (
                f"{ours}, which makes the MLP's inner width {model.ffn_size}, but the "
                f"checkpoint's is {theirs}"
            )
        case "is_gated":
            one, other = ("not gated", "gated") if theirs else ("gated", "not")
            return f"{ours}, which is {one}, but the checkpoint's is {other}"
        case "has_learned_positions":
            return f"{ours}, but the checkpoint has no learned positions"
        case _:
            return f"{ours}, but the checkpoint's is {show(theirs)}"


def _ours(config: NeoXConfig, key: str) -> str:
    """A key with its value and origin: "rotary_pct is 0.5 (my.yml:5)"."""
    said = {"default": " (the default)", "given": "", "derived": ""}
    origin = config.origin(key)
    return f"{key} is {show(getattr(config, key))}{said.get(origin, f' ({origin})')}"
