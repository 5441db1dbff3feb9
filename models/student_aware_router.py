"""StudentAwareRouter: the trained parts with which hidden states of student and teacher are compared.

A student layer is compared with the teacher layer at the same relative depth (`feat`, `rel`, `attn`, `contr`), or
with a mixture of teacher layers chosen by a gate that sees the student's own state (`layer`). The losses themselves are
in `losses/hidden_state_terms.py`.

The teacher's states are standardised per channel, with the statistics of some windows seen before training (a few
channels are huge), and layer-normalised; the student's are projected up to the teacher's width and
layer-normalised. The target is fixed: nothing that is trained can make it trivial.

Shapes: L student layers, M teacher layers, B windows, S and T positions, A anchors, H_S and H_T widths.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ROUTER_TERMS, RouterConfig
from .losses.hidden_state_terms import (
    HIDDEN_STATE_TERMS,
    ComparedStates,
    at_positions,
    group_means,
    layer_normalise,
)
from .types import Anchors
from .validation import expect, expect_count

RIDGE = 1e-2
"""Penalty of the first projections, relative to the mean variance of the student's channels."""

CalibrationBatch = tuple[Sequence[Tensor], Sequence[Tensor], Anchors]
"""Student states, teacher states and anchors, as `StudentAwareRouter.forward` takes them."""


class StudentAwareRouter(nn.Module):
    """Compares hidden states of student and teacher.

    Args:
        config: what is compared, and how.
        student_shape: (layers, width) of the student.
        teacher_shape: (layers, width) of the teacher.

    Attributes:
        student_layers: student layers that are compared, counted from 1.
        teacher_layers: teacher layers that are compared, counted from 1.
        partner: for each student layer, the index in `teacher_layers` of the one at the same relative depth.
        is_calibrated: the teacher's statistics are known: `calibrate` took them, or they were loaded.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape that is none, or a width that is not a multiple of the heads.
    """

    def __init__(
        self,
        config: RouterConfig,
        student_shape: tuple[int, int],
        teacher_shape: tuple[int, int],
    ) -> None:
        super().__init__()
        expect("config", config, RouterConfig, "a RouterConfig")
        student_depth, student_width = _checked_shape("student_shape", student_shape)
        teacher_depth, teacher_width = _checked_shape("teacher_shape", teacher_shape)
        config.check_widths(student_width, teacher_width)
        self.config = config

        # Layers are partners by their depth as a share of the model's: 1 is the last layer of either.
        self.student_layers = _spread(student_depth, config.layers)
        self.teacher_layers = _spread(teacher_depth, config.teacher_layers)
        relative_depth = torch.tensor(self.student_layers)[:, None] / student_depth
        difference = torch.tensor(self.teacher_layers)[None] / teacher_depth - relative_depth  # [L, M]
        self.partner = difference.abs().argmin(1).tolist()
        bell = -((difference / config.prior_width) ** 2) / 2
        log_prior = bell.log_softmax(1)

        # A gate of zeros: routing starts at the prior.
        layers, teacher_layers = difference.shape
        projection = torch.randn(layers, teacher_width, student_width) / math.sqrt(student_width)
        self.projection = nn.Parameter(projection)
        self.offset = nn.Parameter(torch.zeros(layers, teacher_width))
        self.gate = nn.Parameter(torch.zeros(layers, teacher_layers, student_width))

        self.register_buffer("log_prior", log_prior)
        self.register_buffer("mean", torch.zeros(teacher_layers, teacher_width))
        self.register_buffer("scale", torch.ones(teacher_layers, teacher_width))
        self.is_calibrated = False
        self.register_load_state_dict_post_hook(_trust_loaded_statistics)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        anchors: Anchors,
        terms: set[str],
    ) -> dict[str, Tensor]:
        """Return the sums of some terms over the items that `PairedBatch.counts` counts.

        Without any item a sum is a 0 with a gradient of 0.

        Args:
            student: [B, S, H_S] states after `student_layers`, any float dtype.
            teacher: [B, T, H_T] states after `teacher_layers`, on the same device.
            anchors: `PairedBatch.anchors`.
            terms: names out of `ROUTER_TERMS`.
        """
        # In half precision a cosine of 0.9999 is 1: nothing is compared under autocast.
        with torch.autocast(student[0].device.type, enabled=False):
            # One dtype for both sides, the student's.
            student = [_at_least_float32(states) for states in student]
            teacher = [states.to(student[0].dtype) for states in teacher]
            states = ComparedStates(self, student, teacher, anchors)

            sums = {}
            for name, term in HIDDEN_STATE_TERMS.items():
                if name in terms:
                    sums[name] = term.loss(states)
            return sums

    # --- what the terms share -----------------------------------------------------------------------------------------

    def project(self, layer: int, states: Tensor) -> Tensor:
        """Return states of a student layer [..., H_S] in the teacher's width, layer-normalised [..., H_T]."""
        # Parameters are float32, and the states of a float64 student are not.
        weight = self.projection[layer].to(states)
        offset = self.offset[layer].to(states)
        return layer_normalise(F.linear(states, weight, offset))

    def standardise(self, layer: int, states: Tensor) -> Tensor:
        """Return states of a teacher layer [..., H_T], standardised per channel and layer-normalised."""
        mean = self.mean[layer].to(states)
        scale = self.scale[layer].to(states)
        return layer_normalise((states - mean) / scale)

    def log_routing(
        self,
        layer: int,
        states: Tensor,
        text: Tensor,
        texts: int,
    ) -> Tensor:
        """Return [A, M] log-probabilities of the teacher's layers, which the gate of a student layer chooses.

        Args:
            states: [A, H_S] of the student at the anchors. They are detached: the gate looks at the student and does
                not teach it.
            text: [A] the text of each anchor: a window or, where documents are isolated, a document.
            texts: how many there are.
        """
        gate_input = layer_normalise(states.detach())
        gate = self.gate[layer].to(gate_input)
        prior = self.log_prior[layer].to(gate_input)

        # One choice for each position, or one for all positions of a text.
        if self.config.gate == "position":
            logits = F.linear(gate_input, gate) + prior
            return logits.log_softmax(1)

        text_input = group_means(gate_input, text, texts)
        logits = F.linear(text_input, gate) + prior
        return logits.log_softmax(1)[text]

    @torch.no_grad()
    def routing(self, student: Sequence[Tensor], anchors: Anchors) -> Tensor:
        """Return [L, M] the mean routing over the anchors of a batch; the prior where there are none."""
        if not len(anchors.student):
            return self.log_prior.exp()

        texts = len(anchors.sampled)
        rows = []
        for layer, states in enumerate(student):
            student_states = at_positions(_at_least_float32(states), anchors.student)
            log_routing = self.log_routing(layer, student_states, anchors.text, texts)
            rows.append(log_routing.exp().mean(0))
        return torch.stack(rows)

    # --- before the first step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Sequence[CalibrationBatch]) -> None:
        """Take the teacher's statistics, and fit the projections (`initial: ridge`), on (student, teacher, anchors).

        Raises:
            ValueError: if the batches have no anchors, or the teacher's states are not finite.
        """
        if not sum(len(anchors.student) for _, _, anchors in batches):
            raise ValueError(
                "the router found no place where student and teacher have read the same bytes, in "
                f"{sum(len(student[0]) for student, _, _ in batches)} windows; set the weights of "
                f"{', '.join(ROUTER_TERMS)} to 0"
            )

        # Statistics first: the projections are fitted to standardised states.
        self.is_calibrated = True
        for layer in range(len(self.teacher_layers)):
            self._take_statistics(layer, _teacher_at_anchors(batches, layer))

        if self.config.initial == "ridge":
            for layer, partner in enumerate(self.partner):
                self._fit_projection(layer, batches, partner)

    def _take_statistics(self, layer: int, states: Tensor) -> None:
        """Store mean and spread of each channel of a teacher layer, from [A, H_T] states."""
        self.mean[layer] = states.mean(0)
        # A channel that never changes says nothing and must not be blown up.
        spread = states.std(0, correction=0)
        least = 1e-3 * spread.mean().clamp_min(1e-6)
        self.scale[layer] = spread.clamp_min(least)

        if not self.scale[layer].isfinite().all():
            raise ValueError(
                f"the teacher's states after layer {self.teacher_layers[layer]} are not finite: it overflows in half "
                "precision; load it in float32 (--set teacher.dtype=float32)"
            )

    def _fit_projection(
        self,
        layer: int,
        batches: Sequence[CalibrationBatch],
        partner: int,
    ) -> None:
        """Set the projection of a student layer to the ridge regression on its partner's standardised states."""
        student_states = _student_at_anchors(batches, layer)
        teacher_states = _teacher_at_anchors(batches, partner)
        targets = self.standardise(partner, teacher_states)

        weight, offset = _ridge_regression(student_states, targets)
        self.projection[layer] = weight.to(self.projection)
        self.offset[layer] = offset.to(self.offset)


def _checked_shape(name: str, shape: Any) -> tuple[int, int]:
    """Return (layers, width) of a model, both at least 1."""
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        value = f"a {type(shape).__name__}" if isinstance(shape, nn.Module) else repr(shape)
        raise TypeError(f"{name}: got {value}, expected (layers, width) of a model")

    layers = expect_count(f"{name}[0]", shape[0], 1)
    width = expect_count(f"{name}[1]", shape[1], 1)
    return layers, width


def _trust_loaded_statistics(router: StudentAwareRouter, incompatible: Any) -> None:
    """Take a router whose state was loaded for calibrated, as its state was when it was saved."""
    router.is_calibrated = True


def _spread(depth: int, count: int) -> list[int]:
    """Return at most `count` of the layers 1 .. depth, spread evenly, the last among them."""
    count = min(count, depth)
    return [round((i + 1) * depth / count) for i in range(count)]


def _at_least_float32(states: Tensor) -> Tensor:
    """Return half precision as float32; float32 and float64 as they are."""
    if states.dtype in (torch.float16, torch.bfloat16):
        return states.float()
    return states


def _student_at_anchors(batches: Sequence[CalibrationBatch], layer: int) -> Tensor:
    """Return [A, H_S] states of a student layer at the anchors of all batches."""
    rows = []
    for student, _, anchors in batches:
        states = _at_least_float32(student[layer])
        rows.append(at_positions(states, anchors.student))
    return torch.cat(rows)


def _teacher_at_anchors(batches: Sequence[CalibrationBatch], layer: int) -> Tensor:
    """Return [A, H_T] states of a teacher layer at the anchors of all batches."""
    rows = []
    for _, teacher, anchors in batches:
        states = _at_least_float32(teacher[layer])
        rows.append(at_positions(states, anchors.teacher))
    return torch.cat(rows)


def _ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [H_T, H_S] and offset [H_T] of the ridge regression of y [A, H_T] on x [A, H_S].

    In float64 on the CPU: it is done once, and the covariance may be nearly singular.
    """
    x = x.double().cpu()
    y = y.double().cpu()
    x_mean = x.mean(0)
    y_mean = y.mean(0)
    x = x - x_mean
    y = y - y_mean

    # The penalty follows the size of the states, so that it means the same for every model.
    covariance = x.T @ x / len(x)
    penalty = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(covariance), dtype=x.dtype)
    cross_covariance = x.T @ y / len(x)
    weight = torch.linalg.solve(covariance + penalty * identity, cross_covariance).T
    return weight, y_mean - weight @ x_mean
