"""DirectPred and DirectCopy for the linear predictor of any model."""

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ...checks import check_choice
from ...models.direct_predictor import RULES, InputCorrelation
from .local_update import check_trainer


class SetPredictorCallback(TrainerCallback):
    """Set a linear predictor after each optimizer step from the correlation of its input, instead of training it.

    ```python
    trainer.add_callback(SetPredictorCallback(trainer, predictor="model.predictor"))
    ```

    The weight is frozen, and the layer gets a module `input_correlation`, an [`InputCorrelation`]: F is in the state
    dict of the model, beside the weight. Logged with the loss: [`~InputCorrelation.spectrum`]. A step that a gradient
    scaler skips changes nothing. ([`BYOLForPreTraining`] does all this itself, by `predictor` of its configuration.)

    Args:
        trainer (`Trainer`): The trainer of the model. Make the callback before training.
        predictor (`str`): The place of the layer in the model, a square `nn.Linear` without bias; `model.` before it
            is left out if the model has no such part.
        rule (`str`, *optional*, defaults to `"direct_pred"`): Or "direct_copy".
        rho, eps, update_every: As in [`InputCorrelation`].

    Raises:
        ValueError: If a setting is out of range, there is no such layer, or it is not square or has a bias.
        TypeError: If `trainer` is no Trainer.
    """

    def __init__(
        self,
        trainer: Trainer,
        predictor: str,
        rule: str = "direct_pred",
        *,
        rho: float | None = None,
        eps: float | None = None,
        update_every: int = 1,
    ):
        check_trainer(self, trainer)
        check_choice("rule", rule, RULES)
        self.predictor = _find_layer(trainer.model, predictor)
        dim = self.predictor.in_features
        correlation = InputCorrelation(dim, rule, rho=rho, eps=eps, update_every=update_every)
        weight = self.predictor.weight.requires_grad_(False)
        self.predictor.input_correlation = correlation.to(
            weight.device, torch.promote_types(weight.dtype, torch.float)
        )
        self.predictor.register_forward_pre_hook(_observe_input)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if all(module is not self.predictor for module in model.modules()):
            raise ValueError(
                "The model that trains must be the one that SetPredictorCallback was made for, but has another "
                "predictor. Make the callback with this trainer; a `model_init` makes a new model."
            )

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            self.predictor.input_correlation.update(self.predictor)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            values = self.predictor.input_correlation.spectrum(self.predictor)
            logs.update(values)
            state.log_history[-1].update(values)


def _find_layer(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules())
    layer = modules.get(name, modules.get(name.removeprefix("model.")))
    if not isinstance(layer, nn.Linear) or layer.bias is not None or layer.in_features != layer.out_features:
        linear = [place for place, module in modules.items() if isinstance(module, nn.Linear) and module.bias is None]
        raise ValueError(
            f"`predictor` must be the place of a square nn.Linear without bias in the model, but '{name}' is {layer}. "
            f"Layers without bias: {', '.join(linear) or 'none'}."
        )
    if hasattr(layer, "input_correlation"):
        raise ValueError(
            f"`predictor` must be a layer that is not set yet, but '{name}' is. Make one callback for it."
        )
    return layer


def _observe_input(layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
    layer.input_correlation.observe(inputs[0])
