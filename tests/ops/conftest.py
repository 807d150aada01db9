"""What tests of kernels under Triton's interpreter share."""

import os
from collections.abc import Iterator

import pytest
import torch

from syncbn.ops import triton_passes


@pytest.fixture(scope="session", autouse=True)
def _language_replaced_once_a_kernel() -> Iterator[None]:
    """Triton's interpreter replaces its language's functions anew in each call of a device function: half its time.

    Within a kernel they are replaced already. Of a private function of Triton 3.5 to 3.7: without it, only slower.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope is None:
        yield
        return

    def replace_where_it_is_not(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return replace(fn) if any(tl.core.is_builtin(language.load) for language in languages) else scope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_where_it_is_not)
        yield


@pytest.fixture
def fresh_memory_is_not_a_number():
    torch.use_deterministic_algorithms(True)  # under which torch fills it
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def many_programs(monkeypatch):
    """As on a GPU of some multiprocessors, whose programs' sums must be merged."""
    monkeypatch.setattr(triton_passes, "_multiprocessors", lambda device: 5)
