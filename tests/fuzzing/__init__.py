"""Random bad input at every entrance, made from a seed: ``python -m tests.fuzzing``.

A case is a name of an entrance and a seed. It makes an optimizer and a twin, hands the optimizer something bad, and
holds that a refusal changed nothing and that the next good step has the twin's bits. See tests/fuzzing/cases.py.
"""
