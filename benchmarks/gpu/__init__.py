"""Everything that a GPU has to say about this project, in ten minutes and by one command: python -m benchmarks.gpu.

The command, and the process of each part:
    __main__   runs the parts within a budget and writes what they say
    parts      the list of parts, in order of worth
    settings   sizes of the measurements, and the argument of every part
    timing     rounds of measurement on a device whose memory may run out
    made       models, tokenizers and texts that are made on the spot
    targets    the figures that are right, and the verdicts
    report     the results as JSON and Markdown

The parts:
    machine    bandwidth, products, kernels of attention
    checks     waiting of the host, verify_fixes.py
    steps      a micro-batch, memory beside the forecast
    heads      the student's head, the teacher's top-k
    numerics   gradients beside float64, a teacher in few bits
    runs       train.py, end to end
"""
