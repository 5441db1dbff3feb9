"""The face of the settings is cheap: `train.py --help` and mistakes in flags are answered without torch."""

import subprocess
import sys


def test_settings_and_command_line_load_no_torch():
    code = (
        "import sys, utils.config;"
        "utils.config.command_line.parse(['--student', 'a']);"
        "print({'torch', 'transformers', 'accelerate'} & sys.modules.keys())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
