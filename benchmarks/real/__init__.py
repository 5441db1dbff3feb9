"""Parts of `benchmarks.real_pair`: two real language models, and students made of the smaller one.

sources     the packages that hold the models, and the plain folders made of them
text        corpora, documents, what is learned from and what nobody is trained on
signals     a teacher's answers, computed once for all arms
pair        models, windows and teachers of the benchmark, made once
arms        ways to train a student, in the order of their worth
training    one arm: a student trained and measured
tables      the tables in Markdown
"""
