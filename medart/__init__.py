__version__ = "0.0.1"

import logging

# Where bitsandbytes is installed, whoever imports it hears of a faster kernel for 4 bits on a CPU, needed or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _worth_saying(record):
    "Images are resized by PIL here, so nobody need hear that torchvision is missing."
    return "requires torchvision (not installed)" not in record.getMessage()


logging.getLogger("transformers.utils.import_utils").addFilter(_worth_saying)
