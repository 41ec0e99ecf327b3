"""What a model computes on fixed tokens: saved with a checkpoint, compared once it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox import log
from neox.checkpoint.manifest import FORWARD_PASS
from neox.errors import CheckpointError
from neox.inference.stages import InferenceModel
from neox.parallel.rng import derive_seed

ROWS, POSITIONS = 2, 128  # at most: neither the pass nor its logits shall be noticed
# Of the losses' root mean square difference, in nats per token, where the same arithmetic is done
# in another order (docs/numerics.md).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def take(model: InferenceModel, tokens: int) -> str:
    """The fingerprint's text. `tokens` is the tokenizer's size. Collective over the world."""
    length = min(POSITIONS, model.config.seq_length)
    generator = torch.Generator().manual_seed(derive_seed("forward pass"))
    ids_BT = torch.randint(tokens, (ROWS, length + 1), generator=generator)
    body = {
        "computed": _circumstances(model),
        "precision": _name(model.dtype),
        "vocabulary": tokens,  # the padding's rows are left out: another tp has others
        "tokens": ids_BT.tolist(),
        "losses": _losses(model, ids_BT, tokens).tolist(),
    }
    return json.dumps(body) + "\n"


def verify(model: InferenceModel, folder: Path) -> None:
    """Compute what `folder`/forward_pass.json has; CheckpointError on every rank when it differs.

    Bit for bit where the losses were computed under the same circumstances on a CPU, within
    TOLERANCE elsewhere. A line tells which, or why there is nothing to compare. Collective over
    the world.
    """
    what = "checkpoint_validation_with_forward_pass"
    groups = model.groups
    saved = _read(folder / FORWARD_PASS)
    if saved is None:
        log.warning(f"{what}: {folder} was saved without a forward pass, so none is compared")
        return
    if saved["precision"] != _name(model.dtype):
        log.info(
            f"{what}: {folder} was saved in {saved['precision']} and the model is in "
            f"{_name(model.dtype)}, so no forward pass is compared"
        )
        return
    before, now = saved["computed"].get("weights", "dense"), model.storage
    if before != now and not {before, now} <= {"dense", "packed"}:
        log.info(
            f"{what}: {folder} was saved with weights held in {before} and they are held in {now}, "
            "which changes what they compute, so no forward pass is compared"
        )
        return
    length = min(model.config.seq_length + 1, len(saved["tokens"][0]))
    ids_BT = torch.tensor(saved["tokens"])[:, :length]
    expected_BS = torch.tensor(saved["losses"])[:, : length - 1]
    losses_BS = _losses(model, ids_BT, saved["vocabulary"])
    exact = saved["computed"] == _circumstances(model) and groups.device.type == "cpu"
    tolerance = 0.0 if exact else TOLERANCE[model.dtype]
    difference = (losses_BS - expected_BS).double().square().mean().sqrt().item()
    worst = max(groups.gather(difference), key=lambda rms: (rms != rms, rms))  # NaN is the worst
    if not worst <= tolerance:
        raise CheckpointError(
            f"{what}: the weights of {folder} do not compute what they did when they were saved: "
            f"the losses of {losses_BS.numel()} fixed tokens differ by {worst:.2e} (root mean "
            f"square, in nats), and may differ by {tolerance:g}. The checkpoint is damaged, or the "
            "configuration, the program or a library computes another function. Set "
            f"{what}: false to use it all the same."
        )
    how = "bit for bit" if exact else f"to {worst:.1e} nats, of {tolerance:g} allowed"
    log.info(f"{what}: {folder} computes what it did when it was saved, {how}")


def _losses(model: InferenceModel, ids_BT: Tensor, vocabulary: int) -> Tensor:
    """float32 [B, T - 1], on the CPU of every rank."""
    inputs_BS, labels_BS = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].to(model.device)
    logits_BSV = model(inputs_BS)
    losses_BS = torch.zeros(labels_BS.shape, device=model.device)
    if logits_BSV is not None:
        chances_BSV = logits_BSV[..., :vocabulary].log_softmax(dim=-1)
        losses_BS = -chances_BSV.gather(2, labels_BS[..., None])[..., 0]
    return model.broadcast(losses_BS.contiguous()).cpu()


def _circumstances(model: InferenceModel) -> dict[str, Any]:
    """What the last bits of the losses depend on besides the weights."""
    groups = model.groups
    on_gpu = groups.device.type == "cuda"
    return {
        "grid": {"tp": groups.tp, "pp": groups.pp, "dp": groups.dp},
        "device": torch.cuda.get_device_name(groups.device)
        if on_gpu
        else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "weights": model.storage,
        "torch": torch.__version__,
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it cannot be read ({error}).") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
