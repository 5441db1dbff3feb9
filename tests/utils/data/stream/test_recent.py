"""Texts seen of late: none is missed, few are taken for others, and memory stays what it is."""

from utils.data.stream.recent import RecentTexts


def test_a_text_is_known_while_fewer_others_follow_than_are_remembered():
    recent = RecentTexts(100)
    size = recent.size
    texts = [f"text {number}" for number in range(350)]
    for number, text in enumerate(texts):
        assert not recent.add(text, 0)
        for known in texts[max(0, number - 99) : number]:
            assert recent.add(known, 0)
    assert not recent.add(texts[0], 0)
    assert recent.size == size == 600


def test_few_new_texts_are_taken_for_repeats():
    recent = RecentTexts(5000)
    assert sum(recent.add(f"text {number}", 0) for number in range(15_000)) <= 3


def test_in_the_next_pass_a_text_is_new():
    recent = RecentTexts(10)
    assert [recent.add("text", passes) for passes in (0, 0, 1, 1)] == [False, True, False, True]


def test_a_state_is_taken_up_where_it_was():
    recent, other = RecentTexts(10), RecentTexts(10)
    for number in range(17):
        recent.add(f"text {number}", 0)
    other.load_state_dict(recent.state_dict())
    answers = [[one.add(f"text {number}", 0) for number in range(40)] for one in (recent, other)]
    assert answers[0] == answers[1] and any(answers[0]) and not all(answers[0])
