"""setuptools' own build backend; where it is missing a sentence, instead of the traceback of its import."""

import build_checks

build_checks.check_setuptools()

from setuptools.build_meta import *  # noqa: E402, F403
