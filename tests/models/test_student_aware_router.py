"""The router's terms: their scale, their definitions in plain loops, what they may see and what they may touch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.config import RouterConfig
from models.losses.hidden_state_terms import HIDDEN_STATE_TERMS, contrastive_loss, count_items
from models.student_aware_router import ROUTER_TERMS, StudentAwareRouter
from models.text.alignment import Alignment
from models.text.anchors import collect_anchors
from models.text.tokens import Reading
from models.text.windows import BEHIND
from models.types import Anchors
from tests.models.tiny import Pair, pair_of

ALL = {*ROUTER_TERMS}
PROJECTED = ALL - {"rel"}
TOKENS = {"student": 2, "teacher": 3}
"""Tokens of a block."""


def book(blocks: list[int], config: RouterConfig, padding: int = 2) -> tuple[Anchors, dict[str, int]]:
    """Windows of some blocks of 6 bytes, which a student reads as 2 tokens and a teacher as 3.

    An anchor at the end of every block but the last, of which nothing is left to predict.
    """

    def reading(count: int, size: int) -> Reading:
        n = np.arange(count)
        return Reading(n, n * size, (n + 1) * size, np.ones_like(n))

    aligned = []
    for n in blocks:
        m, none = np.arange(1, n), np.zeros(max(n - 1, 0), dtype=np.int64)
        aligned.append(Alignment(2 * m - 1, 3 * m - 1, none, none, none, none, none, none, 0))
    student, teacher = ([reading(per * n, 6 // per) for n in blocks] for per in TOKENS.values())
    widths = tuple(per * max(blocks) + padding for per in TOKENS.values())
    begins = [np.zeros(1, dtype=np.int64)] * len(student)
    anchors = collect_anchors((student, teacher), aligned, (begins, begins), widths, config)
    anchors.key_bytes = F.pad(anchors.key_bytes, (0, 0, 0, padding), value=BEHIND)
    return anchors, count_items(anchors)


class Case:
    """A router on random states of a book."""

    def __init__(self, blocks, student=(2, 32), teacher=(3, 48), *, seed=0, dtype=torch.float32, padding=2, **config):
        torch.manual_seed(seed)
        self.config = RouterConfig(**({"span": 4} | config))
        self.router = StudentAwareRouter(self.config, student, teacher).to(dtype)
        self.anchors, self.counts = book(blocks, self.config, padding)
        rows = len(blocks), max(blocks)
        self.student = [
            torch.randn(rows[0], 2 * rows[1] + padding, student[1], dtype=dtype).requires_grad_()
            for _ in self.router.student_layers
        ]
        self.teacher = [
            torch.randn(rows[0], 3 * rows[1] + padding, teacher[1], dtype=dtype) for _ in self.router.teacher_layers
        ]

    def sums(self, terms=ALL) -> dict[str, torch.Tensor]:
        return self.router(self.student, self.teacher, self.anchors, terms)

    def values(self, terms=ALL) -> dict[str, float]:
        return {name: value.item() / self.counts[name] for name, value in self.sums(terms).items()}

    def gradients(self, term: str) -> list[torch.Tensor]:
        return torch.autograd.grad(self.sums({term})[term], self.student, allow_unused=True)

    def calibrate(self) -> None:
        self.router.calibrate([(self.student, self.teacher, self.anchors)])

    def copy_teacher(self) -> None:
        """The student's tokens at anchors get the teacher's states, and projections do what is done to the teacher."""
        with torch.no_grad():
            for n, m in enumerate(self.router.partner):
                rows = self.teacher[m].flatten(0, 1)[self.anchors.teacher]
                self.student[n].flatten(0, 1)[self.anchors.student] = rows
                self.router.projection[n] = torch.diag(1 / self.router.scale[m])
                self.router.offset[n] = -self.router.mean[m] / self.router.scale[m]


# --- scale ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    blocks=st.lists(st.integers(33, 60), min_size=2, max_size=4),
    widths=st.tuples(st.sampled_from([8, 24, 64, 160]), st.sampled_from([64, 96, 256])),
    layers=st.tuples(st.integers(1, 6), st.integers(1, 12)),
    gate=st.sampled_from(["window", "position"]),
    seed=st.integers(0, 99),
)
def test_unrelated_states_cost_about_one(blocks, widths, layers, gate, seed):
    """A teacher far narrower than 64 costs more in attn and contr: chance similarities are large there."""
    values = Case(blocks, *zip(layers, widths, strict=True), seed=seed, gate=gate).values()
    assert all(0.05 <= value <= 2 for value in values.values()), values
    assert all(0.85 <= values[name] <= 1.15 for name in ("feat", "layer")), values


@pytest.mark.parametrize("longer, wider", [(8, 1), (1, 8)])
def test_eightfold_length_or_width_does_not_change_the_values(longer, wider):
    """Similarities of random directions spread by 1 / sqrt(width); attn and contr fall to 1 from a little above."""
    small = Case([17] * 4, (2, 16), (2, 64)).values()
    large = Case([16 * longer + 1] * 4, (2, 16 * wider), (2, 64 * wider)).values()
    assert large == pytest.approx(small, abs=0.25)


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_scale_of_the_states_does_not_matter(term):
    case = Case([20, 14], dtype=torch.float64)
    case.calibrate()
    before = case.values({term})[term]
    case.student, case.teacher = [100 * x for x in case.student], [0.1 * x for x in case.teacher]
    case.calibrate()
    assert case.values({term})[term] == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_equal_states_cost_nothing_where_that_is_the_definition(term):
    """attn asks for the tokens that a state has just read, which is another question."""
    case = Case([20, 14], (1, 48), (1, 48), initial="random")
    case.calibrate()
    unrelated = case.values({term})[term]
    case.copy_teacher()
    least = {"contr": 0.02, "attn": unrelated}.get(term, 1e-4)
    assert case.values({term})[term] < least


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_hidden_state_term_of_the_curriculum_has_a_loss_and_a_count():
    assert {*HIDDEN_STATE_TERMS} == {*ROUTER_TERMS}
    assert {*Case([9, 12]).counts} == {*ROUTER_TERMS}


# --- definitions ------------------------------------------------------------------------------------------------------


def normal(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


class Plain:
    """The terms in loops over anchors, windows and heads; sums, averaged over the student's layers."""

    def __init__(self, case: Case) -> None:
        self.case, self.router, self.a = case, case.router, case.anchors

    def own(self, n: int, i: int) -> torch.Tensor:
        return self.case.student[n].detach().flatten(0, 1)[self.a.student[i]]

    def projected(self, n: int, i: int) -> torch.Tensor:
        return normal(self.router.projection[n].detach() @ self.own(n, i) + self.router.offset[n].detach())

    def standard(self, m: int, state: torch.Tensor) -> torch.Tensor:
        return normal((state - self.router.mean[m]) / self.router.scale[m])

    def target(self, m: int, i: int) -> torch.Tensor:
        return self.standard(m, self.case.teacher[m].flatten(0, 1)[self.a.teacher[i]])

    def feat(self, n: int, m: int) -> float:
        sides = ((self.projected(n, i), self.target(m, i)) for i in range(len(self.a.student)))
        return sum(float(((p - t) ** 2).mean() / 2) for p, t in sides)

    def parts(self, states: list[torch.Tensor]) -> torch.Tensor:
        """[G, items, width of a head]."""
        return torch.stack(states).unflatten(-1, (self.case.config.heads, -1)).transpose(0, 1)

    def rel(self, n: int, m: int) -> float:
        total = 0.0
        for sampled in self.a.sampled:
            chosen = [int(i) for i in sampled if i >= 0]
            if len(chosen) < 4:
                continue
            teacher = [self.case.teacher[m].flatten(0, 1)[self.a.teacher[i]] for i in chosen]
            heads = zip(self.parts([self.own(n, i) for i in chosen]), self.parts(teacher), strict=True)
            for sides in heads:
                x, y = (part - part.mean(0) for part in sides)
                pairs = [(cosine(x[i], x[j]), cosine(y[i], y[j])) for i in range(len(x)) for j in range(i)]
                total += (1 - np.corrcoef(np.array(pairs).T)[0, 1]) / self.case.config.heads
        return total

    def attn(self, n: int, m: int) -> float:
        total = 0.0
        for b, q in zip(*torch.where(self.a.attends), strict=True):
            (start, end), keys = self.a.query_bytes[b, q].tolist(), self.a.key_bytes[b].tolist()
            seen = [k for k, (_, last) in enumerate(keys) if k > 0 and last <= end]
            share = np.array([max(0, min(keys[k][1], end) - max(keys[k][0], start)) for k in seen])
            query = self.parts([self.projected(n, int(self.a.sampled[b, q]))])[:, 0]
            states = self.parts([self.standard(m, self.case.teacher[m][b, k]) for k in seen])
            for head in range(self.case.config.heads):
                logits = np.array([8 * cosine(query[head], key) for key in states[head]])
                log_attention = logits - np.log(np.exp(logits).sum())
                loss = -(share / share.sum() * log_attention).sum() / math.log(len(seen))
                total += loss / self.case.config.heads
        return total

    def layer(self, n: int, m: int) -> float:
        teachers, total = range(len(self.router.teacher_layers)), 0.0
        for i in range(len(self.a.student)):
            same = [j for j in range(len(self.a.student)) if self.a.text[j] == self.a.text[i]]
            looked = same if self.case.config.gate == "window" else [i]
            seen = torch.stack([normal(self.own(n, j)) for j in looked]).mean(0)
            routing = (self.router.gate[n].detach() @ seen + self.router.log_prior[n]).softmax(0)
            mixture = normal(sum(routing[k] * self.target(k, i) for k in teachers))
            away = sum(float(p * (p.log() - q)) for p, q in zip(routing, self.router.log_prior[n], strict=True))
            total += float(((self.projected(n, i) - mixture) ** 2).mean() / 2)
            total += self.case.config.prior_weight * away / math.log(len(teachers))
        return total

    def contr(self, n: int, m: int) -> float:
        def pooled(state, run: int) -> torch.Tensor:
            return torch.stack([state(i) for i in range(len(self.a.run)) if self.a.run[i] == run]).mean(0)

        queries = [pooled(lambda i: self.projected(n, i), run) for run in range(self.a.runs)]
        keys = [pooled(lambda i: self.target(m, i), run) for run in range(self.a.runs)]
        total = 0.0
        for run, query in enumerate(queries):
            others = [k for k in range(len(keys)) if k != run and cosine(keys[k], keys[run]) <= 0.9999]
            odds = [cosine(query, keys[k]) / self.case.config.contrastive_temperature for k in (run, *others)]
            total += (np.log(np.exp(odds).sum()) - odds[0]) / math.log(len(odds))
        return total


@pytest.mark.parametrize("heads, gate", [(1, "window"), (2, "position"), (4, "window")])
@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_terms_are_what_plain_loops_compute(term, heads, gate):
    case = Case([9, 3, 1, 12], (2, 8), (3, 16), dtype=torch.float64, heads=heads, gate=gate, positions=5, span=3)
    case.calibrate()
    torch.nn.init.normal_(case.router.gate, std=0.5)  # away from the prior
    expected = np.mean([getattr(Plain(case), term)(n, m) for n, m in enumerate(case.router.partner)])
    assert case.sums({term})[term].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_gradients_are_those_of_finite_differences(term, heads):
    case = Case([6, 7], (1, 4), (2, 6), dtype=torch.float64, heads=heads, padding=0)
    torch.nn.init.normal_(case.router.gate, std=0.5)
    names = list(case.router.state_dict())[:3]
    assert names == ["projection", "offset", "gate"]
    # the gate looks at the student's states without teaching them: with layer, only parameters are varied
    inputs = [] if term == "layer" else case.student

    def value(*varied: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, varied[: len(names)], strict=True))
        states = varied[len(names) :] or case.student
        return torch.func.functional_call(case.router, parameters, (states, case.teacher, case.anchors, {term}))[term]

    parameters = [getattr(case.router, name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(value, (*parameters, *inputs), atol=1e-6)


# --- what is seen, and what is touched --------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_gradient_reaches_every_chosen_layer_at_its_anchors_and_nowhere_else(term):
    case = Case([12, 9, 1], (6, 32), layers=3)
    assert case.router.student_layers == [2, 4, 6]
    at = torch.zeros(case.student[0].shape[:2], dtype=torch.bool).flatten()
    at[case.anchors.student] = True
    for gradient in case.gradients(term):
        touched = gradient.flatten(0, 1).abs().sum(1) > 0
        assert not touched[~at].any()
        assert touched[at].float().mean() > (0.9 if term != "attn" else 0.8)


def test_gate_learns_and_does_not_teach_the_student():
    case = Case([12, 9], layers=1)
    case.calibrate()
    torch.nn.init.normal_(case.router.gate)
    with torch.no_grad():
        case.router.projection.zero_()
    assert not case.gradients("layer")[0].any()
    case.sums({"layer"})["layer"].backward()
    assert case.router.gate.grad.any()


def future_matters(case: Case) -> bool:
    """Return whether teacher states that end after the first query's byte change the loss of that query."""
    attends = torch.zeros_like(case.anchors.attends)
    attends[0, 0] = True
    case.anchors.attends = attends
    later = 6  # the first query ends at byte 6, with teacher token 2
    before = case.sums({"attn"})["attn"].item()
    for m, states in enumerate(case.teacher):
        case.teacher[m] = states.clone()
        case.teacher[m][0, later // 2 :] = torch.randn_like(states[0, later // 2 :])
    return case.sums({"attn"})["attn"].item() != before


def test_attention_sees_no_key_that_ends_after_the_query_in_bytes():
    assert not future_matters(Case([12]))


@pytest.mark.parametrize("planted", [slice(3, 4), slice(3, None)])
def test_a_mask_that_sees_the_future_is_caught(planted):
    """One key too many, and every key."""
    case = Case([12])
    case.anchors.key_bytes[:, planted, 1] = 6
    assert future_matters(case)


def test_attention_sees_every_key_up_to_the_query_but_the_first():
    case = Case([5], (1, 16), (1, 32), padding=0)
    case.teacher[0].requires_grad_()
    case.anchors.attends &= torch.arange(case.anchors.attends.shape[1]) == 1  # the query that ends at byte 12
    touched = torch.autograd.grad(case.sums({"attn"})["attn"], case.teacher[0])[0].abs().sum(-1)[0] > 0
    assert touched.tolist() == [False] + [True] * 5 + [False] * 9


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_a_window_without_anchors_is_as_if_it_was_not_there(term):
    alone, beside = Case([12, 9]), Case([12, 1, 9])
    beside.router.load_state_dict(alone.router.state_dict())
    for sides in ("student", "teacher"):
        for whole, part in zip(getattr(beside, sides), getattr(alone, sides), strict=True):
            whole.data[[0, 2]], whole.data[1] = part.detach(), 1e4
    assert beside.counts == alone.counts
    assert beside.sums({term})[term].item() == pytest.approx(alone.sums({term})[term].item(), rel=1e-5)
    for gradient, expected in zip(beside.gradients(term), alone.gradients(term), strict=True):
        assert not gradient[1].any()
        torch.testing.assert_close(gradient[[0, 2]], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_without_anchors_there_is_a_differentiable_zero(term):
    case = Case([1, 1])
    assert not any(case.counts.values())
    value = case.sums({term})[term]
    assert value.item() == 0
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in case.router.parameters())
    assert all(x.grad is None or not x.grad.any() for x in case.student)


@pytest.mark.parametrize("blocks", [[1, 1], [4]])
def test_contrast_of_less_than_two_candidates_is_a_differentiable_zero(blocks):
    case = Case(blocks)
    assert case.anchors.runs < 2
    assert case.sums({"contr"})["contr"].item() == 0
    assert not any(gradient.any() for gradient in case.gradients("contr"))


def test_contrast_takes_the_same_text_for_no_negative():
    case = Case([9, 9, 12], dtype=torch.float64)
    for states in (*case.student, *case.teacher):
        states.data[1] = states.data[0]
    expected = np.mean([Plain(case).contr(n, m) for n, m in enumerate(case.router.partner)])
    assert case.sums({"contr"})["contr"].item() == pytest.approx(expected, rel=1e-9)
    one_text = Case([5, 5])
    one_text.teacher = [states[:1].expand(2, -1, -1) for states in one_text.teacher]
    assert one_text.anchors.runs == 2
    assert one_text.sums({"contr"})["contr"].item() == 0


def test_relations_need_four_anchors():
    assert [Case([n]).counts["rel"] for n in (4, 5)] == [0, 1]
    assert Case([4]).sums({"rel"})["rel"].item() == 0 < Case([5]).sums({"rel"})["rel"].item()


def test_a_term_is_the_same_alone_and_beside_others():
    case = Case([20, 14])
    together = case.values()
    assert {term: case.values({term})[term] for term in ROUTER_TERMS} == together


class Waits(TorchDispatchMode):
    """Names the operations for which a GPU's result has to reach the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_the_device():
    case = Case([20, 1, 14])
    with Waits() as waits:
        torch.stack(list(case.sums().values())).sum().backward()
    assert not waits.found
    with Waits() as waits:
        case.student[0][case.student[0] > 0].sum().item()
    assert len(waits.found) >= 2


# --- gate -------------------------------------------------------------------------------------------------------------


def routed(case: Case) -> torch.Tensor:
    """[A, M] routing of the first student layer."""
    own = case.student[0].detach().flatten(0, 1)[case.anchors.student]
    return case.router.log_routing(0, own, case.anchors.text, len(case.student[0])).exp()


@pytest.mark.parametrize("gate", ["window", "position"])
def test_routing_starts_at_the_prior_and_is_a_distribution(gate):
    case = Case([12, 1, 9], (4, 32), (12, 48), gate=gate)
    torch.testing.assert_close(case.router.routing(case.student, case.anchors), case.router.log_prior.exp())
    torch.nn.init.normal_(case.router.gate)
    found = routed(case)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)))
    windows = [found[case.anchors.text == b] for b in (0, 2)]
    assert not torch.allclose(windows[0][0], windows[1][0])
    assert all(torch.allclose(rows, rows[:1]) == (gate == "window") for rows in windows)


@given(student=st.integers(1, 40), teacher=st.integers(1, 80), layers=st.integers(1, 9), kept=st.integers(1, 9))
def test_layers_are_spread_up_to_the_last_and_the_prior_peaks_at_the_same_depth(student, teacher, layers, kept):
    router = StudentAwareRouter(RouterConfig(layers=layers, teacher_layers=kept), (student, 2), (teacher, 2))
    for chosen, depth, count in ((router.student_layers, student, layers), (router.teacher_layers, teacher, kept)):
        assert chosen[-1] == depth and len({*chosen}) == len(chosen) == min(count, depth) and chosen[0] >= 1
        assert max(np.diff(chosen), default=0) - min(np.diff(chosen), default=0) <= 1
    for n, (layer, row) in enumerate(zip(router.student_layers, router.log_prior.exp(), strict=True)):
        away = np.array([m / teacher - layer / student for m in router.teacher_layers])
        assert abs(away[router.partner[n]]) == pytest.approx(min(abs(away)), abs=1e-6)
        bell = np.exp(-((away / router.config.prior_width) ** 2) / 2)
        assert row.tolist() == pytest.approx(bell / bell.sum(), abs=1e-5)


def test_routing_without_anchors_is_the_prior():
    case = Case([1])
    assert torch.equal(case.router.routing(case.student, case.anchors), case.router.log_prior.exp())


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_standardises_the_teacher_and_fits_ridge_regressions():
    case = Case([30, 1, 25], (2, 8), (3, 16), dtype=torch.float64)
    for m in range(3):
        case.teacher[m] = case.teacher[m] * torch.linspace(0.1, 1000, 16) + m
    case.calibrate()

    a = case.anchors
    for m, states in enumerate(case.teacher):
        rows = states.flatten(0, 1)[a.teacher].numpy()
        np.testing.assert_allclose(case.router.mean[m], rows.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(case.router.scale[m], np.maximum(rows.std(0), 1e-3 * rows.std(0).mean()), rtol=1e-9)

    for n, m in enumerate(case.router.partner):
        x = case.student[n].detach().flatten(0, 1)[a.student].numpy()
        rows = case.teacher[m].flatten(0, 1)[a.teacher]
        y = normal((rows - case.router.mean[m]) / case.router.scale[m]).numpy()

        # Ridge regression is least squares with the penalty as more rows.
        x0, y0 = x - x.mean(0), y - y.mean(0)
        penalty = math.sqrt(1e-2 * x0.var(0).mean() * len(x))
        rows, targets = np.vstack([x0, penalty * np.eye(8)]), np.vstack([y0, np.zeros((8, 16))])
        weight = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        np.testing.assert_allclose(case.router.projection[n].detach(), weight, rtol=1e-7, atol=1e-9)
        offset = y.mean(0) - weight @ x.mean(0)
        np.testing.assert_allclose(case.router.offset[n].detach(), offset, rtol=1e-7, atol=1e-9)


def test_calibration_on_parts_is_calibration_on_the_whole():
    whole, parts = (Case([30, 20], dtype=torch.float64) for _ in range(2))
    whole.calibrate()
    split = []
    for b in range(2):
        case = Case([[30, 20][b]], dtype=torch.float64, padding=2 + (0, 20)[b])
        states = ([x[b : b + 1] for x in side] for side in (parts.student, parts.teacher))
        split.append((*states, case.anchors))
    parts.router.calibrate(split)
    for name, value in whole.router.state_dict().items():
        torch.testing.assert_close(parts.router.state_dict()[name], value)


def test_ridge_starts_nearer_than_random_on_states_it_has_not_seen():
    """Student states are a noisy linear picture of the teacher's."""
    values = {}
    for initial in ("ridge", "random"):
        case = Case([60, 60], (1, 32), (1, 48), initial=initial)
        view = torch.randn(48, 32)
        with torch.no_grad():
            noise = torch.randn(len(case.anchors.student), 32)
            rows = case.teacher[0].flatten(0, 1)[case.anchors.teacher]
            case.student[0].flatten(0, 1)[case.anchors.student] = rows @ view + noise
        half = book([60], case.config)[0]
        case.router.calibrate([([case.student[0][:1]], [case.teacher[0][:1]], half)])
        case.student, case.teacher = [case.student[0][1:]], [case.teacher[0][1:]]
        case.anchors, case.counts = book([60], case.config)
        values[initial] = case.values()
    assert all(values["ridge"][name] < 0.9 * values["random"][name] for name in PROJECTED), values


def test_channels_that_never_change_are_not_blown_up():
    case = Case([30, 25], initial="random")
    for states in case.teacher:
        states[..., 3] = 7.0
    case.calibrate()
    case.teacher[0][..., 3] += 1e-3
    assert case.router.scale.min() > 1e-4
    assert case.values({"feat"})["feat"] == pytest.approx(1, abs=0.1)


def test_calibration_refuses_windows_without_anchors_and_states_that_overflowed():
    case = Case([1])
    with pytest.raises(ValueError, match=r"no place where student and teacher .* 1 windows.*to 0"):
        case.calibrate()
    case = Case([9])
    case.teacher[1][0, 5] = torch.inf
    with pytest.raises(ValueError, match=r"after layer 2 are not finite.*float32"):
        case.calibrate()


# --- shapes, state and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 1), (1, 4), (5, 1)])
def test_models_of_one_layer_work(layers):
    case = Case([20, 14], *zip(layers, (32, 48), strict=True))
    case.calibrate()
    sums = case.sums()
    torch.stack(list(sums.values())).sum().backward()
    assert all(value.isfinite() for value in sums.values())
    assert all(x.grad.any() for x in case.student)


@pytest.mark.parametrize("widths", [(30, 48), (32, 50)])
def test_heads_must_divide_both_widths(widths):
    message = rf"router.heads 4 for states of width {widths[0]} .* and {widths[1]} .*divisor of both"
    with pytest.raises(ValueError, match=message):
        StudentAwareRouter(RouterConfig(heads=4), (2, widths[0]), (2, widths[1]))


def test_state_dict_holds_all_that_was_fitted():
    one, other = Case([20, 14]), Case([20, 14], seed=5)
    one.calibrate()
    torch.nn.init.normal_(one.router.gate)
    other.student, other.teacher = one.student, one.teacher
    other.router.load_state_dict(one.router.state_dict())
    assert other.values() == one.values()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_teacher_states_of_any_dtype_and_autocast_cost_what_float32_costs(dtype):
    case = Case([40, 30])
    case.calibrate()
    expected = case.values()
    case.teacher = [x.to(dtype) for x in case.teacher]
    case.calibrate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = case.sums()
    assert {value.dtype for value in sums.values()} == {torch.float32}
    assert {name: value.item() / case.counts[name] for name, value in sums.items()} == pytest.approx(expected, abs=0.01)
    torch.stack(list(sums.values())).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == torch.float32 for x in case.student)


@pytest.mark.parametrize("student, teacher", [(torch.float64, torch.float32), (torch.bfloat16, torch.float16)])
def test_students_of_any_dtype_are_compared_in_float32_or_more(student, teacher):
    case = Case([20, 14])
    case.student = [x.detach().to(student).requires_grad_() for x in case.student]
    case.teacher = [x.to(teacher) for x in case.teacher]
    case.calibrate()
    sums = case.sums()
    assert {value.dtype for value in sums.values()} == {torch.promote_types(student, torch.float32)}
    torch.stack(list(sums.values())).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == student for x in case.student)


# --- a real pair ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_pair(real_models_dir) -> tuple[Pair, list[dict]]:
    """(a student and its teacher, windows of text that they know)."""
    folders = [real_models_dir / "models" / name for name in ("stories260k-llama", "tinystories-neo-chat-3m")]
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    tokenizers = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    pair = pair_of(*tokenizers, max_length=128, student=student, teacher=teacher, router=RouterConfig())
    text = (real_models_dir / "corpora" / "tinystories-v2.txt").read_text(encoding="utf-8")[:30_000]
    return pair, pair.encoder.windows(text.split("<|endoftext|>"))


def test_a_real_pair_starts_within_the_range_and_nearer_with_ridge(real_pair):
    pair, windows = real_pair
    collate, values = pair.collator(), {}
    for initial in ("random", "ridge"):
        pair.router = RouterConfig(initial=initial)
        framework = pair.framework({name: 1.0 for name in ROUTER_TERMS})
        framework.calibrate([collate(windows[i : i + 4]) for i in (0, 4)])
        with torch.no_grad():
            terms = framework(collate(windows[8:14])).terms
        values[initial] = {name: term.sum.item() / term.count for name, term in terms.items()}
        assert all(0.05 <= value <= 2 for value in values[initial].values()), values
    assert all(values["ridge"][name] < 0.8 * values["random"][name] for name in PROJECTED), values


def as_in_tf32(values: torch.Tensor) -> torch.Tensor:
    """float32 numbers with the 10 bits of mantissa that TF32 multiplies."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_copies_of_a_text_are_no_negatives_where_float32_products_are_tf32(monkeypatch):
    """There a state's cosine with itself may be 0.9996; channels of uneven size, as real states have."""
    torch.manual_seed(0)
    scale = torch.logspace(-2, 1, 32)
    text = torch.nn.functional.normalize(torch.randn(4, 32) * scale, dim=1)
    partners = [torch.cat([text, text])]
    projected = [torch.nn.functional.normalize(torch.randn(8, 32), dim=1)]
    anchors = SimpleNamespace(run=torch.arange(8), runs=8)
    states = SimpleNamespace(projected=projected, partners=partners, anchors=anchors, config=RouterConfig())
    exact = contrastive_loss(states)

    multiply = torch.Tensor.__matmul__

    def rounded(a, b):
        return multiply(as_in_tf32(a), as_in_tf32(b)) if a.dtype == torch.float32 else multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    torch.testing.assert_close(contrastive_loss(states), exact, rtol=1e-2, atol=1e-2)
