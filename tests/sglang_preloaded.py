"""Imported by the process that forks SGLang's ranks, so that the import is paid once."""

from tests import sglang_engine

sglang_engine.load()
