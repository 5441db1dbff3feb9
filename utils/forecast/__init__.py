"""Memory and disk that a run will need, told before it starts.

model_size     parameters and widths of a model, from its configuration
body_memory    memory of a model's body, measured without allocating it
step_memory    memory of a training step: its peaks, and the highest
batch_size     the batch size that fits
disk           bytes that a run writes
"""

from .batch_size import Forecast, choose_batch_size
from .disk import require_disk
from .model_size import Shape
from .step_memory import Demand, StepSetting, demand_of

__all__ = ["Demand", "Forecast", "Shape", "StepSetting", "choose_batch_size", "demand_of", "require_disk"]
