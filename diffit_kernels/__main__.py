"""``python -m diffit_kernels``."""

import sys

from diffit_kernels.cli import main

sys.exit(main())
