import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import chat_arguments
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def test_a_flag_that_there_is_not_comes_with_the_nearest_one():
    with pytest.raises(UserError) as mistake:
        chat_arguments.parse(["runs/x", "--student-onli", "--new_token", "3"])
    message = str(mistake.value)
    assert "did you mean --student-only?" in message and "did you mean --new-tokens?" in message
    assert "chat --help shows the flags" in message


@pytest.mark.parametrize(("words", "said"), [(["--zzz"], "RUN"), ([], "RUN"), (["a", "b"], "b: no flag takes")])
def test_a_chat_is_with_one_run(words, said):
    with pytest.raises(UserError, match=said):
        chat_arguments.parse(words)


def test_a_mistake_is_answered_without_torch():
    program = "import sys, train; print(train.main(['chat', '--zzz']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2 False"
