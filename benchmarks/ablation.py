"""Bits per byte on unseen text after equal steps, with each of the router's hidden-state terms and without.

    REAL_MODELS_DIR=... python -m benchmarks.ablation --pair neo-4096 --share 0.125 --steps 300 --size 8 --seeds 0 1 2
    REAL_MODELS_DIR=... python -m benchmarks.ablation --table

Every variant is KD .7 + LM .3 (`kd`), unless it says otherwise, and the terms of its name with their weights. "early":
the weight falls linearly to 0 at 40 % of the steps; "late": it rises from 10 % to 40 %; otherwise it is constant. Same
batches, same first student for one seed. See benchmarks/quality.py.
"""

from dataclasses import replace

from benchmarks.quality import Variant, main
from models.config import CurriculumConfig, Ramp, RouterConfig, Schedule, Term


def early(weight: float) -> Ramp:
    """Return a weight that falls to 0 at 40 % of the steps."""
    return Ramp(((0.0, weight), (0.4, 0.0)))


def late(weight: float) -> Ramp:
    """Return a weight that rises from 10 % to 40 % of the steps, as in the reference curriculum."""
    return Ramp(((0.1, 0.0), (0.4, weight)))


def _with(**weights: Schedule) -> Variant:
    """Make a variant of KD .7 + LM .3 and these weights."""
    terms = {name: Term(weight) for name, weight in weights.items()}
    return Variant(curriculum=replace(CurriculumConfig(), **terms))


VARIANTS = {
    "lm": _with(kd=0, lm=1),
    "kd": _with(),
    "feat .1": _with(feat=0.1),
    "feat 1": _with(feat=1.0),
    "feat 3": _with(feat=3.0),
    "feat 1 early": _with(feat=early(1.0)),
    "feat 1 late": _with(feat=late(1.0)),
    "rel .05": _with(rel=0.05),
    "rel 1": _with(rel=1.0),
    "rel 1 early": _with(rel=early(1.0)),
    "attn .1": _with(attn=0.1),
    "attn 1": _with(attn=1.0),
    "attn 3": _with(attn=3.0),
    "attn 1 early": _with(attn=early(1.0)),
    "layer 1": _with(layer=1.0),
    "layer 1 early": _with(layer=early(1.0)),
    "contr .1": _with(contr=0.1),
    "contr 1": _with(contr=1.0),
    "contr 1 early": _with(contr=early(1.0)),
    "feat 1 + attn 1": _with(feat=1.0, attn=1.0),
    "feat 1 + attn 1 early": _with(feat=early(1.0), attn=early(1.0)),
    "feat 3 + attn 3": _with(feat=3.0, attn=3.0),
    "all small": _with(feat=0.1, rel=0.05, attn=0.05, layer=0.1, contr=0.02),
    "all small early": _with(feat=early(0.1), rel=early(0.05), attn=early(0.05), layer=early(0.1), contr=early(0.02)),
    "all 1": _with(feat=1.0, rel=1.0, attn=1.0, layer=1.0, contr=1.0),
    "reference": _with(feat=late(0.1), attn=late(0.1), layer=Ramp(((0.4, 0.0), (1.0, 0.1)))),
    "lm + feat 1 + attn 1": _with(kd=0, lm=1, feat=1.0, attn=1.0),
    "feat 1, random": replace(_with(feat=1.0), router=RouterConfig(initial="random")),
    "layer 1, position": replace(_with(layer=1.0), router=RouterConfig(gate="position")),
    "rel 1, 4 heads": replace(_with(rel=1.0), router=RouterConfig(heads=4)),
    "attn 1, 4 heads": replace(_with(attn=1.0), router=RouterConfig(heads=4)),
}

if __name__ == "__main__":
    main(VARIANTS, "ablation-results.jsonl", __doc__, base="kd")
