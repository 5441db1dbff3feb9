import random
import re

import pytest

from utils.data import stories
from utils.data.stories import PLOTS, write_stories


@pytest.fixture(scope="module")
def written() -> list[str]:
    return write_stories(600)


def test_stories_differ_and_are_the_same_every_time(written):
    assert len(set(written)) == len(written) == 600
    assert write_stories(50) == written[:50] != write_stories(50, seed=1)


def test_no_choice_and_no_role_is_left_open():
    """In any plot with any of its things, whatever is chosen."""
    rng = random.Random(0)
    templates = [template for opening in stories.OPENINGS for template in opening]
    templates += [*stories.DETAILS, *stories.ENDINGS]
    for plot in PLOTS:
        for case in plot.cases:
            roles = dict(zip(("hero", "friend", "helper"), stories._cast(rng), strict=True))
            roles |= {role: stories._choose(rng, text) for role, text in case.items()}
            sentences = [stories._sentence(rng, template, roles) for template in (*templates, *plot.sentences)]
            assert not re.search(r"[][{}|]", " ".join(sentences))
            assert all(re.fullmatch(r"[A-Z\"].*[.!?]\"?", sentence) for sentence in sentences)


def test_a_thing_keeps_its_name_through_a_story(written):
    lost = [re.search(r"could not find (?:her|his) ((?:\w+ )+\w+)\.", story) for story in written]
    things = [(match[1], match.string) for match in lost if match]
    assert len({thing for thing, _ in things}) > 5
    assert all(f"It was the {thing}!" in story for thing, story in things)


def test_articles_fit_what_follows(written):
    assert not re.findall(r"\ba [aeiouAEIOU]\w*|\ban (?!hour)[^aeiouAEIOU ]\w*", " ".join(written))
