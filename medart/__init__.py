__version__ = "0.0.1"

import logging

# Where bitsandbytes is installed, whoever imports it hears of a faster kernel for 4 bits on a CPU, needed or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
