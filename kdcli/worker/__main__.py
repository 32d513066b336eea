from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from kdcli.launch import _lifeline
from kdcli.worker import main

_lifeline.follow()
exit_code = main(Path(sys.argv[1]))
sys.stdout.flush()
sys.stderr.flush()
if exit_code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os._exit(exit_code)  # leaving a broken process group in good order could wait for the others for ever
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.exit(exit_code)
