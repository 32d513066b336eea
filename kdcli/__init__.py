"""kdcli: knowledge distillation of language models, one command and one config at a time."""

__version__ = "0.1.0"
