__version__ = "0.0.1"

import logging

# Where bitsandbytes is installed, whoever imports it hears of a faster kernel for 4 bits on a CPU, needed or not.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _torchvision_is_missed(record):
    return "requires torchvision (not installed)" in record.getMessage()


# Images are resized by PIL here, whether torchvision is installed or not; there is nothing to install.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: not _torchvision_is_missed(record))
