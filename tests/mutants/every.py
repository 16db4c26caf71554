"""Every mutant, in the order of the table."""

from __future__ import annotations

from tests.mutants.of_context import OF_CONTEXT
from tests.mutants.of_memory import OF_MEMORY
from tests.mutants.of_model import OF_MODEL
from tests.mutants.of_parallel import OF_PARALLEL
from tests.mutants.of_train import OF_TRAIN

MUTANTS = [*OF_PARALLEL, *OF_MODEL, *OF_MEMORY, *OF_CONTEXT, *OF_TRAIN]
