"""The student's own text: what it writes between optimizer steps, and learns from in the steps after.

- `slots`: which windows of a step the student writes itself
- `sampling`: text behind prompts, a pure function of weights and random numbers; and what another engine must do
- `round_files`: texts of a round, in the folder of the run
- `figures`: length, repetition and the teacher's opinion of the texts of a round
- `warning_signs`: signs that a student loses itself in its own text, with the likely cause
- `rounds`: `Rounds`: write, keep, measure; called by the training loop
"""
