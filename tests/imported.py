"""What a worker of a tiny run imports: done once, by the server that ranks are forked from (tests/distributed.py)."""

# ruff: noqa: B018, E402, F401
from __future__ import annotations

import logging
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pandas imports pyarrow, whose allocator has one
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import pandas
import transformers
import transformers.optimization
from transformers.models.llama import modeling_llama

import kdcli.data.jsonl
import kdcli.domain_scheduler.natural
import kdcli.engine.zero
import kdcli.evaluation.heldout
import kdcli.objective.forward_kl
import kdcli.pipeline.pipeline
import kdcli.rollout.dataset
import kdcli.student.hf
import kdcli.student_init.from_config
import kdcli.teacher.hf
import kdcli.worker

transformers.AutoTokenizer, transformers.AutoModelForCausalLM  # lazy until named
