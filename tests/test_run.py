"""A run as a whole, on a checkpoint of a few kilobytes: killed, interrupted, resumed, and read back by others."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from tiny_run import (
    main_like,
    one_line,
    tiny_arguments,
    tiny_config,
    tiny_folder as tiny_folder,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from eqx_specgrpo import train
from eqx_specgrpo._types import ScoredRollouts, StopReason
from eqx_specgrpo.drafts import MedusaHeads, load_draft
from eqx_specgrpo.grpo import NonFiniteError, compute_copy
from eqx_specgrpo.models import load_pretrained, sequence_features
from eqx_specgrpo.train._loop import run as run_of_loop  # noqa: F401
from eqx_specgrpo.train._parts import make_draft, make_parts
from eqx_specgrpo.train._state import RunState
from eqx_specgrpo.train._step import draft_rows, step_key, update_draft, update_policy
