"""Low-rank adapters: a frozen token model, beside each of whose linear maps a small trained one is added.

Source: Hu et al. 2021 (arXiv 2106.09685), by Hugging Face `peft` (the extra `lora`). What is trained, averaged and written
to checkpoints is the adapters alone.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dalle.token_model import TokenModel
from dalle.training.transformer import TransformerStage

ALPHA = 2  # the adapters' output counts this much, at any rank
HEADS = ("text_head", "image_head")  # adapted neither here nor in the paper


class Adapters(nn.Module):
    """The trained parameters of an adapted model, which shares them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)  # a parameter's name has no dots


class AdapterStage(TransformerStage):
    """Trains the adapters of a token model on captions and stored picture tokens."""

    def __init__(self, adapted: nn.Module, *arguments: Any, **more: Any) -> None:
        super().__init__(Adapters(adapted), *arguments, **more)
        self._adapted = adapted

    @property
    def network(self) -> TokenModel:
        """Return the whole model, adapters in place."""
        return cast(TokenModel, self._adapted)


def add_adapters_(model: nn.Module, rank: int) -> None:
    """Freeze a token model and add an adapter of `rank` to each of its linear maps but the heads.

    The first weights come from the global generator; the adapters start as zero. Raises ValueError where `peft` is not
    installed, and for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; an adapter has a rank of at least 1")
    try:
        import peft  # an extra, and several seconds to import
    except ImportError:
        raise ValueError("--lora needs peft: pip install 'dalle[lora]'") from None
    linear = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in HEADS
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=linear)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def load_adapters_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy trained adapters, by their names in `Adapters`, into an adapted model."""
    Adapters(model).load_state_dict(tensors)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an adapted model with its adapters added to the maps, under the names it had before."""
    from peft.tuners.lora import Linear  # several seconds to import

    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, part in model.named_modules():
        if isinstance(part, Linear):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + part.get_delta_weight("default")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
