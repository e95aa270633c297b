"""The report, its figures and the run records."""

import utils  # noqa: F401, before matplotlib, whose backend it sets
