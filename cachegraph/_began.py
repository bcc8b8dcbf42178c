"""When this process began to import the package: it is imported before all else of it."""

import time

BEGAN = time.time()
