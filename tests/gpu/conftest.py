import pytest
import torch


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError(
            "tests/gpu needs a GPU that torch sees, and its own start: make gpu"
        )
