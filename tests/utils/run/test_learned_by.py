"""Words of the report for what a student learned by."""

from types import SimpleNamespace

from models.config import CurriculumConfig, LossConfig, Term
from utils.run.stages import _learned_by


def test_what_kd_compares_by_is_named_where_kd_is_used():
    loss = LossConfig(divergence="reverse_kl")
    assert _learned_by(SimpleNamespace(curriculum=CurriculumConfig(), loss=LossConfig())) == "kd 0.7, lm 0.3"
    assert _learned_by(SimpleNamespace(curriculum=CurriculumConfig(), loss=loss)) == (
        "kd 0.7, lm 0.3, divergence reverse_kl"
    )
    text_alone = CurriculumConfig(kd=Term(0.0))
    assert _learned_by(SimpleNamespace(curriculum=text_alone, loss=loss)) == "lm 0.3"
