"Keep this environment's kernel from printing warnings about itself below every papermill command; `make setup` calls it."

import json
import sys
from pathlib import Path

QUIET = "--IPKernelApp.log_level=CRITICAL"  # of the kernel's own log; errors of a notebook's code are shown as before

spec = Path(sys.prefix, "share", "jupyter", "kernels", "python3", "kernel.json")
kernel = json.loads(spec.read_text(encoding="utf-8"))
if QUIET not in kernel["argv"]:
    kernel["argv"].append(QUIET)
    spec.write_text(json.dumps(kernel, indent=1) + "\n", encoding="utf-8")
